"""Reads a cluster spec: YAML and `--set` overrides in, a checked ClusterSpec out.

Faults become one SpecError, one line each, in the file's order:
`configs/x.yaml:12: roles.decode.replicas: must be at least 1, got 0`.
"""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tercet.cluster.unbuilt import refuse_unbuilt
from tercet.cluster.yaml_tree import YamlTree, read_yaml
from tercet.errors import ModelFileMissing, SpecError, UnsupportedSpec
from tercet.models.source_path import PACKAGE, source_path, tower_path
from tercet.spec import ClusterSpec


def load_spec(path: Path, overrides: Sequence[str] = ()) -> ClusterSpec:
    """Read, override, check. A model's path becomes absolute, since workers run in other folders. Raises SpecError,
    UnsupportedSpec for what is valid but not built, or ModelFileMissing."""
    tree = read_yaml(path)
    for setting in overrides:
        tree.override(setting, _is_text)
    spec = _validate(tree)
    try:
        refuse_unbuilt(spec)
    except UnsupportedSpec as error:
        raise UnsupportedSpec(_located(tree, str(error))) from error
    return _with_absolute_paths(spec, tree)


def _with_absolute_paths(spec: ClusterSpec, tree: YamlTree) -> ClusterSpec:
    model = spec.model
    with _missing(tree, "model.source"):
        source = source_path(model.source)
        if model.source.startswith(PACKAGE):
            from tercet.models.sources import locate  # only now: huggingface_hub, numpy

            locate(model)
    with _missing(tree, "model.vision"):
        vision = None if model.vision is None else tower_path(model.vision)
    found = {"source": source, "vision": vision}
    absolute = {name: str(path) for name, path in found.items() if path is not None}
    return spec.model_copy(update={"model": model.model_copy(update=absolute)})


@contextmanager
def _missing(tree: YamlTree, key: str) -> Iterator[None]:
    """Puts the key, with file and line, before what is said of a file that it names."""
    try:
        yield
    except ModelFileMissing as error:
        raise ModelFileMissing(_located(tree, f"{key}: {error}")) from error


def _validate(tree: YamlTree) -> ClusterSpec:
    try:
        # JSON mode, because there a strict enum accepts its value as text.
        return ClusterSpec.model_validate_json(json.dumps(tree.data))
    except ValidationError as error:
        faults = sorted(map(_explain, error.errors(include_url=False)), key=lambda fault: tree.order(_path(fault)))
        raise SpecError("\n".join(_located(tree, fault) for fault in faults)) from error


def _located(tree: YamlTree, fault: str) -> str:
    """Put file and line before a fault that reads `dotted.path: what is wrong`."""
    return f"{tree.where(_path(fault))}: {fault}"


def _path(fault: str) -> list[str]:
    return fault.partition(":")[0].split(".")


def _explain(fault: ErrorDetails) -> str:
    """`dotted.path: what is wrong` from one of pydantic's faults."""
    path = [str(part) for part in fault["loc"] if part != "[key]"]
    if fault["type"] == "value_error":  # ours, of a part of the spec as a whole; it goes on with the path within it
        return ".".join([*path, str(fault["ctx"]["error"])])
    if fault["type"] == "extra_forbidden":
        return f"{'.'.join(path)}: {_unknown_key(path)}"
    wording = _WORDING.get(fault["type"])
    what = wording(fault.get("ctx", {})) if wording else fault["msg"][:1].lower() + fault["msg"][1:]
    if fault["type"] != "missing":
        what += f", got {_shown(fault['input'])}"
    return f"{'.'.join(path) or 'spec'}: {what}"


_WORDING: dict[str, Callable[[dict[str, Any]], str]] = {  # pydantic's error type -> our words
    "missing": lambda _: "this key is required",
    "greater_than": lambda c: f"must be above {c['gt']:g}",
    "greater_than_equal": lambda c: f"must be at least {c['ge']:g}",
    "less_than_equal": lambda c: f"must be at most {c['le']:g}",
    "literal_error": lambda c: f"must be {c['expected']}",
    "enum": lambda c: f"must be {c['expected']}",
    "int_type": lambda _: "must be a whole number",
    "int_from_float": lambda _: "must be a whole number",
    "float_type": lambda _: "must be a number",
    "finite_number": lambda _: "must be a finite number",
    "string_type": lambda _: "must be text",
    "list_type": lambda _: "must be a list",
    "string_too_short": lambda _: "must not be empty",
    "bool_type": lambda _: "must be true or false",
    "model_type": lambda _: "must be a map of keys",
    "dict_type": lambda _: "must be a map of keys",
    "string_pattern_mismatch": lambda _: "must be lower-case letters, digits and dashes, 42 at most",
}


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _unknown_key(path: Sequence[str]) -> str:
    known = sorted(_model_at(path[:-1]).model_fields)
    near = difflib.get_close_matches(path[-1], known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"unknown key{hint} (known keys: {', '.join(known)})"


def _is_text(path: Sequence[str]) -> bool:
    """Whether the key there takes a text."""
    kind: Any = ClusterSpec
    for name in path:
        if isinstance(kind, type) and issubclass(kind, BaseModel) and name in kind.model_fields:
            kind = kind.model_fields[name].annotation
        elif typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        else:
            return False
    union = typing.get_origin(kind) in (Union, types.UnionType)
    kinds = [k for k in typing.get_args(kind) if k is not type(None)] if union else [kind]
    return all(map(_holds_text, kinds))


def _holds_text(kind: Any) -> bool:
    bare = typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind
    return bare is str or (typing.get_origin(bare) is Literal and isinstance(typing.get_args(bare)[0], str))


def _model_at(path: Sequence[str]) -> type[BaseModel]:
    """The pydantic model at `path`; keys of maps (pools, roles) are skipped."""
    kind: Any = ClusterSpec
    for name in path:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[name].annotation
        else:
            kind = typing.get_args(kind)[1]  # dict[key, model]
    assert isinstance(kind, type), f"no model at {path}"
    assert issubclass(kind, BaseModel), f"no model at {path}"
    return kind
