"""How a worker's KV cache lies in memory, and which bytes go where when KV moves between two of them.

A cache holds some layers (a pipeline stage's window) and some KV heads (a tensor-parallel rank's share) of one model:

    NHD  [layers, blocks, parts, block_size, heads, head_dim]
    HND  [layers, blocks, parts, heads, block_size, head_dim]

C order; parts = 2: key and value; 1: the compressed latent of MLA, which is one "head" that every rank holds. KV moves
in *units*: as many tokens as the greatest common divisor of the two block sizes, so that a unit lies within one block
on both sides. Unit n of a prompt is its tokens n * unit ... (n + 1) * unit - 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tercet.errors import PeerMismatch

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "int8": 1}
MODEL_FIELDS = ("model_layers", "kv_heads", "head_dim", "parts")  # equal in all workers of a model


@dataclass(frozen=True)
class KvLayout:
    layers: int  # held here
    blocks: int
    block_size: int  # tokens
    kv_heads: int  # of the whole model
    head_dim: int
    dtype: str
    order: str = "NHD"
    parts: int = 2
    tp_size: int = 1
    tp_rank: int = 0
    first_layer: int = 0
    model_layers: int = 0  # 0: as many as are held here
    scale: float = 1.0  # int8: value = stored * scale

    def __post_init__(self) -> None:
        object.__setattr__(self, "model_layers", self.model_layers or self.layers)
        sizes = (self.layers, self.blocks, self.block_size, self.kv_heads, self.head_dim, self.parts, self.tp_size)
        if min(sizes) < 1 or self.dtype not in ITEMSIZE or self.order not in ("NHD", "HND") or not self.scale > 0:
            raise PeerMismatch(f"no KV layout: {self}")
        if not (0 <= self.tp_rank < self.tp_size and 0 <= self.first_layer <= self.model_layers - self.layers):
            raise PeerMismatch(f"no KV layout: {self}")

    @cached_property
    def heads(self) -> range:
        """The model's KV heads that are held here. With fewer heads than ranks, a head has several holders."""
        return heads_at(self.kv_heads, self.tp_rank, self.tp_size)

    @cached_property
    def window(self) -> range:
        """The model's layers that are held here."""
        return range(self.first_layer, self.first_layer + self.layers)

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one token of one head of one part."""
        return self.head_dim * ITEMSIZE[self.dtype]

    @cached_property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        inner = (self.block_size, len(self.heads)) if self.order == "NHD" else (len(self.heads), self.block_size)
        return (self.layers, self.blocks, self.parts, *inner, self.head_dim)

    @cached_property
    def token_bytes(self) -> int:
        """Bytes from a row to the same head's row of the next token."""
        return self.row_bytes * (len(self.heads) if self.order == "NHD" else 1)

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of one block of one layer."""
        return self.parts * self.block_size * len(self.heads) * self.row_bytes

    @cached_property
    def layer_bytes(self) -> int:
        return self.blocks * self.block_bytes

    @cached_property
    def total_bytes(self) -> int:
        return self.layers * self.layer_bytes

    def offset(self, layer: int, block: int, part: int = 0, head: int = 0, token: int = 0) -> int:
        """Byte at which a row begins; `layer` and `head` count those of the model. A block begins at its first row."""
        heads = len(self.heads)
        row = token * heads + head if self.order == "NHD" else head * self.block_size + token
        start = ((layer - self.first_layer) * self.blocks + block) * self.block_bytes
        return start + (part * self.block_size * heads + row) * self.row_bytes


def heads_at(count: int, rank: int, ranks: int) -> range:
    """Of a model's KV heads. With fewer of them than ranks, a head has several holders."""
    first = rank * count // ranks
    return range(first, max(first + 1, (rank + 1) * count // ranks))


def window(layers: int, stage: int, stages: int) -> range:
    """A stage's layers; the first stages have one more if they do not divide."""
    each, more = divmod(layers, stages)
    first = stage * each + min(stage, more)
    return range(first, first + each + (stage < more))


Run = tuple[int, int, int]  # offset in the source cache, offset in the destination cache, bytes


@dataclass(frozen=True)
class Units:
    """Consecutive units of a prompt in one cache: `blocks` holds them, from unit `skip` of its first block on."""

    blocks: Sequence[int]
    skip: int
    count: int

    def places(self, per_block: int) -> tuple[np.ndarray, np.ndarray]:
        """-> (block, unit within it) of each unit; `per_block` units make a block."""
        at = np.arange(self.skip, self.skip + self.count)
        return np.asarray(self.blocks, dtype=np.intp)[at // per_block], at % per_block


@dataclass(frozen=True)
class Pair:
    """A source and a destination layout: which layers, heads and bytes move. Raises PeerMismatch if none can."""

    src: KvLayout
    dst: KvLayout
    convert: bool = False  # a lossy change of dtype is allowed

    def __post_init__(self) -> None:
        src, dst = self.src, self.dst
        wrong = [f for f in MODEL_FIELDS if getattr(src, f) != getattr(dst, f)]
        if (src.dtype, src.scale) != (dst.dtype, dst.scale) and not self.convert:
            wrong.append("dtype" if src.dtype != dst.dtype else "scale")
        if wrong:
            ours, theirs = getattr(src, wrong[0]), getattr(dst, wrong[0])
            raise PeerMismatch(f"KV layouts differ: {wrong[0]} is {ours} at the source, {theirs} at the destination")
        if not self.layers or not self.heads:
            raise PeerMismatch(f"the source holds no layer or head that the destination needs: {src} and {dst}")

    @cached_property
    def unit(self) -> int:
        """Tokens of a unit."""
        return math.gcd(self.src.block_size, self.dst.block_size)

    @cached_property
    def layers(self) -> range:
        """Layers that both hold."""
        src, dst = self.src.window, self.dst.window
        return range(max(src.start, dst.start), min(src.stop, dst.stop))

    @cached_property
    def heads(self) -> range:
        """Heads that go from this source to this destination: those that both hold, each from one of its holders."""
        src, dst = self.src.heads, self.dst.heads
        common = range(max(src.start, dst.start), min(src.stop, dst.stop))
        sent = [head for head in common if self._sender(head) == self.src.tp_rank]
        return range(sent[0], sent[-1] + 1) if sent else range(0)

    def _sender(self, head: int) -> int:
        """Which of the source ranks that hold `head` sends it to this destination; the replicas take turns."""
        size, heads = self.src.tp_size, self.src.kv_heads
        if size <= heads:
            return next(r for r in range(size) if (r + 1) * heads // size > head)
        holders = [r for r in range(size) if r * heads // size == head]
        return holders[self.dst.tp_rank % len(holders)]

    @cached_property
    def unit_bytes(self) -> int:
        """Bytes of one unit of one layer, as the destination keeps them."""
        return self.dst.parts * self.unit * len(self.heads) * self.dst.row_bytes

    @cached_property
    def pattern(self) -> NDArray[np.int64]:
        """[3, runs]: the runs of one unit, counted from where it begins in either cache, in the destination's order."""
        a, b, layer = self.src, self.dst, self.layers.start
        steps = [
            (
                a.offset(layer, 0, part, head - a.heads.start, token) - a.offset(layer, 0),
                b.offset(layer, 0, part, head - b.heads.start, token) - b.offset(layer, 0),
                a.row_bytes,
            )
            for part in range(b.parts)
            for head, token in _rows(b.order, self.heads, range(self.unit))
        ]
        return _merged(np.array(steps, dtype=np.int64).T)

    @cached_property
    def run_bytes(self) -> float:
        """Mean length of a unit's runs, before those of neighbouring units are joined."""
        return self.unit_bytes / int(self.pattern.shape[1])

    @cached_property
    def streamed(self) -> Pair:
        """The pair as the receiving end of a stream sees it: the source has one block for each of the units."""
        return replace(self, src=replace(self.src, block_size=self.unit, blocks=self.dst.blocks * self.dst.block_size))

    @cached_property
    def converts(self) -> bool:
        return (self.src.dtype, self.src.scale) != (self.dst.dtype, self.dst.scale)


def runs_of(pair: Pair, layers: range, src: Units, dst: Units) -> list[Run]:
    """Runs that move the units `src` of the layers to `dst`, in the order of layers, units, then of the destination's
    memory; runs that are adjacent on both sides are joined."""
    assert src.count == dst.count
    assert not pair.converts, "bytes of another dtype cannot be copied"
    sides = (pair.src, src), (pair.dst, dst)
    begins = np.zeros((3, src.count), dtype=np.int64)
    for row, (side, units) in enumerate(sides):
        blocks, subs = units.places(side.block_size // pair.unit)
        begins[row] = side.offset(layers.start, 0) + blocks * side.block_bytes + subs * (pair.unit * side.token_bytes)
    runs = _merged((begins[:, :, None] + pair.pattern[:, None, :]).reshape(3, -1))
    strides = np.array([pair.src.layer_bytes, pair.dst.layer_bytes, 0])  # every layer has the same layout
    every = runs[:, None, :] + (strides[:, None] * np.arange(len(layers)))[:, :, None]
    return list(zip(*every.reshape(3, -1).tolist(), strict=True))


def _merged(runs: NDArray[np.int64]) -> NDArray[np.int64]:
    """[3, runs], those that are adjacent on both sides joined."""
    if runs.shape[1] == 1:
        return runs
    apart = (runs[:2, :-1] + runs[2, :-1] != runs[:2, 1:]).any(axis=0)
    first = np.concatenate(([0], np.flatnonzero(apart) + 1))
    merged = runs[:, first]
    merged[2] = np.add.reduceat(runs[2], first)
    return merged


def _rows(order: str, heads: range, tokens: range) -> Iterator[tuple[int, int]]:
    """(head, token) of every row of a part of a unit, in the order of a cache."""
    if order == "NHD":
        return ((head, token) for token in tokens for head in heads)
    return ((head, token) for head in heads for token in tokens)
