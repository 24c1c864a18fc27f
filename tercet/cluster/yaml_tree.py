"""YAML as plain data, with the origin of each value, so that an error can name file and line.

Only JSON's types are built (map with text keys, list, text, number, bool, null); any other tag is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tercet.errors import SpecError

KeyPath = tuple[str, ...]

QUOTES = ("'", '"')
SCIENTIFIC = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d{1,3}")  # numbers in YAML 1.2, texts in 1.1
MAX_DEPTH = 32
MAX_VALUES = 10_000  # aliases are expanded, so a small file could otherwise name a huge tree


@dataclass
class YamlTree:
    """`data` holds the values; `origins` says where each was written: `configs/x.yaml:12` or `--set a.b=c`."""

    source: str
    data: dict[str, Any]
    origins: dict[KeyPath, str] = field(default_factory=dict)  # path -> where

    def where(self, path: Sequence[str]) -> str:
        """Origin of `path`, or of its nearest ancestor that was written down."""
        return self.origins.get(self._written(path), self.source)

    def order(self, path: Sequence[str]) -> int:
        """Position of `path`, to sort by: the file's keys in order, then the settings."""
        return [(), *self.origins].index(self._written(path))

    def _written(self, path: Sequence[str]) -> KeyPath:
        ancestors = (tuple(path[:end]) for end in range(len(path), 0, -1))
        return next((ancestor for ancestor in ancestors if ancestor in self.origins), ())

    def override(self, setting: str, is_text: Callable[[KeyPath], bool]) -> None:
        """Apply one `key.path=value` as Helm does: the value is YAML, or taken literally where the key takes text; null
        removes the key, `\\.` is a dot in a key."""
        key, equals, text = setting.partition("=")
        path = tuple(part.replace("\\.", ".") for part in re.split(r"(?<!\\)\.", key.strip()))
        if not equals or not all(path):
            raise SpecError(f"--set {setting}: want key.path=value, such as model.dtype=float32")
        if is_text(path) and text.strip() != "null" and text.strip()[:1] not in QUOTES:
            value: Any = text.strip()
        else:
            value = _Builder(f"--set {setting}", {}).build(_compose(text, f"--set {setting}"), ())
        self._put(path, value, f"--set {setting}")

    def _put(self, path: KeyPath, value: Any, where: str) -> None:
        level = self.data
        for depth, name in enumerate(path[:-1], start=1):
            if level.get(name) is None:
                level[name] = {}
                self.origins[path[:depth]] = where
            level = level[name]
            if not isinstance(level, dict):
                raise SpecError(f"{where}: {'.'.join(path[:depth])} is {level!r}, it has no keys below it")
        if value is None:
            level.pop(path[-1], None)
        else:
            level[path[-1]] = value
        self.origins = {p: w for p, w in self.origins.items() if p[: len(path)] != path}
        self.origins[path] = where


def read_yaml(path: Path) -> YamlTree:
    """Raises SpecError for a file that is missing, unreadable, no UTF-8, no YAML, empty, or no map at its top."""
    source = str(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise SpecError(f"{source}: no such file") from error
    except OSError as error:
        raise SpecError(f"{source}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise SpecError(f"{source}:{line}: not valid UTF-8 at byte {error.start}") from error
    node = _compose(text, source)
    if node is None:
        raise SpecError(f"{source}: the file is empty; see configs/local.yaml for an example")
    if not isinstance(node, yaml.MappingNode):
        raise SpecError(f"{source}:{node.start_mark.line + 1}: the spec must be a map of keys, got {_kind(node)}")
    origins: dict[KeyPath, str] = {}
    return YamlTree(source, _Builder(source, origins).build(node, ()), origins)


def _compose(text: str, source: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark and not source.startswith("--set") else ""
        hint = "" if line else '; a text with signs of YAML needs quotes, as in a.b=["*"]'
        what = (error.problem or error.context or "").replace("\0", "")
        raise SpecError(f"{source}{line}: not valid YAML: {what}{hint}") from error
    except yaml.YAMLError as error:
        what = " ".join(str(error).split()).replace("\0", "")
        raise SpecError(f"{source}: not valid YAML: {what}") from error
    except RecursionError as error:
        raise SpecError(f"{source}: nested too deeply") from error


def _kind(node: yaml.Node) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else "a single value"


class _Builder:
    def __init__(self, source: str, origins: dict[KeyPath, str]) -> None:
        self._source = source
        self._origins = origins
        self._values = 0

    def build(self, node: yaml.Node | None, path: KeyPath) -> Any:
        self._values += 1
        if self._values > MAX_VALUES or len(path) > MAX_DEPTH:
            raise self._fault(node, path, f"more than {MAX_VALUES} values or {MAX_DEPTH} levels")
        if isinstance(node, yaml.MappingNode):
            return self._map(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*path, str(i))) for i, item in enumerate(node.value)]
        return None if node is None else self._scalar(node, path)

    def _map(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        built: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._fault(key_node, path, "a key must be text")
            key = key_node.value
            if key in built:
                raise self._fault(key_node, (*path, key), "this key stands twice")
            self._origins[(*path, key)] = f"{self._source}:{key_node.start_mark.line + 1}"
            built[key] = self.build(value_node, (*path, key))
        return built

    def _scalar(self, node: yaml.Node, path: KeyPath) -> Any:
        kind = node.tag.rpartition(":")[2]
        if (
            isinstance(node, yaml.ScalarNode)
            and kind == "str"
            and node.style is None
            and SCIENTIFIC.fullmatch(node.value)
        ):
            number = float(node.value)
            return int(number) if number.is_integer() else number
        if kind in {"timestamp", "value", "merge"}:
            return node.value  # 2026-11-21, = and << are text to us
        if kind not in {"str", "int", "float", "bool", "null"}:
            raise self._fault(node, path, f"the tag {node.tag} is not allowed")
        try:
            return yaml.SafeLoader("").construct_object(node)
        except ValueError as error:
            raise self._fault(node, path, f"{node.value!r} is no {kind}") from error

    def _fault(self, node: yaml.Node | None, path: KeyPath, what: str) -> SpecError:
        line = "" if node is None or self._source.startswith("--set") else f":{node.start_mark.line + 1}"
        return SpecError(f"{self._source}{line}: {'.'.join(path) or 'top'}: {what}")
