"""The file of what a worker has counted of its routing: numpy's npz, without pickle."""

from __future__ import annotations

import zipfile
from dataclasses import fields
from pathlib import Path

import numpy as np

from tercet.cluster.run_file import reaching
from tercet.errors import SpecError
from tercet.placement.experts.weighing import Counts

FORMAT = 1
ARRAYS = ("load", "phy2log")


def write_counts(path: Path, counts: Counts) -> None:
    """Raises ClusterError if it cannot be written."""
    values = {field.name: np.asarray(getattr(counts, field.name)) for field in fields(counts)}
    with reaching(path), path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, format=np.asarray(FORMAT), **values)


def read_counts(path: Path) -> Counts:
    """Raises SpecError for what is no such file."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise SpecError(f"{path}: no file of counts: {error}") from error
    if int(found.pop("format", np.asarray(0))) != FORMAT:
        raise SpecError(f"{path}: no file of counts of format {FORMAT}; `tercet experts export` writes one")
    wanted = {field.name for field in fields(Counts)}
    if found.keys() != wanted:
        raise SpecError(f"{path}: has {sorted(found)}, and should have {sorted(wanted)}")
    for name in ARRAYS:
        if found[name].dtype != np.int64:
            raise SpecError(f"{path}: {name} is {found[name].dtype}, and should be int64")
    for name in wanted - {*ARRAYS}:
        if found[name].shape:
            raise SpecError(f"{path}: {name} is an array, and should be one value")
    try:
        return Counts(
            found["load"],
            found["phy2log"],
            int(found["ranks"]),
            int(found["nodes"]),
            int(found["top_k"]),
            int(found["expert_bytes"]),
            float(found["window_s"]),
            str(found["worker"]),
        )
    except (SpecError, ValueError) as error:
        raise SpecError(f"{path}: {error}") from error
