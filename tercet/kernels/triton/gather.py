"""Some heads of some blocks of a paged cache, to a contiguous tensor and back: what a transfer between workers that
divide the heads in different ways sends and receives.

cache  one layer's [blocks, 2, S, Hkv, D]; 2 is K, V. Of any dtype: nothing is computed
n blocks that are wanted   h heads, from first_head on
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # numbers of a program


@triton.jit
def _move(
    cache,
    block_stride,
    kind_stride,
    slot_stride,
    head_stride,
    blocks,
    first_head,
    packed,
    S: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    TO_CACHE: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    kind = tl.program_id(1)
    at = tl.program_id(2) * TILE + tl.arange(0, TILE)
    here = at < S * H * D
    block = tl.load(blocks + index).to(tl.int64)
    slot = at // (H * D)
    head = at // D % H + first_head
    place = cache + block * block_stride + kind * kind_stride + slot * slot_stride + head * head_stride + at % D
    own = packed + (index * 2 + kind) * (S * H * D) + at
    if TO_CACHE:
        tl.store(place, tl.load(own, mask=here), mask=here)
    else:
        tl.store(own, tl.load(place, mask=here), mask=here)


def gather(cache: Tensor, blocks: Tensor, first_head: int, heads: int) -> Tensor:
    """blocks [n], int32 or int64 -> [n, 2, S, h, D], contiguous."""
    _, kinds, size, _, dim = cache.shape
    packed = torch.empty(len(blocks), kinds, size, heads, dim, dtype=cache.dtype, device=cache.device)
    _launch(cache, blocks, first_head, packed, to_cache=False)
    return packed


def scatter(cache: Tensor, blocks: Tensor, first_head: int, packed: Tensor) -> None:
    """Writes packed [n, 2, S, h, D], contiguous, to these blocks, no one of which comes twice."""
    if not packed.is_contiguous() or packed.dtype != cache.dtype:
        raise ValueError(f"{packed.dtype} of strides {packed.stride()} for a cache of {cache.dtype}")
    _launch(cache, blocks, first_head, packed, to_cache=True)


def _launch(cache: Tensor, blocks: Tensor, first_head: int, packed: Tensor, *, to_cache: bool) -> None:
    count, kinds, size, heads, dim = packed.shape
    if first_head < 0 or first_head + heads > cache.shape[3]:
        raise ValueError(f"heads {first_head} .. {first_head + heads - 1} of {cache.shape[3]}")
    grid = (count, kinds, triton.cdiv(size * heads * dim, TILE))
    if min(grid):
        _move[grid](
            cache, *cache.stride()[:4], blocks, first_head, packed, S=size, H=heads, D=dim, TILE=TILE,
            TO_CACHE=to_cache,
        )  # fmt: skip
