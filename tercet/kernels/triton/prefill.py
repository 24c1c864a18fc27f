"""Ragged prefill over the paged cache: the rows of several prompts' chunks, each after a cached prefix of its own.
Online softmax over the KV tiles that a tile of rows can see (FlashAttention-2, arXiv:2307.08691). The G query heads of
a KV head are rows beside those of its neighbour tokens, so that all of them share one read of K and V.

T tokens of the batch   N sequences   H query heads   Hkv key-value heads   G = H / Hkv   S block size
D head size of K, Dv of V: all of D unless `value_dim` says less
cache   one layer's [blocks, 2, S, Hkv, D], which holds the chunk's own K and V, too
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tercet.kernels.triton.tiles import attend, dot_type, finish, load_tile, sizes

MANY = 264  # programs that an H100 works on at once


@triton.jit
def _prefill(
    query,
    query_stride,
    query_head_stride,
    cache,
    block_stride,
    kind_stride,
    slot_stride,
    head_stride,
    tables,
    table_stride,
    starts,
    contexts,
    out,
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
    head = tl.program_id(0)
    part = tl.num_programs(1) - 1 - tl.program_id(1)  # the last rows have the most to do: those of all heads go first
    sequence = tl.program_id(2).to(tl.int64)
    start = tl.load(starts + sequence)
    tokens = tl.load(starts + sequence + 1) - start
    if part * ROWS < tokens * G:
        context = tl.load(contexts + sequence)
        row = part * ROWS + tl.arange(0, ROWS)
        token = row // G
        position = context - tokens + token
        live = token < tokens
        at = (start + token).to(tl.int64)
        q_head = head * G + row % G
        k_col = tl.arange(0, BLOCK_K)
        v_col = tl.arange(0, BLOCK_V)
        q_at = query + (at * query_stride + q_head * query_head_stride)[:, None] + k_col[None, :]
        q = tl.load(q_at, mask=live[:, None] & (k_col < K_DIM)[None, :], other=0.0).to(DOT)

        first_position = context - tokens + part * ROWS // G
        last_position = tl.minimum(context - tokens + (part * ROWS + (ROWS - 1)) // G, context - 1)
        lowest = tl.maximum(first_position - (WINDOW - 1), 0) if WINDOW else context * 0
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
        table = tables + sequence * table_stride
        mixed = lowest // TILE if WINDOW else (first_position + 1) // TILE  # the first tile that some row sees in part
        for i in range(mixed if WINDOW else 0, mixed):
            key = i * TILE + tl.arange(0, TILE)
            k, v = load_tile(
                cache, block_stride, kind_stride, slot_stride, head_stride, table, head, key, lowest, context,
                S, K_DIM, V_DIM, BLOCK_K, BLOCK_V, True, DOT,
            )  # fmt: skip
            top, total, acc = attend(q, k, v, live, top, total, acc, scale, True, CAP, DOT)
        for i in range(mixed, last_position // TILE + 1):
            key = i * TILE + tl.arange(0, TILE)
            k, v = load_tile(
                cache, block_stride, kind_stride, slot_stride, head_stride, table, head, key, lowest, context,
                S, K_DIM, V_DIM, BLOCK_K, BLOCK_V, False, DOT,
            )  # fmt: skip
            seen = key[None, :] <= position[:, None]
            if WINDOW:
                seen = seen & (key[None, :] > position[:, None] - WINDOW)
            top, total, acc = attend(q, k, v, seen & live[:, None], top, total, acc, scale, False, CAP, DOT)
        attended, _ = finish(top, total, acc)
        to = out + ((at * heads + q_head) * V_DIM)[:, None] + v_col[None, :]
        tl.store(to, attended, mask=live[:, None] & (v_col < V_DIM)[None, :])


def prefill_attention(
    query: Tensor,
    cache: Tensor,
    tables: Tensor,
    starts: Tensor,
    contexts: Tensor,
    *,
    most_rows: int,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    value_dim: int | None = None,
) -> Tensor:
    """query [T, H, D] -> [T, H, Dv].

    tables    [N, max_blocks] int32
    starts    [N + 1] int32: sequence n has the rows starts[n] .. starts[n + 1] - 1, at most `most_rows`
    contexts  [N] int32, its tokens in the cache, of which these rows are the last
    Rows from starts[N] on, the padding of a captured graph, are left as they are in a new tensor: undefined.
    """
    _, heads, dim = query.shape
    kv_heads, group = cache.shape[3], heads // cache.shape[3]
    constants = sizes(cache, value_dim)
    out = query.new_empty(*query.shape[:2], constants["V_DIM"])
    tiling = _tiling(query, constants, most_rows * group, kv_heads * len(contexts))
    grid = (kv_heads, triton.cdiv(most_rows * group, tiling["ROWS"]), len(contexts))
    if min(grid):
        _prefill[grid](
            query, *query.stride()[:2], cache, *cache.stride()[:4], tables, tables.stride(0), starts, contexts, out,
            heads, dim**-0.5 if scale is None else scale, G=group, WINDOW=window or 0,
            CAP=soft_cap or 0.0, DOT=dot_type(query.dtype), **constants, **tiling,
        )  # fmt: skip
    return out


def _tiling(query: Tensor, constants: dict[str, int], rows: int, others: int) -> dict[str, int]:
    """Rows of a program, tokens times G, and KV tokens that it takes at a time. rows: of the longest chunk; others:
    programs for each tile of them."""
    if query.element_size() > 2:  # without tensor cores a row costs more registers
        return {"ROWS": 16, "TILE": 64, "num_stages": 3}
    if max(constants["BLOCK_K"], constants["BLOCK_V"]) > 128:
        return {"ROWS": 64, "TILE": 64, "num_stages": 3}
    if triton.cdiv(rows, 128) * others > MANY:  # the more of them on one SM, the better
        return {"ROWS": 128, "TILE": 64, "num_stages": 2, "num_warps": 4}
    return {"ROWS": 128, "TILE": 128, "num_stages": 3, "num_warps": 8}
