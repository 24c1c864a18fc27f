"""Rotary position embedding (arXiv:2104.09864) on the two halves of a head, and the write to the KV cache, in one pass.

T rows   H query heads   Hkv key-value heads   D head dimension   S block size
cache    one layer's [blocks, 2, S, Hkv, D]; 2 is K, V
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tercet.kernels.triton.dependent import after_previous, dependent

HEADS = 16  # of a program


@triton.jit
def _rope_and_write(
    qkv,
    row_stride,
    head_stride,
    cos,
    sin,
    angle_stride,
    cache,
    block_stride,
    kind_stride,
    slot_stride,
    cache_head_stride,
    slots,
    query_heads,
    kv_heads,
    S: tl.constexpr,
    HALF: tl.constexpr,
    COLS: tl.constexpr,
    HEADS: tl.constexpr,
    PDL: tl.constexpr,
):
    after_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    here = (head < query_heads + 2 * kv_heads) & (col < HALF)
    turns = here & (head < query_heads + kv_heads)  # values do not
    at = qkv + row * row_stride + head * head_stride + col
    first = tl.load(at, mask=here, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=here, other=0.0).to(tl.float32)
    c = tl.load(cos + row * angle_stride + col, mask=col < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + row * angle_stride + col, mask=col < HALF, other=0.0).to(tl.float32)
    turned_first = tl.where(turns, first * c - second * s, first)
    turned_second = tl.where(turns, second * c + first * s, second)
    is_query = here & (head < query_heads)
    tl.store(at, turned_first, mask=is_query)
    tl.store(at + HALF, turned_second, mask=is_query)

    slot = tl.load(slots + row)
    written = here & (head >= query_heads) & (slot >= 0)
    block = tl.maximum(slot, 0) // S
    kv = head - query_heads
    kind = kv // kv_heads  # 0: K, 1: V
    to = cache + block * block_stride + (slot - block * S) * slot_stride
    to += kind * kind_stride + (kv - kind * kv_heads) * cache_head_stride + col
    tl.store(to, turned_first, mask=written)
    tl.store(to + HALF, turned_second, mask=written)


def rope_and_write(qkv: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, slots: Tensor, kv_heads: int) -> None:
    """Rotates the queries of qkv [T, H + 2 Hkv, D] in place, and writes its rotated keys and its values to the cache.

    cos, sin  [T, D/2] float32, of the angle of each pair (x[i], x[i + D/2])
    slots     [T] int64, block * S + offset; a row whose slot is negative writes nothing
    """
    rows, heads, dim = qkv.shape
    if cos.stride() != sin.stride():
        raise ValueError("cos and sin are laid out differently")
    if rows:
        _rope_and_write[(rows, triton.cdiv(heads, HEADS))](
            qkv,
            qkv.stride(0),
            qkv.stride(1),
            cos,
            sin,
            cos.stride(0),
            cache,
            *cache.stride()[:4],
            slots,
            heads - 2 * kv_heads,
            kv_heads,
            S=cache.shape[2],
            HALF=dim // 2,
            COLS=triton.next_power_of_2(dim // 2),
            HEADS=HEADS,
            **dependent(),
        )
