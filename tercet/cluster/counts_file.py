"""The file of what a worker has counted of its routing: numpy's npz, without pickle."""

from __future__ import annotations

import os
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from tercet.cluster.run_file import reaching
from tercet.errors import SpecError
from tercet.placement.expert_counts import Counts

FORMAT = 2
ARRAYS = ("load", "computed", "phy2log")
OPTIONAL = ("shares", "pairs")  # arrays, too
MOST_BYTES = 1 << 31  # unpacked


def write_counts(path: Path, counts: Counts) -> None:
    """At once, or not at all. Raises ClusterError if it cannot be written."""
    given = {field.name: getattr(counts, field.name) for field in fields(counts)}
    values: dict[str, Any] = {name: np.asarray(value) for name, value in given.items() if value is not None}
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with reaching(path):
        try:
            with part.open("wb") as file:
                np.savez_compressed(file, format=np.asarray(FORMAT), **values)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def read_counts(path: Path) -> Counts:
    """Raises SpecError for what is no such file."""
    if not path.is_file():  # also a pipe, which would be waited for
        raise SpecError(f"{path}: no file of counts: {'not a file' if path.exists() else 'there is none'}")
    try:
        with zipfile.ZipFile(path) as file:
            size = sum(info.file_size for info in file.infolist())
        if size > MOST_BYTES:
            raise SpecError(f"it unpacks to {size:,} bytes, {MOST_BYTES:,} at most")
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        return _counts(found)
    except SpecError as error:
        raise SpecError(f"{path}: no file of counts: {error}") from error
    except Exception as error:  # what zipfile, zlib and numpy raise for a damaged file has no common base
        told = f"{path}: no file of counts, or a damaged one; `tercet experts export` writes them ({error!r:.80})"
        raise SpecError(told) from error


def _counts(found: dict[str, Any]) -> Counts:
    """Raises SpecError."""
    if "format" in found and found["format"].tolist() != FORMAT:
        raise SpecError(f"it is not of format {FORMAT}; record it again")
    wanted = {field.name for field in fields(Counts)} - {*OPTIONAL} | {"format"}
    if found.keys() - {*OPTIONAL} != wanted:
        raise SpecError(f"it has {sorted(found)}, and should have {sorted(wanted)}")
    arrays = {name: found[name] for name in (*ARRAYS, *OPTIONAL) if name in found}
    for name, array in arrays.items():
        if array.dtype != np.int64:
            raise SpecError(f"{name} is {array.dtype}, and should be int64")
    values = {name: found[name].item() for name in wanted - {*ARRAYS, "format"}}
    for name in ("nodes", "top_k", "expert_bytes"):
        if not isinstance(values[name], int):
            raise SpecError(f"{name} is {values[name]!r:.40}, and should be a whole number")
    return Counts(**arrays, **values)
