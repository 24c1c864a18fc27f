"""Counts of routing that something else than Tercet has recorded, as Tercet's.

W windows   T steps   L layers   E experts   R ranks   P slots of a layer

    .npy   [L, E] or [W, L, E]
    .json  the same as nested lists; or an object with `logical_count`: [L, E] or [T, L, E]
    .pt    [L, E] or [T, L, E], a tensor or a dict with `logical_count`, which SGLang's expert distribution recorder
           writes in its modes stat and stat_approx

SGLang counts each forward pass by itself, in all layers of the model, and pads its buffer with passes that never were.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tercet.cluster.run_file import reaching
from tercet.distributed.expert_map import default_map
from tercet.errors import SpecError
from tercet.placement.expert_counts import MOST_ROWS, Counts
from tercet.placement.experts.weighing import served
from tercet.spec import MOST_RANKS

KEY = "logical_count"
MOST_WINDOWS = 8  # that steps are summed into
MOST_BYTES = 1 << 30  # of a file, and of its array
MOST_TEXT = 64 << 20  # bytes of JSON, which take many times that in memory
MOST_EXPERTS = 4096  # of a layer
MOST_CELLS = 1 << 26  # ranks * layers * slots: what a window takes to be weighed
Longs = NDArray[np.int64]
Read = tuple[NDArray[Any], bool]  # an array, and whether its first axis, of three, is steps


@dataclass(frozen=True)
class Group:
    """The ranks that the experts would lie on."""

    ranks: int
    nodes: int
    redundancy: int  # slots of a layer beyond one for each expert
    top_k: int
    expert_bytes: int


def import_counts(source: Path, group: Group, worker: str) -> tuple[Counts, list[int]]:
    """-> with the placement that a group starts with; layers that are left out since they have no rows. Raises
    SpecError, ClusterError."""
    load = _windows(*_read(source))
    used = load.any(axis=(0, 2))
    load = load[:, used]
    _refuse_unfit(group, *load.shape[1:])
    row = default_map(load.shape[2], group.redundancy, group.ranks).phy2log.numpy()
    phy2log = np.repeat(row, load.shape[1], axis=0)
    computed = np.stack([_computed(phy2log, window, group.ranks) for window in load])
    counts = Counts(
        load[:, None], computed, phy2log, group.nodes, group.top_k, group.expert_bytes, window_s=0.0, worker=worker
    )
    return counts, np.flatnonzero(~used).tolist()


def _computed(phy2log: Longs, window: Longs, ranks: int) -> Longs:
    """window [L, E], of which each rank has sent an equal part -> [L, R]."""
    sent = np.repeat(window[None] / ranks, ranks, axis=0)
    rows: Longs = np.rint(served(phy2log, sent).reshape(len(window), ranks, -1).sum(axis=2)).astype(np.int64)
    return rows


def _refuse_unfit(group: Group, layers: int, experts: int) -> None:
    ranks, slots = group.ranks, experts + group.redundancy
    if not 1 <= ranks <= MOST_RANKS:
        raise SpecError(f"--ranks {ranks}: 1 to {MOST_RANKS}")
    if not 1 <= group.top_k <= experts:
        raise SpecError(f"--top-k {group.top_k}: a token has 1 to {experts} of {experts} experts")
    least, most = -experts % ranks, experts * (ranks - 1)
    if slots % ranks or not 0 <= group.redundancy <= most:
        told = f"{least}, {least + ranks}, {least + 2 * ranks} ... at most {most}"
        raise SpecError(f"--redundancy {group.redundancy}: {experts} experts on {ranks} ranks take {told}")
    if group.nodes < 1 or ranks % group.nodes:
        raise SpecError(f"--nodes {group.nodes}: {ranks} ranks do not divide into as many")
    if experts > MOST_EXPERTS or ranks * layers * slots > MOST_CELLS:
        told = f"{layers} layers of {experts} experts in {slots} slots on {ranks} ranks are too many to weigh"
        raise SpecError(f"{told}: {MOST_EXPERTS} experts at most, and {MOST_CELLS:,} ranks * layers * slots")


def _read(source: Path) -> Read:
    """Raises SpecError for what has no counts, and says why; ClusterError if it cannot be reached."""
    suffix = source.suffix.lower()
    if suffix not in _READERS:
        raise SpecError(f"{source}: counts are read from files named {', '.join(_READERS)}")
    with reaching(source):
        if not source.is_file():  # also a pipe, which would be waited for
            raise SpecError(f"{source}: {'not a file' if source.exists() else 'there is no such file'}")
        size = source.stat().st_size
    if size > (most := MOST_TEXT if suffix == ".json" else MOST_BYTES):
        raise SpecError(f"{source}: {size:,} bytes, {most:,} at most; record fewer steps, or sum them")
    try:
        array, steps = _READERS[suffix](source)
        _check(array)
    except SpecError as error:
        raise SpecError(f"{source}: {error}") from error
    except Exception as error:  # what json, zipfile, numpy and torch raise for a damaged file has no common base
        raise SpecError(f"{source}: no {suffix} file that can be read, or a damaged one ({error!r:.120})") from error
    return array, steps


def _of_npy(source: Path) -> Read:
    found = np.load(source, allow_pickle=False)
    if not isinstance(found, np.ndarray):
        raise SpecError("several arrays, not one: save that of the counts by numpy.save")
    return found, False


def _of_json(source: Path) -> Read:
    found = json.loads(source.read_bytes())
    keyed = isinstance(found, dict)
    try:
        return np.asarray(_keyed(found) if keyed else found), keyed
    except ValueError as error:
        raise SpecError("its lists differ in length or depth, so they are no array") from error


def _of_pt(source: Path) -> Read:
    with zipfile.ZipFile(source) as file:  # which torch.save writes
        size = sum(info.file_size for info in file.infolist())
    if size > MOST_BYTES:
        raise SpecError(f"it unpacks to {size:,} bytes, {MOST_BYTES:,} at most; record fewer steps, or sum them")
    found = torch.load(source, map_location="cpu", weights_only=True)
    tensor = _keyed(found) if isinstance(found, dict) else found
    if not isinstance(tensor, torch.Tensor):
        raise SpecError(f"the counts are a {type(tensor).__name__}, not a tensor")
    return tensor.detach().numpy(), True


def _keyed(found: dict[Any, Any]) -> Any:
    if KEY in found:
        return found[KEY]
    hint = "; SGLang's recorder writes it in its modes stat and stat_approx" if "records" in found else ""
    raise SpecError(f"it has the keys {sorted(map(str, found))!s:.120}, and none is {KEY}{hint}")


_READERS: dict[str, Callable[[Path], Read]] = {".npy": _of_npy, ".json": _of_json, ".pt": _of_pt}


def _check(array: NDArray[Any]) -> None:
    if not array.size:
        raise SpecError(f"it is empty: {list(array.shape)}")
    if array.dtype.kind not in "iuf":
        raise SpecError(f"its values are {array.dtype}, not whole numbers")
    if array.ndim not in (2, 3):
        raise SpecError(f"it is {list(array.shape)}, and must be [layers, experts] or [windows, layers, experts]")
    if array.nbytes > MOST_BYTES:  # a damaged file may name any shape
        raise SpecError(f"an array of {array.nbytes:,} bytes, {MOST_BYTES:,} at most; record fewer steps, or sum them")
    if array.dtype.kind == "f":
        _refuse(~np.isfinite(array), array)
        _refuse(array != np.floor(array), array)
    _refuse(array < 0, array)
    rows = array.sum(dtype=np.float64)
    if not 0 < rows <= MOST_ROWS:
        raise SpecError(f"{rows:g} rows in all: nothing was counted" if not rows else f"over {MOST_ROWS:g} rows in all")


def _refuse(wrong: NDArray[np.bool_], array: NDArray[Any]) -> None:
    if wrong.any():
        at = tuple(int(each) for each in np.unravel_index(int(wrong.argmax()), wrong.shape))
        raise SpecError(f"{array[at]} at {list(at)}: counts are whole numbers of at least 0")


def _windows(array: NDArray[Any], steps: bool) -> Longs:
    """-> [W, L, E]; steps without rows are left out, the others summed into windows of about as many."""
    if array.ndim == 2:
        array = array[None]
    if not steps:
        return array.astype(np.int64)
    there = array[array.any(axis=(1, 2))]
    parts = np.array_split(there, min(MOST_WINDOWS, len(there)))
    return np.stack([part.sum(axis=0, dtype=np.float64) for part in parts]).astype(np.int64)  # exact up to MOST_ROWS
