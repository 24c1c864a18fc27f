"""What the attention kernels share: a tile of keys and values from the paged cache, and one step of the online softmax
over it. Scores are kept in base 2, as the processor's exponential is.

A row is one query head of one token; G = H / Hkv rows share a key-value head, and so a tile.
K_DIM and V_DIM are the head sizes of K and V, BLOCK_K and BLOCK_V the powers of two that hold them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
FEWEST_ROWS = 16  # of a product on the tensor cores
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def load_tile(
    cache,
    block_stride,
    kind_stride,
    slot_stride,
    head_stride,
    table,
    head,
    at,
    start,
    stop,
    S: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ALL: tl.constexpr,
    DOT: tl.constexpr,
):
    """at [TILE], token numbers of one sequence -> K [BLOCK_K, TILE] and V [TILE, BLOCK_V]. Outside start .. stop - 1,
    unless ALL lie within, they are zeros: what another owner left there may be NaN, and times zero that is NaN."""
    k_col = tl.arange(0, BLOCK_K)
    v_col = tl.arange(0, BLOCK_V)
    if ALL & (K_DIM == BLOCK_K) & (V_DIM == BLOCK_V):  # a mask costs time even where it masks nothing
        block = tl.load(table + at // S).to(tl.int64)
        rows = cache + block * block_stride + (at % S) * slot_stride + head * head_stride
        k = tl.load(rows[None, :] + k_col[:, None])
        v = tl.load((rows + kind_stride)[:, None] + v_col[None, :])
    else:
        inside = (at >= start) & (at < stop)
        block = tl.load(table + at // S, mask=inside, other=0).to(tl.int64)
        rows = cache + block * block_stride + (at % S) * slot_stride + head * head_stride
        k = tl.load(rows[None, :] + k_col[:, None], mask=inside[None, :] & (k_col < K_DIM)[:, None], other=0.0)
        rows += kind_stride
        v = tl.load(rows[:, None] + v_col[None, :], mask=inside[:, None] & (v_col < V_DIM)[None, :], other=0.0)
    return k.to(DOT), v.to(DOT)


@triton.jit
def attend(q, k, v, seen, top, total, acc, scale, ALL: tl.constexpr, CAP: tl.constexpr, DOT: tl.constexpr):
    """q [rows, BLOCK_K], seen [rows, TILE], or anything if every row sees ALL -> the largest score, the sum of weights
    and the weighted sum of values of every row so far, from those before."""
    s = tl.dot(q, k, input_precision="ieee") * scale
    if CAP > 0:
        small = tl.exp2(tl.abs(s) * (-2 * LOG2_E / CAP))
        tanh = (1.0 - small) / (1.0 + small)
        s = CAP * tl.where(s < 0, -tanh, tanh)
    s *= LOG2_E
    if not ALL:
        s = tl.where(seen, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    base = new_top if ALL else tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(s - base[:, None])
    fade = tl.exp2(top - base)
    total = total * fade + tl.sum(weights, 1)
    acc = acc * fade[:, None] + tl.dot(weights.to(DOT), v, input_precision="ieee")
    return new_top, total, acc


@triton.jit
def finish(top, total, acc):
    """-> the attention over what was seen, and the base-2 logarithm of its sum of weights: zeros and -inf if nothing
    was."""
    nothing = total == 0.0
    divisor = tl.where(nothing, 1.0, total)
    return acc / divisor[:, None], tl.where(nothing, float("-inf"), top + tl.log2(divisor))


@triton.jit
def merge(out, lse, other, other_lse):
    """Two parts of an attention, out [rows, BLOCK_V] and lse [rows] each -> the whole."""
    top = tl.maximum(lse, other_lse)
    base = tl.where(top == float("-inf"), 0.0, top)
    mine = tl.exp2(lse - base)
    theirs = tl.exp2(other_lse - base)
    total = mine + theirs
    divisor = tl.where(total == 0.0, 1.0, total)
    merged = out * (mine / divisor)[:, None] + other * (theirs / divisor)[:, None]
    return merged, tl.where(total == 0.0, float("-inf"), base + tl.log2(divisor))


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """What the products of these activations are computed from: the interpreter knows none of bfloat16."""
    return tl.float32 if triton.knobs.runtime.interpret else _TYPES[dtype]


def stages(cache: Tensor, tile: int) -> int:
    """Of the compiler's pipeline: one or two tiles ahead, so that two programs of 16 rows fit the shared memory of an
    SM. K and V wait for the table, so that a tile takes two stages."""
    tile_bytes = 2 * tile * triton.next_power_of_2(cache.shape[-1]) * cache.element_size()
    return 6 if tile_bytes <= 32 << 10 else 4


def sizes(cache: Tensor, value_dim: int | None) -> dict[str, int]:
    """The constants of a cache [blocks, 2, S, Hkv, D], of whose values the first `value_dim` columns count."""
    k_dim = cache.shape[-1]
    v_dim = k_dim if value_dim is None else value_dim
    blocks = {"BLOCK_K": max(16, triton.next_power_of_2(k_dim)), "BLOCK_V": max(16, triton.next_power_of_2(v_dim))}
    return {"S": cache.shape[2], "K_DIM": k_dim, "V_DIM": v_dim, **blocks}
