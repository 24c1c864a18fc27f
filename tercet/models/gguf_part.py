"""Reading one GGUF file: its metadata and where its tensors lie. Imports no torch.

The header is read here and not by `gguf.GGUFReader`, because that takes 2.7 s for a vocabulary of 49,152 (it keeps
a numpy array for every string), checks no bound, and every process of a cluster reads it. Types, block sizes and
dequantisation are gguf's. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from tercet.errors import ModelFileCorrupt, ModelFileMissing, UnsupportedModel

Scalar = gguf.GGUFValueType
SCALARS = {  # value type -> struct format
    Scalar.UINT8: "<B",
    Scalar.INT8: "<b",
    Scalar.UINT16: "<H",
    Scalar.INT16: "<h",
    Scalar.UINT32: "<I",
    Scalar.INT32: "<i",
    Scalar.FLOAT32: "<f",
    Scalar.BOOL: "<?",
    Scalar.UINT64: "<Q",
    Scalar.INT64: "<q",
    Scalar.FLOAT64: "<d",
}
MAX_DIMS = 4  # GGML_MAX_DIMS


@dataclass(frozen=True)
class GgufTensor:
    name: str
    shape: tuple[int, ...]  # row-major, as torch and numpy have it (the file has it reversed)
    kind: gguf.GGMLQuantizationType
    offset: int  # bytes from the start of the file
    num_bytes: int


class GgufPart:
    """One file, mapped. Opening it raises ModelFileMissing, ModelFileCorrupt or UnsupportedModel."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelFileMissing(f"{path}: cannot read the model file: {error.strerror}") from error
        except ValueError as error:  # mmap refuses an empty file
            raise ModelFileCorrupt(f"{path}: the file is empty; fetch it again") from error
        header = _Cursor(path, self.data)
        header.check_magic()
        num_tensors, num_keys = header.take("<QQ")
        self.metadata = {header.string(): header.value(header.scalar("<I")) for _ in range(num_keys)}
        infos = [_tensor_info(header) for _ in range(num_tensors)]
        align = self.metadata.get("general.alignment", 32)
        if not isinstance(align, int) or align < 1:
            raise header.corrupt(f"general.alignment is {align!r}")
        start = header.at + -header.at % align
        self.tensors = {info.name: _placed(info, start, path, len(self.data)) for info in infos}

    def rows(self, name: str) -> npt.NDArray[np.uint8]:
        """One tensor as it is stored, [..., bytes of a row]."""
        tensor = self.tensors[name]
        raw = np.frombuffer(self.data, np.uint8, tensor.num_bytes, tensor.offset)
        return raw.reshape(*tensor.shape[:-1], -1)

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """One tensor, dequantised, [shape] float32. Raises UnsupportedModel if gguf cannot do that."""
        tensor, rows = self.tensors[name], self.rows(name)
        raw = rows.reshape(-1)
        try:
            values = gguf.dequantize(
                rows if tensor.kind not in _NATIVE else raw.view(_NATIVE[tensor.kind]), tensor.kind
            )
        except NotImplementedError as error:
            raise UnsupportedModel(f"{self.path}: tensor {name!r} is quantised as {tensor.kind.name}") from error
        return np.require(values, np.float32, "W").reshape(tensor.shape)


_NATIVE = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}


class _Cursor:
    """Reads forward; a read past the end is ModelFileCorrupt."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def corrupt(self, what: str) -> ModelFileCorrupt:
        return ModelFileCorrupt(f"{self.path}: {what} (at byte {self.at} of {len(self.data)}); fetch it again")

    def take(self, form: str) -> tuple[Any, ...]:
        size = struct.calcsize(form)
        if self.at + size > len(self.data):
            raise self.corrupt("ends inside its header")
        values = struct.unpack_from(form, self.data, self.at)
        self.at += size
        return values

    def scalar(self, form: str) -> Any:
        return self.take(form)[0]

    def check_magic(self) -> None:
        magic, version = self.take("<4sI")
        if magic != b"GGUF":
            raise ModelFileCorrupt(f"{self.path}: is no GGUF file; it starts with {magic!r}")
        if version not in (2, 3):
            raise UnsupportedModel(f"{self.path}: GGUF version {version}; versions 2 and 3 (little-endian) are read")

    def string(self) -> str:
        size = self.scalar("<Q")
        if self.at + size > len(self.data):
            raise self.corrupt("ends inside its header")
        self.at += size
        try:
            return self.data[self.at - size : self.at].decode()
        except UnicodeDecodeError as error:
            raise self.corrupt("has a string that is not UTF-8 in its header") from error

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.scalar(SCALARS[Scalar(kind)])
        if kind == Scalar.STRING:
            return self.string()
        if kind == Scalar.ARRAY:
            return self.array()
        raise self.corrupt(f"has a value of unknown type {kind} in its header")

    def array(self) -> list[Any]:
        kind, count = self.take("<IQ")
        if kind == Scalar.STRING:
            return [self.string() for _ in range(count)]
        if kind not in SCALARS:
            raise self.corrupt(f"has an array of type {kind} in its header")
        form = SCALARS[Scalar(kind)]
        if self.at + count * struct.calcsize(form) > len(self.data):
            raise self.corrupt("ends inside its header")
        return list(self.take(f"<{count}{form[1]}"))


def _tensor_info(header: _Cursor) -> GgufTensor:
    """One entry of the header's table; its offset still counts from the start of the data."""
    name = header.string()
    dims = header.scalar("<I")
    if dims > MAX_DIMS:
        raise header.corrupt(f"says that tensor {name!r} has {dims} dimensions")
    shape = tuple(reversed(header.take(f"<{dims}Q")))
    kind, offset = header.take("<IQ")
    if kind not in iter(gguf.GGMLQuantizationType):
        raise UnsupportedModel(f"{header.path}: tensor {name!r} has the unknown quantisation {kind}")
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    if shape and shape[-1] % block:
        raise header.corrupt(f"says that a row of tensor {name!r} has {shape[-1]} values in blocks of {block}")
    return GgufTensor(name, shape, gguf.GGMLQuantizationType(kind), offset, math.prod(shape) // block * size)


def _placed(info: GgufTensor, start: int, path: Path, file_size: int) -> GgufTensor:
    offset = start + info.offset
    if offset + info.num_bytes > file_size:
        raise ModelFileCorrupt(
            f"{path}: is cut short: tensor {info.name!r} ends at byte {offset + info.num_bytes}, "
            f"the file at {file_size}; fetch it again"
        )
    return GgufTensor(info.name, info.shape, info.kind, offset, info.num_bytes)
