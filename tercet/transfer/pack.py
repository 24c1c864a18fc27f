"""Units of KV between a cache and one contiguous buffer, by numpy; and the declared, lossy change of dtype.

Packed shape: [units, heads, parts, unit tokens, row bytes], whatever the cache's order, block size or tensor-parallel
degree. So a packed buffer is what a *contiguous send* moves (P/D-Serve, section 3.5: pages are gathered into one
buffer, sent once and scattered at the receiver), and what a digest is taken of (digest.py).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tercet.transfer.layout import KvLayout, Pair, Units

Bytes = NDArray[np.uint8]
Memory = memoryview

# A layer's cache with a unit axis -> [blocks, units of a block, heads, parts, unit tokens]. An element is a whole row:
# numpy then copies it by one memcpy, ten times as fast as byte by byte.
_AXES = {"NHD": (0, 2, 4, 1, 3), "HND": (0, 3, 2, 1, 4)}


def packed_shape(pair: Pair, count: int) -> tuple[int, int, int, int, int]:
    """Of `count` units of one layer, in the destination's dtype."""
    return (count, len(pair.heads), pair.dst.parts, pair.unit, pair.dst.row_bytes)


def gather(
    layout: KvLayout, memory: Memory, layer: int, units: Units, unit: int, heads: range, out: Bytes | None = None
) -> Bytes:
    """Copy `heads` of the units out of a cache, into `out` if it is given."""
    cells = _cells(layout, memory, layer, unit, heads)
    if out is None:
        out = np.empty((units.count, *cells.shape[2:], layout.row_bytes), dtype=np.uint8)
    rows = _rows(out, layout)
    for number, place in enumerate(_places(layout, units, unit)):
        rows[number] = cells[place]
    return out


def scatter(layout: KvLayout, memory: Memory, layer: int, units: Units, unit: int, heads: range, packed: Bytes) -> None:
    """Copy a packed buffer into a cache."""
    cells = _cells(layout, memory, layer, unit, heads)
    rows = _rows(packed, layout)
    for number, place in enumerate(_places(layout, units, unit)):
        cells[place] = rows[number]


def zero(layout: KvLayout, memory: Memory, layer: int, units: Units, unit: int) -> None:
    """Overwrite units that no token will be written to: nothing of an earlier owner of a block may be read from it."""
    cells = _cells(layout, memory, layer, unit, layout.heads)
    for place in _places(layout, units, unit):
        cells[place] = np.zeros((), dtype=cells.dtype)


def convert(pair: Pair, packed: Bytes) -> Bytes:
    """Rows of the source's dtype to the destination's. float8 saturates, int8 is value / scale, rounded."""
    import torch  # only a change of dtype needs it, and a process without it starts seconds sooner

    src, dst = (getattr(torch, layout.dtype) for layout in (pair.src, pair.dst))
    values = torch.from_numpy(packed).view(src).float() * (pair.src.scale if src is torch.int8 else 1.0)
    if dst is torch.int8:
        values = (values / pair.dst.scale).round().clamp(-127, 127)
    elif dst is torch.float8_e4m3fn:
        values = values.clamp(-448, 448)
    return values.to(dst).view(torch.uint8).numpy()


def _cells(layout: KvLayout, memory: Memory, layer: int, unit: int, heads: range) -> NDArray[np.void]:
    """One layer's share of `heads`, seen as [blocks, units of a block, heads, parts, unit tokens] of rows."""
    per_block, held = layout.block_size // unit, len(layout.heads)
    start = layout.offset(layer, 0)
    rows = layout.blocks * layout.block_bytes // layout.row_bytes
    flat = np.frombuffer(memory, dtype=f"V{layout.row_bytes}", count=rows, offset=start)
    inner = (per_block, unit, held) if layout.order == "NHD" else (held, per_block, unit)
    cells = flat.reshape(layout.blocks, layout.parts, *inner).transpose(_AXES[layout.order])
    return cells[:, :, heads.start - layout.heads.start : heads.stop - layout.heads.start]


def _rows(packed: Bytes, layout: KvLayout) -> NDArray[np.void]:
    """A packed buffer seen as rows: [units, heads, parts, unit tokens]."""
    return packed.view(f"V{layout.row_bytes}")[..., 0]


def _places(layout: KvLayout, units: Units, unit: int) -> list[tuple[int, int]]:
    blocks, subs = units.places(layout.block_size // unit)
    return list(zip(blocks.tolist(), subs.tolist(), strict=True))
