"""Paged decode attention: one query token a sequence. Stream-K (LeanAttention, arXiv:2405.10480): the KV tiles of all
(sequence, KV head) pairs lie on one line, sequence by sequence and head by head, and a fixed number of programs takes
an even share of that line each, whatever the lengths. A pair that one program has whole is written at once; of the
others, which lie across a border, the parts are merged by their log-sum-exp in a second kernel.

B sequences   H query heads   Hkv key-value heads   G = H / Hkv   S block size
D head size of K, Dv of V: all of D unless `value_dim` says less
cache   one layer's [blocks, 2, S, Hkv, D]
parts   [programs, 2, G, Dv] float32, and part_lse [programs, 2, G]: 0 is the pair that the program before has begun,
        1 the one that the program after ends
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tercet.kernels.triton.dependent import after_previous, dependent
from tercet.kernels.triton.tiles import FEWEST_ROWS, attend, dot_type, finish, load_tile, sizes, stages

TILE = 64  # tokens
PARTS = 16  # that are merged at once


@dataclass(frozen=True)
class DecodePlan:
    """How the line is divided. It depends on the lengths alone: all layers with the same window may share one."""

    ends: Tensor  # [B] int64, where the tiles of each sequence end on the line
    borders: Tensor  # [programs + 1] int64: program p takes the tiles borders[p] .. borders[p + 1] - 1
    busy: Tensor  # [1] int64, programs that have any tile
    tile: int
    window: int | None


def tile_borders(total: Tensor, programs: int) -> tuple[Tensor, Tensor]:
    """total [1] int64 tiles -> borders [programs + 1] and the number of programs that get any [1], which are the first.
    Shares differ by at most one."""
    busy = total.clamp(1, programs)
    at = torch.arange(programs + 1, dtype=torch.int64, device=total.device)
    return torch.minimum(at, busy) * total // busy, busy


def plan_decode(
    contexts: Tensor, kv_heads: int, *, most_context: int, window: int | None, programs: int, tile: int = TILE
) -> DecodePlan:
    """contexts [B], none above most_context."""
    wide = contexts.to(torch.int64)
    first = torch.zeros_like(wide) if window is None else (wide - window).clamp(min=0) // tile
    ends = (((wide + (tile - 1)) // tile - first) * kv_heads).cumsum(0)
    most_tiles = max(1, len(contexts) * kv_heads * triton.cdiv(most_context, tile))
    borders, busy = tile_borders(ends[-1:], min(programs, most_tiles))
    return DecodePlan(ends, borders, busy, tile, window)


@triton.jit
def _sequence_at(ends, at, count):
    """The first of `count` sequences that ends after `at`."""
    low = 0
    high = count - 1
    while low < high:
        middle = (low + high) // 2
        if tl.load(ends + middle) > at:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit
def _stream(
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
    contexts,
    ends,
    borders,
    out,
    lse,
    parts,
    part_lse,
    count,
    kv_heads,
    scale,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    DOT: tl.constexpr,
    WITH_LSE: tl.constexpr,
    PDL: tl.constexpr,
    S: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    after_previous(PDL)
    program = tl.program_id(0)
    row = tl.arange(0, ROWS)
    k_col = tl.arange(0, BLOCK_K)
    v_col = tl.arange(0, BLOCK_V)
    at = tl.load(borders + program)
    border = tl.load(borders + program + 1)
    while at < border:
        b = _sequence_at(ends, at, count).to(tl.int64)
        context = tl.load(contexts + b)
        lowest = tl.maximum(context - WINDOW, 0) if WINDOW else context * 0
        first_tile = lowest // TILE
        tiles = (context + (TILE - 1)) // TILE - first_tile  # of each of its heads
        in_sequence = (at - tl.load(ends + b) + tiles * kv_heads).to(tl.int32)
        head = in_sequence // tiles
        begin = in_sequence % tiles
        stop = tl.minimum(tiles, begin + (border - at)).to(tl.int32)

        q_at = query + b * query_stride + (head * G + row)[:, None] * query_head_stride + k_col[None, :]
        q = tl.load(q_at, mask=(row < G)[:, None] & (k_col < K_DIM)[None, :], other=0.0).to(DOT)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
        for i in range(first_tile + begin, first_tile + stop):
            token = i * TILE + tl.arange(0, TILE)
            k, v = load_tile(
                cache, block_stride, kind_stride, slot_stride, head_stride, tables + b * table_stride, head, token,
                lowest, context, S, K_DIM, V_DIM, BLOCK_K, BLOCK_V, False, DOT,
            )  # fmt: skip
            seen = ((token >= lowest) & (token < context))[None, :]
            top, total, acc = attend(q, k, v, seen, top, total, acc, scale, False, CAP, DOT)
        attended, weight = finish(top, total, acc)

        here = (row < G)[:, None] & (v_col < V_DIM)[None, :]
        if (begin == 0) & (stop == tiles):
            to = b * (kv_heads * G) + head * G + row
            tl.store(out + to[:, None] * V_DIM + v_col[None, :], attended, mask=here)
            if WITH_LSE:
                tl.store(lse + to, weight, mask=row < G)
        else:
            part = (program * 2 + (begin == 0).to(tl.int32)) * G + row
            tl.store(parts + part[:, None] * V_DIM + v_col[None, :], attended, mask=here)
            tl.store(part_lse + part, weight, mask=row < G)
        at += stop - begin


@triton.jit
def _merge_parts(
    parts,
    part_lse,
    ends,
    busy,
    out,
    lse,
    count,
    kv_heads,
    G: tl.constexpr,
    PARTS: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    WITH_LSE: tl.constexpr,
    PDL: tl.constexpr,
):
    after_previous(PDL)
    b = tl.program_id(0).to(tl.int64)
    q_head = tl.program_id(1)
    head = q_head // G
    v_col = tl.arange(0, BLOCK_V)
    before = tl.load(ends + b - 1, mask=b > 0, other=0)
    tiles = (tl.load(ends + b) - before) // kv_heads
    start = before + head * tiles
    programs = tl.load(busy)
    line = tl.maximum(tl.load(ends + count - 1), 1)
    first = ((start + 1) * programs - 1) // line  # the program whose share holds the tile `start`
    last = ((start + tiles) * programs - 1) // line
    if (tiles == 0) | (first < last):
        top = tl.full([], float("-inf"), tl.float32)
        total = tl.full([], 0.0, tl.float32)
        acc = tl.zeros([BLOCK_V], tl.float32)
        for begin in range(first, last + 1, PARTS):
            p = begin + tl.arange(0, PARTS)
            live = (p <= last) & (tiles > 0)
            part = (p * 2 + (p == first)) * G + q_head % G
            weights = tl.load(part_lse + part, mask=live, other=float("-inf"))
            at = parts + part[:, None] * V_DIM + v_col[None, :]
            values = tl.load(at, mask=live[:, None] & (v_col < V_DIM)[None, :], other=0.0)
            new_top = tl.maximum(top, tl.max(weights, 0))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.exp2(weights - base)
            fade = tl.exp2(top - base)
            total = total * fade + tl.sum(weights, 0)
            acc = acc * fade + tl.sum(values * weights[:, None], 0)
            top = new_top
        divisor = tl.where(total == 0.0, 1.0, total)
        to = b * (kv_heads * G) + q_head
        tl.store(out + to * V_DIM + v_col, acc / divisor, mask=v_col < V_DIM)
        if WITH_LSE:
            tl.store(lse + to, tl.where(total == 0.0, float("-inf"), top + tl.log2(divisor)))


def decode_attention(
    query: Tensor,
    cache: Tensor,
    tables: Tensor,
    contexts: Tensor,
    *,
    most_context: int,
    programs: int,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    value_dim: int | None = None,
    plan: DecodePlan | None = None,
) -> Tensor:
    """query [B, H, D], tables [B, max_blocks] int32, contexts [B] int32 tokens, the new one included -> [B, H, Dv].

    A row whose context is 0 gives zeros. `plan` is `plan_decode`'s for the same contexts and window.
    """
    out = query.new_empty(*query.shape[:2], value_dim or cache.shape[-1])
    if len(query):
        if plan is None:
            plan = plan_decode(contexts, cache.shape[3], most_context=most_context, window=window, programs=programs)
        attend_into(out, None, query, cache, tables, contexts, plan, soft_cap, scale)
    return out


def attend_into(
    out: Tensor,
    lse: Tensor | None,
    query: Tensor,
    cache: Tensor,
    tables: Tensor,
    contexts: Tensor,
    plan: DecodePlan,
    soft_cap: float | None,
    scale: float | None,
) -> None:
    """Writes out [B, H, Dv] and, if wanted, lse [B, H] float32: the base-2 logarithm of each row's sum of weights."""
    count, heads, dim = query.shape
    kv_heads, programs = cache.shape[3], len(plan.borders) - 1
    constants = sizes(cache, out.shape[-1])
    group = heads // kv_heads
    rows = max(FEWEST_ROWS, triton.next_power_of_2(group))
    parts = query.new_empty(programs, 2, group, out.shape[-1], dtype=torch.float32)
    part_lse = query.new_empty(programs, 2, group, dtype=torch.float32)
    written = part_lse if lse is None else lse
    shared = {"G": group, "WITH_LSE": lse is not None, **dependent()}
    _stream[(programs,)](
        query, *query.stride()[:2], cache, *cache.stride()[:4], tables, tables.stride(0), contexts, plan.ends,
        plan.borders, out, written, parts, part_lse, count, kv_heads, dim**-0.5 if scale is None else scale,
        ROWS=rows, TILE=plan.tile, WINDOW=plan.window or 0, CAP=soft_cap or 0.0, DOT=dot_type(query.dtype), **shared,
        **constants, num_stages=stages(cache, plan.tile),
    )  # fmt: skip
    widths = {key: constants[key] for key in ("V_DIM", "BLOCK_V")}
    _merge_parts[(count, heads)](
        parts, part_lse, plan.ends, plan.busy, out, written, count, kv_heads, PARTS=PARTS, **shared, **widths
    )  # fmt: skip
