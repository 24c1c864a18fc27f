"""A model in GGUF: one file, or the parts of a split one (NAME-00001-of-00003.gguf and so on). Imports no torch."""

from __future__ import annotations

import math
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tercet.errors import ModelFileCorrupt, ModelFileMissing, UnsupportedModel
from tercet.models.gguf_part import GgufPart, GgufTensor

PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


class GgufFile:
    """Metadata of the first part, tensors of all. Opening it raises ModelFileMissing, ModelFileCorrupt or
    UnsupportedModel."""

    def __init__(self, path: Path) -> None:
        """path: the file, or any part of a split one."""
        parts = _parts(path)
        self.path = path
        self.metadata = parts[0].metadata
        self._part_of = {name: part for part in parts for name in part.tensors}
        held = sum(len(part.tensors) for part in parts)
        promised = self.metadata.get("split.tensors.count", held)
        if not len(self._part_of) == held == promised:
            raise ModelFileCorrupt(f"{path}: its {len(parts)} parts hold {held} tensors, not {promised} different ones")

    @cached_property
    def tensors(self) -> dict[str, GgufTensor]:
        return {name: part.tensors[name] for name, part in self._part_of.items()}

    @cached_property
    def architecture(self) -> str:
        return str(self.require("general.architecture"))

    def scalar(self, key: str, default: Any = None) -> Any:
        """A value, or the one value that a list of it holds for every layer. Raises UnsupportedModel for a list of
        different ones."""
        value = self.metadata.get(key, default)
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            raise UnsupportedModel(f"{self.path}: {key} differs from layer to layer: {value!r:.60}")
        return value[0]

    def require(self, key: str) -> Any:
        """The scalar of a key that the file must have."""
        if key not in self.metadata:
            raise ModelFileCorrupt(f"{self.path}: has no key {key!r}; is it a language model's GGUF?")
        return self.scalar(key)

    def count(self, key: str, default: int | None = None) -> int:
        """The value of a key that must be a positive whole number; without a default it must be there."""
        value = self.require(key) if default is None else self.scalar(key, default)
        if not isinstance(value, int) or value < 1:
            raise ModelFileCorrupt(f"{self.path}: {key} is {value!r}, not a positive whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """The value of a key that must be a positive number; without a default it must be there."""
        value = self.require(key) if default is None else self.scalar(key, default)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ModelFileCorrupt(f"{self.path}: {key} is {value!r:.60}, not a positive number")
        return float(value)

    def array(self, key: str) -> list[Any]:
        """The value of a key that must be a list."""
        value = self.metadata.get(key)
        if not isinstance(value, list):
            raise ModelFileCorrupt(f"{self.path}: {key} is {'missing' if value is None else 'no list'}")
        return value

    def token(self, name: str) -> int | None:
        """The id of a special token such as bos, eos, unknown; the first if there are several. Raises ModelFileCorrupt
        for one that is not in the vocabulary."""
        key = f"tokenizer.ggml.{name}_token_id"
        given = self.metadata.get(key)
        value = given[0] if isinstance(given, list) and given else given
        if value is not None and not (isinstance(value, int) and 0 <= value < len(self.array("tokenizer.ggml.tokens"))):
            raise ModelFileCorrupt(f"{self.path}: {key} is {value!r:.60}, no token of its vocabulary")
        return value

    def rows(self, name: str) -> npt.NDArray[np.uint8]:
        """One tensor of the file as it is stored, [..., bytes of a row]."""
        return self._part_of[name].rows(name)

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """One tensor, dequantised, [shape] float32. Raises UnsupportedModel if gguf cannot do that."""
        if name not in self._part_of:
            raise ModelFileCorrupt(f"{self.path}: has no tensor {name!r}")
        return self._part_of[name].read(name)


def _parts(path: Path) -> list[GgufPart]:
    """All parts in order, whichever of them `path` is."""
    given = GgufPart(path)
    count = given.metadata.get("split.count", 1)
    if count in (0, 1):
        return [given]
    named = PART.fullmatch(path.name)
    if named is None or int(named[3]) != count:
        raise ModelFileCorrupt(f"{path}: is a part of {count}; give it back its name, NAME-00001-of-{count:05}.gguf")
    paths = [path.with_name(f"{named[1]}-{i + 1:05}-of-{named[3]}.gguf") for i in range(count)]
    if missing := [p.name for p in paths if not p.is_file()]:
        raise ModelFileMissing(f"{path}: the model has {count} parts, {missing[0]} is not there; fetch all of them")
    parts = [GgufPart(p) for p in paths]
    for i, part in enumerate(parts):
        if (part.metadata.get("split.no"), part.metadata.get("split.count")) != (i, count):
            raise ModelFileCorrupt(f"{part.path}: is not part {i + 1} of {count}, as its name says; fetch it again")
    return parts
