"""How a worker's KV cache lies in memory, and which bytes go where when blocks move between two of them.

Shapes: a cache is `[layers, blocks, 2, block_size, kv_heads, head_dim]`, C order, 2 = key, value. So one block of one
layer is one contiguous run of bytes, and neighbouring blocks of a layer are neighbours in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tercet.errors import PeerMismatch


@dataclass(frozen=True)
class KvLayout:
    layers: int
    blocks: int
    block_size: int  # tokens
    kv_heads: int
    head_dim: int
    dtype: str  # float32, bfloat16
    itemsize: int  # bytes of one element

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        return (self.layers, self.blocks, 2, self.block_size, self.kv_heads, self.head_dim)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one layer."""
        return 2 * self.block_size * self.kv_heads * self.head_dim * self.itemsize

    @property
    def total_bytes(self) -> int:
        return self.layers * self.blocks * self.block_bytes

    def offset(self, layer: int, block: int) -> int:
        return (layer * self.blocks + block) * self.block_bytes

    def require_same_blocks(self, other: KvLayout) -> None:
        """Raises PeerMismatch naming the first field in which a block of `other` differs from ours."""
        for field in ("layers", "block_size", "kv_heads", "head_dim", "dtype"):
            ours, theirs = getattr(self, field), getattr(other, field)
            if ours != theirs:
                raise PeerMismatch(f"KV layouts differ: {field} is {ours} here and {theirs} at the peer")


@dataclass(frozen=True)
class Run:
    """`length` bytes from offset `src` of the source cache to offset `dst` of the destination cache."""

    src: int
    dst: int
    length: int


def plan(src: KvLayout, dst: KvLayout, layer: int, blocks: Sequence[tuple[int, int]]) -> list[Run]:
    """Runs that move `blocks` [(source block, destination block)] of one layer; what is adjacent on both sides is
    one run. Both layouts must have the same block bytes (`require_same_blocks`)."""
    size = src.block_bytes
    runs: list[Run] = []
    for source, destination in blocks:
        step = Run(src.offset(layer, source), dst.offset(layer, destination), size)
        if runs and runs[-1].src + runs[-1].length == step.src and runs[-1].dst + runs[-1].length == step.dst:
            runs[-1] = Run(runs[-1].src, runs[-1].dst, runs[-1].length + size)
        else:
            runs.append(step)
    return runs


def spans(layout: KvLayout, layer: int, blocks: Sequence[int]) -> list[tuple[int, int]]:
    """(offset, length) of `blocks` of one layer in one cache, adjacent ones merged, in order."""
    return [(run.src, run.length) for run in plan(layout, layout, layer, [(b, b) for b in blocks])]
