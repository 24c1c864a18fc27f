"""Many runs of bytes from one memory to another, in one launch: to ask the driver for each run takes the host several
microseconds, in which the GPU moves a megabyte.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

PIECE = 1 << 15  # bytes of a program
TILE = 1024  # words at a time
WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}

Runs = Sequence[tuple[int, int, int]]  # offset in the source, offset in the target, bytes


@triton.jit
def _copy(pieces, WORD: tl.constexpr, TILE: tl.constexpr):
    piece = pieces + tl.program_id(0).to(tl.int64) * 3
    source = tl.load(piece).to(tl.pointer_type(WORD))
    target = tl.load(piece + 1).to(tl.pointer_type(WORD))
    words = tl.load(piece + 2)
    for start in tl.range(0, words, TILE, num_stages=3):
        at = start + tl.arange(0, TILE)
        here = at < words
        tl.store(target + at, tl.load(source + at, mask=here), mask=here)


def copy_runs(target: int, source: int, runs: Runs, device: torch.device) -> None:
    """target, source: addresses that the device reaches; the runs must not overlap. On torch's current stream, and
    nothing waits."""
    if not runs:
        return
    table = np.array(runs, dtype=np.int64) + np.array([source, target, 0])
    word = next(size for size in WORDS if not (np.bitwise_or.reduce(table, axis=None) % size))
    pieces = torch.from_numpy(_cut(table))
    pieces[:, 2] //= word
    if device.type == "cuda":  # else the host would wait for all that the stream was asked for before
        pieces = pieces.pin_memory()
    _copy[(len(pieces),)](pieces.to(device, non_blocking=True), WORD=WORDS[word], TILE=TILE)


def _cut(runs: NDArray[np.int64]) -> NDArray[np.int64]:
    """[runs, 3] -> [pieces, 3], none of them longer than PIECE."""
    counts = -(-runs[:, 2] // PIECE)
    of = np.repeat(np.arange(len(runs)), counts)
    offset = (np.arange(len(of)) - np.repeat(counts.cumsum() - counts, counts)) * PIECE
    size = np.minimum(runs[of, 2] - offset, PIECE)
    return np.stack((runs[of, 0] + offset, runs[of, 1] + offset, size), axis=1)
