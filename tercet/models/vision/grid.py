"""Where an image's patches are, in the order in which a tower has them: tile by tile, square by square of those that
become one token, row by row within a square. Pure.

N patches of an image   R, C rows and columns of patches of a tile
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tercet.models.vision.config import Grid

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


def coordinates(grid: Grid, merge: int) -> Ints:
    """-> [2, N], the row and the column of each patch."""
    tiles, rows, columns = grid
    row, column = np.mgrid[:rows, :columns].astype(np.int64)
    squares = (rows // merge, merge, columns // merge, merge)
    one = [axis.reshape(squares).swapaxes(1, 2).reshape(-1) for axis in (row, column)]
    return np.stack([np.tile(axis, tiles) for axis in one])


def tile_of(grid: Grid) -> Ints:
    """-> [N], the tile of each patch."""
    tiles, rows, columns = grid
    return np.repeat(np.arange(tiles), rows * columns)


def window_of(grid: Grid, merge: int, side: int) -> Ints:
    """-> [N], the window of each patch: squares of `side` patches from the upper left corner, smaller at the edges."""
    row, column = coordinates(grid, merge) // side
    across = -(-grid[2] // side)
    down = -(-grid[1] // side)
    windows: Ints = (tile_of(grid) * down + row) * across + column
    return windows


def groups(labels: Ints) -> list[Ints]:
    """Patches with equal labels attend to each other. -> [groups, patches of each], for every size of a group."""
    order = np.argsort(labels, kind="stable")
    _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    return [order[starts[sizes == size][:, None] + np.arange(size)] for size in np.unique(sizes)]


def nearest_positions(grid: Grid, merge: int, side: int) -> Ints:
    """-> [N], which of side * side learned positions is a patch's (NaViT's fractional positions, arXiv:2307.06304).
    In float32, as transformers has it: its rounding decides where two are equally near."""
    bounds = np.arange(1 / side, 1.0, 1 / side).astype(np.float32)

    def nearest(at: Ints, count: int) -> Ints:
        fraction = at.astype(np.float32) * (np.float32(1) / np.float32(count))
        index: Ints = np.searchsorted(bounds, np.minimum(fraction, np.float32(1 - 1e-6)), side="right")
        return index

    row, column = coordinates(grid, merge)
    return nearest(row, grid[1]) * side + nearest(column, grid[2])


def interpolated_positions(grid: Grid, merge: int, side: int) -> tuple[Ints, Floats]:
    """-> [N, 4] learned positions and their weights: bilinear, the corners of both squares on each other."""
    row, column = coordinates(grid, merge)
    row_taps, row_weights = _taps(row, grid[1], side)
    column_taps, column_weights = _taps(column, grid[2], side)
    taps = (row_taps[:, :, None] * side + column_taps[:, None]).reshape(-1, 4)
    return taps, (row_weights[:, :, None] * column_weights[:, None]).reshape(-1, 4)


def _taps(at: Ints, count: int, side: int) -> tuple[Ints, Floats]:
    where = at.astype(np.float32) * np.float32(side - 1) / np.float32(max(count - 1, 1))
    lower = np.floor(where)
    taps = np.stack([lower, lower + 1], 1).astype(np.int64)
    share = where - lower
    return taps.clip(0, side - 1), np.stack([1 - share, share], 1)


@dataclass(frozen=True)
class ImageSpan:
    """Where an image stands in a prompt."""

    start: int  # its first token
    grid: Grid


def rope_positions(length: int, images: Iterable[ImageSpan], merge: int) -> Ints:
    """M-RoPE (arXiv:2409.12191): -> [3, length], time, row and column of each token. A text's token has one number for
    all three; an image takes as many numbers as its longer side has tokens.

    The token behind the last one has the largest number + 1."""
    pieces, done, number = [], 0, 0
    for image in images:
        tiles, rows, columns = image.grid[0], image.grid[1] // merge, image.grid[2] // merge
        text = number + np.arange(image.start - done)
        time, row, column = np.mgrid[:tiles, :rows, :columns].reshape(3, -1)
        number += len(text)
        pieces += [np.stack([text] * 3), number + np.stack([time, row, column])]
        number, done = number + max(rows, columns), image.start + tiles * rows * columns
    pieces.append(np.stack([number + np.arange(length - done)] * 3))
    return np.concatenate(pieces, 1).astype(np.int64)
