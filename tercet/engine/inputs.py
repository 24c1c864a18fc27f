"""A plan as arrays, and their way to the device on which it is computed: all of a step's in one copy, from pinned
memory, which nobody waits for.

T rows of the batch   D decodes, the first rows   N prefill chunks
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate, chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tercet.engine.plan import Piece, StepPlan
from tercet.models.batch import ImageRows, PrefillChunk, StepBatch

Array = npt.NDArray[np.generic]
ALIGNMENT = 16  # bytes, of each array in the copy
INT64, INT32, FLOAT32 = np.dtype(np.int64), np.dtype(np.int32), np.dtype(np.float32)
TORCH_TYPES = {INT64: torch.int64, INT32: torch.int32, FLOAT32: torch.float32}


class Arrays:
    """What a step needs on its device. `add` says under which number `views` has it there."""

    def __init__(self) -> None:
        self.arrays: list[Array] = []

    def add(self, values: npt.ArrayLike, dtype: np.dtype[np.generic] = INT64) -> int:
        self.arrays.append(np.ascontiguousarray(values, dtype))
        return len(self.arrays) - 1

    def packed(self, *, pin: bool = False) -> Tensor:
        """All of them behind each other, [bytes] uint8, in host memory. pin: where a copy to a device needs no waiting;
        torch keeps it from reuse until such copies have ended."""
        *starts, end = self._starts()
        buffer = torch.empty(end, dtype=torch.uint8, pin_memory=pin)
        view = buffer.numpy()
        for start, array in zip(starts, self.arrays, strict=True):
            view[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        return buffer

    def views(self, packed: Tensor) -> list[Tensor]:
        """The arrays in what `packed` has made, or in a copy of it."""
        views = []
        for start, array in zip(self._starts(), self.arrays, strict=False):
            views.append(packed[start : start + array.nbytes].view(TORCH_TYPES[array.dtype]).view(array.shape))
        return views

    def _starts(self) -> list[int]:
        """Where each one begins, and where the last one ends."""
        starts = [0]
        for array in self.arrays:
            starts.append(-(-(starts[-1] + array.nbytes) // ALIGNMENT) * ALIGNMENT)
        return starts


class BatchInputs:
    """A plan's `StepBatch`. Its logit rows are those of the pieces that draw, in order."""

    def __init__(self, arrays: Arrays, plan: StepPlan, block_size: int, rows: int = 0, width: int = 0) -> None:
        """rows, width: of the decodes and their block tables, at least; rows that the plan does not fill have no
        context, and write no KV."""
        decodes, chunks = plan.decodes, plan.chunks
        rows = max(rows, len(decodes))
        padding = [0] * (rows - len(decodes))
        tables = np.zeros((rows, max([width, *(len(piece.blocks) for piece in decodes)])), np.int64)
        for row, piece in enumerate(decodes):
            tables[row, : len(piece.blocks)] = piece.blocks
        starts = [*accumulate((len(piece.token_ids) for piece in chunks), initial=rows)]
        self._token_ids = arrays.add([*_each(decodes, _token_ids), *padding, *_each(chunks, _token_ids)])
        self._positions = arrays.add(_positions_of(decodes, padding, chunks))
        rows_before = zip(plan.pieces, [*range(len(decodes)), *starts], strict=False)
        seen = [range(first + s.row, first + s.row + s.tokens) for piece, first in rows_before for s in piece.seen]
        self._image_rows = arrays.add([*chain.from_iterable(seen)]) if seen else None
        slots = partial(_slots, block_size)
        self._slots = arrays.add([*_each(decodes, slots), *(-1 for _ in padding), *_each(chunks, slots)])
        self._tables = arrays.add(tables)
        self._contexts = arrays.add([*(piece.end for piece in decodes), *padding])
        drawing = [end - 1 for piece, end in zip(chunks, starts[1:], strict=True) if piece.draw is not None]
        self._logit_rows = arrays.add([*range(rows), *drawing])
        self._bounds = arrays.add([*starts, *(piece.end for piece in chunks)])
        self._chunk_tables = [arrays.add(piece.blocks) for piece in chunks]
        self._chunks, self._starts, self._num_decodes = chunks, starts, rows
        self._drawn: int | None = None
        if any(piece.drawn >= 0 for piece in decodes):
            self._drawn = arrays.add([*(piece.drawn for piece in decodes), *(-1 for _ in padding)])

    def batch(
        self, landed: Sequence[Tensor], before: Tensor | None = None, embeddings: Tensor | None = None
    ) -> StepBatch:
        """landed: the arrays on their device. before: what the step before draws there, [R] int64. embeddings: of all
        tokens of images, in the order of the pieces and of what each has seen, [levels, M, E]."""
        images = None
        if self._image_rows is not None:
            assert embeddings is not None, "a plan has images whose embeddings are not here"
            images = ImageRows(landed[self._image_rows], embeddings)
        if self._drawn is not None:
            assert before is not None, "a plan takes tokens of a step that drew none"
            _fill(landed[self._token_ids][: self._num_decodes], before, landed[self._drawn])
        return StepBatch(
            token_ids=landed[self._token_ids],
            positions=landed[self._positions],
            slots=landed[self._slots],
            num_decodes=self._num_decodes,
            decode_block_tables=landed[self._tables],
            decode_context_lens=landed[self._contexts],
            chunks=tuple(
                PrefillChunk(start, len(piece.token_ids), piece.end, landed[table])
                for piece, start, table in zip(self._chunks, self._starts, self._chunk_tables, strict=False)
            ),
            logit_rows=landed[self._logit_rows],
            chunk_bounds=landed[self._bounds],
            images=images,
        )


def _positions_of(decodes: Sequence[Piece], padding: Sequence[int], chunks: Sequence[Piece]) -> list[Any]:
    """[T], or [3, T] if a piece has three numbers for each token."""
    if not any(piece.positions for piece in chunks):
        return [*_each(decodes, _positions), *padding, *_each(chunks, _positions)]
    axes = []
    for axis in range(3):
        given = [piece.positions[axis] if piece.positions else _positions(piece) for piece in chunks]
        axes.append([*_each(decodes, _positions), *padding, *chain.from_iterable(given)])
    return axes


def _each(pieces: Sequence[Piece], values: Callable[[Piece], Iterable[int]]) -> Iterator[int]:
    return chain.from_iterable(map(values, pieces))


def _token_ids(piece: Piece) -> Sequence[int]:
    return piece.token_ids


def _positions(piece: Piece) -> Sequence[int]:
    return range(piece.start + piece.shift, piece.end + piece.shift)


def _slots(block_size: int, piece: Piece) -> list[int]:
    blocks = piece.blocks
    return [blocks[p // block_size] * block_size + p % block_size for p in range(piece.start, piece.end)]


def _fill(token_ids: Tensor, before: Tensor, drawn: Tensor) -> None:
    """Row r becomes the token of draw drawn[r], where that is one. A draw that failed has the token -1: its sequence is
    over, so that any id will do."""
    taken = before[drawn.clamp(min=0)].clamp_(min=0)
    token_ids.copy_(torch.where(drawn >= 0, taken, token_ids))
