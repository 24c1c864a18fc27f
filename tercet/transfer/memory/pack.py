"""Units of KV between a cache and one contiguous buffer, by numpy; and the lossy change of dtype, if allowed.

Packed shape: [layers, units, heads, parts, unit tokens, row bytes], whatever the cache's order, block size or
tensor-parallel degree. So a packed buffer is what a *contiguous send* moves (P/D-Serve, section 3.5: pages are gathered
into one buffer, sent once and scattered at the receiver), and what a digest is taken of (digest.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tercet.transfer.memory.layout import KvLayout, Pair, Units

Bytes = NDArray[np.uint8]
Memory = memoryview

# A cache with a unit axis -> [layers, blocks, units of a block, heads, parts, unit tokens]. An element is a whole row:
# numpy then copies it by one memcpy, ten times as fast as byte by byte.
_AXES = {"NHD": (0, 1, 3, 5, 2, 4), "HND": (0, 1, 4, 3, 2, 5)}


class Scratch:
    """A buffer that grows and is used again: fresh memory would cost a page fault every 4 KiB. For one thread."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, dtype=np.uint8)

    def take(self, shape: tuple[int, ...]) -> Bytes:
        """An uninitialised array, valid until the next `take`."""
        num_bytes = math.prod(shape)
        if self._buffer.size < num_bytes:
            self._buffer = np.empty(num_bytes, dtype=np.uint8)
        return self._buffer[:num_bytes].reshape(shape)


class Cells:
    """Some units, of some layers and heads, in one cache."""

    def __init__(
        self, layout: KvLayout, memory: Memory, layers: range, units: Units, unit: int, heads: range | None = None
    ) -> None:
        """unit: tokens of one. heads: numbers in the model; by default all that the cache holds."""
        self._layout, self._memory, self._layers, self._units, self._unit = layout, memory, layers, units, unit
        self._heads = heads or layout.heads
        self._first_head = self._heads.start - layout.heads.start
        self._per_block = layout.block_size // unit
        self._start = layout.offset(layers.start, 0)

    def gather(self, scratch: Scratch, first: int = 0, count: int | None = None) -> Bytes:
        """A packed copy of the units, or of `count` of them from `first` on."""
        places = self._places[first:][:count]
        packed = self.packed(scratch, len(places))
        rows = _rows(packed)
        for number, (block, sub) in enumerate(places):
            rows[:, number] = self._rows[:, block, sub]
        return packed

    def packed(self, scratch: Scratch, count: int | None = None) -> Bytes:
        """Room for the packed units, or for `count` of them."""
        layers, _, _, *inner = self._rows.shape
        units = self._units.count if count is None else count
        return scratch.take((layers, units, *inner, self._layout.row_bytes))

    def scatter(self, packed: Bytes) -> None:
        """Fill the units from a packed buffer."""
        rows = _rows(packed)
        for number, (block, sub) in enumerate(self._places):
            self._rows[:, block, sub] = rows[:, number]

    def zero(self) -> None:
        """Zero units that hold no token of this prompt, so that no KV of a block's earlier owner can be read."""
        for block, sub in self._places:
            self._rows[:, block, sub] = np.zeros((), dtype=self._rows.dtype)

    @cached_property
    def _rows(self) -> NDArray[np.void]:
        """All units of the layers and heads: [layers, blocks, units of a block, heads, parts, unit tokens]."""
        layout, held = self._layout, len(self._layout.heads)
        inner = (self._per_block, self._unit, held) if layout.order == "NHD" else (held, self._per_block, self._unit)
        shape = (len(self._layers), layout.blocks, layout.parts, *inner)
        flat = np.frombuffer(self._memory, dtype=f"V{layout.row_bytes}", count=math.prod(shape), offset=self._start)
        rows = flat.reshape(shape).transpose(_AXES[layout.order])
        return rows[:, :, :, self._first_head : self._first_head + len(self._heads)]

    @cached_property
    def contiguous(self) -> bool:
        """Whether the bytes of a (layer, unit, head) lie in the cache as in a packed buffer."""
        return bool(self._rows[0, 0, 0].flags.c_contiguous)

    def pieces(self) -> Iterator[Memory]:
        """The bytes of each (layer, unit, head) where they lie."""
        assert self.contiguous
        layers, _, _, heads, *inner = self._rows.shape
        blocks, subs = self._units.places(self._per_block)
        per_layer, per_block, per_sub, per_head = self._rows.strides[:4]
        layer, unit = np.ix_(np.arange(layers) * per_layer, blocks * per_block + subs * per_sub + self._start)
        starts = (layer + unit)[..., None] + (np.arange(heads) + self._first_head) * per_head
        size = math.prod(inner) * self._layout.row_bytes
        return (self._memory[at : at + size] for at in starts.ravel().tolist())

    @cached_property
    def _places(self) -> list[tuple[int, int]]:
        blocks, subs = self._units.places(self._per_block)
        return list(zip(blocks.tolist(), subs.tolist(), strict=True))


def pieces_of(packed: Bytes) -> Iterator[Memory]:
    """The bytes of each (layer, unit, head) of a packed buffer."""
    flat, size = packed.reshape(-1).data, math.prod(packed.shape[3:])
    return (flat[at : at + size] for at in range(0, packed.nbytes, size))


def convert(pair: Pair, packed: Bytes) -> Bytes:
    """Convert rows from the source's dtype to the destination's. float8 saturates, int8 is value / scale, rounded."""
    import torch  # only a change of dtype needs it, and a process without it starts seconds sooner

    src, dst = (getattr(torch, layout.dtype) for layout in (pair.src, pair.dst))
    values = torch.from_numpy(packed).view(src).float() * (pair.src.scale if src is torch.int8 else 1.0)
    if dst is torch.int8:
        values = (values / pair.dst.scale).round().clamp(-127, 127)
    elif dst is torch.float8_e4m3fn:
        values = values.clamp(-448, 448)
    return values.to(dst).view(torch.uint8).numpy()


def _rows(packed: Bytes) -> NDArray[np.void]:
    """A packed buffer seen as rows: [layers, units, heads, parts, unit tokens]."""
    return packed.view(f"V{packed.shape[-1]}")[..., 0]
