"""Decode attention of sequences that share a prefix, whose K and V are read once for all of them (RelayAttention,
arXiv:2402.14808). The prefix is attended by the rows of all sequences together, what each has of its own as usual
(decode.py), and the parts are merged by their log-sum-exp.

B sequences   H query heads   Hkv key-value heads   G = H / Hkv   S block size
D head size of K, Dv of V: all of D unless `value_dim` says less
cache   one layer's [blocks, 2, S, Hkv, D]
parts   [splits, B, H, Dv] float32 and part_lse [splits, B, H]: the prefix is split where B * G rows are few
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tercet.kernels.triton.decode import DecodePlan, attend_into, plan_decode
from tercet.kernels.triton.tiles import FEWEST_ROWS, attend, dot_type, finish, load_tile, merge, sizes, stages

ROWS = 64  # of a program: sequences times G


@triton.jit
def _prefix(
    query,
    query_stride,
    query_head_stride,
    cache,
    block_stride,
    kind_stride,
    slot_stride,
    head_stride,
    table,
    prefix,
    contexts,
    parts,
    part_lse,
    count,
    heads,
    scale,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    DOT: tl.constexpr,
    S: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    head = tl.program_id(1)
    split = tl.program_id(2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sequence = (row // G).to(tl.int64)
    live = sequence < count
    q_head = head * G + row % G
    k_col = tl.arange(0, BLOCK_K)
    v_col = tl.arange(0, BLOCK_V)
    q_at = query + (sequence * query_stride + q_head * query_head_stride)[:, None] + k_col[None, :]
    q = tl.load(q_at, mask=live[:, None] & (k_col < K_DIM)[None, :], other=0.0).to(DOT)

    length = tl.load(prefix)
    context = tl.load(contexts + sequence, mask=live, other=0)
    tiles = (length + (TILE - 1)) // TILE
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    for i in range(split * tiles // tl.num_programs(2), (split + 1) * tiles // tl.num_programs(2)):
        key = i * TILE + tl.arange(0, TILE)
        k, v = load_tile(
            cache, block_stride, kind_stride, slot_stride, head_stride, table, head, key, 0, length,
            S, K_DIM, V_DIM, BLOCK_K, BLOCK_V, False, DOT,
        )  # fmt: skip
        seen = (key < length)[None, :] & (key[None, :] < context[:, None])
        if WINDOW:
            seen = seen & (key[None, :] >= context[:, None] - WINDOW)
        top, total, acc = attend(q, k, v, seen, top, total, acc, scale, False, CAP, DOT)
    attended, weight = finish(top, total, acc)
    to = (split.to(tl.int64) * count + sequence) * heads + q_head
    tl.store(parts + to[:, None] * V_DIM + v_col[None, :], attended, mask=live[:, None] & (v_col < V_DIM)[None, :])
    tl.store(part_lse + to, weight, mask=live)


@triton.jit
def _merge_prefix(
    own,
    own_lse,
    parts,
    part_lse,
    out,
    splits,
    rows,
    ROWS: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    v_col = tl.arange(0, BLOCK_V)
    live = row < rows
    here = live[:, None] & (v_col < V_DIM)[None, :]
    at = row[:, None] * V_DIM + v_col[None, :]
    attended = tl.load(own + at, mask=here, other=0.0)
    weight = tl.load(own_lse + row, mask=live, other=float("-inf"))
    for _ in range(splits):
        part = tl.load(parts + at, mask=here, other=0.0)
        attended, weight = merge(attended, weight, part, tl.load(part_lse + row, mask=live, other=float("-inf")))
        parts += rows * V_DIM
        part_lse += rows
    tl.store(out + row[:, None] * V_DIM + v_col[None, :], attended, mask=here)


def shared_prefix_attention(
    query: Tensor,
    cache: Tensor,
    prefix_table: Tensor,
    prefix: Tensor,
    tables: Tensor,
    contexts: Tensor,
    *,
    most_prefix: int,
    most_context: int,
    programs: int,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    value_dim: int | None = None,
    plan: DecodePlan | None = None,
) -> Tensor:
    """query [B, H, D] -> [B, H, Dv].

    prefix_table  [prefix blocks] int32, the blocks of the `prefix` [1] int32 tokens that all sequences begin with
    tables        [B, max_blocks] int32, the blocks of each sequence's own tokens, which begin a block
    contexts      [B] int32, all tokens of a sequence, prefix and new one included; 0 gives zeros
    plan          `plan_decode`'s for `own_contexts(contexts, prefix)`
    """
    count, heads, dim = query.shape
    kv_heads, group = cache.shape[3], heads // cache.shape[3]
    constants = sizes(cache, value_dim)
    out = query.new_empty(count, heads, constants["V_DIM"])
    if not count:
        return out
    own = own_contexts(contexts, prefix)
    if plan is None:
        plan = plan_decode(own, kv_heads, most_context=most_context, window=window, programs=programs)
    most_rows = ROWS if query.element_size() == 2 else ROWS // 4  # without tensor cores a row costs registers
    rows = max(FEWEST_ROWS, min(most_rows, triton.next_power_of_2(count * group)))
    row_tiles = triton.cdiv(count * group, rows)
    splits = max(1, min(programs // (row_tiles * kv_heads), triton.cdiv(most_prefix, plan.tile)))
    parts = query.new_empty(splits + 1, count, heads, constants["V_DIM"], dtype=torch.float32)
    lse = query.new_empty(splits + 1, count, heads, dtype=torch.float32)
    attend_into(parts[splits], lse[splits], query, cache, tables, own, plan, soft_cap, scale)
    _prefix[(row_tiles, kv_heads, splits)](
        query, *query.stride()[:2], cache, *cache.stride()[:4], prefix_table, prefix, contexts, parts, lse, count,
        heads, dim**-0.5 if scale is None else scale, G=group, ROWS=rows, TILE=plan.tile, WINDOW=window or 0,
        CAP=soft_cap or 0.0, DOT=dot_type(query.dtype), num_stages=stages(cache, plan.tile), **constants,
    )  # fmt: skip
    _merge_prefix[(triton.cdiv(count * heads, FEWEST_ROWS),)](
        parts[splits], lse[splits], parts, lse, out, splits, count * heads,
        ROWS=FEWEST_ROWS, V_DIM=constants["V_DIM"], BLOCK_V=constants["BLOCK_V"],
    )  # fmt: skip
    return out


def own_contexts(contexts: Tensor, prefix: Tensor) -> Tensor:
    """[B] and [1] -> [B], how many tokens each sequence has after the prefix."""
    return (contexts - prefix).clamp(min=0)
