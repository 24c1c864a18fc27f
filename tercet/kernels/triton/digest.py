"""Digests of KV where it lies in a GPU's memory: one program for each (layer, unit, head).

The function, and the names of the axes: kernels/digest.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tercet.kernels import digest

GAMMA = tl.constexpr(digest.GAMMA)
MIX_1 = tl.constexpr(digest.MIX[0])
MIX_2 = tl.constexpr(digest.MIX[1])
SHIFT = tl.constexpr(digest.SHIFT)
TILE = 1024  # words at a time


@triton.jit
def _mix(x):
    x = (x ^ (x >> SHIFT)) * MIX_1
    x = (x ^ (x >> SHIFT)) * MIX_2
    return x ^ (x >> SHIFT)


# Numbers that differ from call to call must not make another kernel: it would be compiled in the midst of a transfer.
@triton.jit(
    do_not_specialize=["first_layer", "first_unit", "first_head", "units", "heads"],
    do_not_specialize_on_alignment=["blocks", "subs"],
)
def _digest(
    rows,
    layer_stride,
    block_stride,
    sub_stride,
    head_stride,
    part_stride,
    token_stride,
    blocks,
    subs,
    first_layer,
    first_unit,
    first_head,
    units,
    heads,
    digests,
    PARTS: tl.constexpr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    head = program % heads
    unit = program // heads % units
    layer = program // heads // units
    block = tl.load(blocks + unit).to(tl.int64)
    sub = tl.load(subs + unit).to(tl.int64)
    place = rows + layer * layer_stride + block * block_stride + sub * sub_stride + head * head_stride
    seed = _mix((((layer + first_layer) << 48) ^ ((head + first_head) << 32) ^ (unit + first_unit)).to(tl.uint64))
    total = tl.zeros([TILE], dtype=tl.uint64)
    for start in range(0, PARTS * TOKENS * WORDS, TILE):
        at = start + tl.arange(0, TILE)
        inside = at < PARTS * TOKENS * WORDS
        row = at // WORDS
        offset = (row // TOKENS).to(tl.int64) * part_stride + (row % TOKENS).to(tl.int64) * token_stride + at % WORDS
        word = tl.load(place + offset, mask=inside, other=0).to(tl.int64).to(tl.uint64)
        mixed = _mix(word ^ (seed + at.to(tl.uint64) * GAMMA))
        total += tl.where(inside, mixed, tl.zeros([TILE], dtype=tl.uint64))
    tl.store(digests + program, _mix(seed ^ tl.sum(total, 0)).to(tl.int64))


def unit_digests(rows: Tensor, blocks: Tensor, subs: Tensor, first: tuple[int, int, int]) -> Tensor:
    """-> int64 [layers, units, heads]; see kernels/digest.py."""
    layers, _, _, heads, parts, tokens, words = rows.shape
    if words and rows.stride(-1) != 1:
        raise ValueError(f"the words of a row are {rows.stride(-1)} apart")
    digests = torch.empty(layers, len(blocks), heads, dtype=torch.int64, device=rows.device)
    if digests.numel():
        tile = min(TILE, triton.next_power_of_2(max(1, parts * tokens * words)))
        _digest[(digests.numel(),)](
            rows,
            *rows.stride()[:-1],
            blocks,
            subs,
            *first,
            len(blocks),
            heads,
            digests,
            PARTS=parts,
            TOKENS=tokens,
            WORDS=words,
            TILE=tile,
        )
    return digests
