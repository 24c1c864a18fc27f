"""Paged grouped-query attention in plain torch, made for a CPU: K and V to the cache, attend over it. Planned once a
step, run per layer.

T rows of the batch   B decodes of a group   L tokens of context
H query heads   Hkv key-value heads   G = H / Hkv   D head dimension   S block size
cache   one layer's [blocks, 2, S, Hkv, D]; 2 is K, V. Seen as pages [2 * blocks, S * Hkv * D], the K of block b
        is page 2b and its V page 2b + 1. With one part, for latents (latent.py), block b is page b.
window  w: a token sees itself and the w - 1 before it; None: everything before it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Window = int | None
GATHER_TOKENS = 4096  # of one group, padding included: larger gathers spend their time in page faults


@dataclass(frozen=True)
class DecodeGroup:
    """Decodes of similar length that are attended together."""

    rows: Tensor | slice  # [B] int64, in the flat batch
    pages: Tensor  # [parts * B * padded blocks] int64, every K page before every V page
    padding: Tensor  # [...] int64, gathered tokens that are nobody's: rows of the pages seen as [pages * S, Hkv * D]
    context: int  # the longest L of the group
    masks: dict[Window, Tensor | None]  # window -> [B, 1, 1, L], True where attended; None: all are


@dataclass(frozen=True)
class ChunkPlan:
    """One prefill chunk: the rows start .. stop of the batch, which are the last of its `context` tokens."""

    start: int
    stop: int
    pages: Tensor  # [parts * blocks] int64; empty if the chunk starts its prompt, whose K and V then need no gather
    context: int
    masks: dict[Window, Tensor | None]  # window -> [rows, L], True where attended; None: plainly causal


def plan_decodes(
    tables: Tensor, contexts: Tensor, block_size: int, windows: Sequence[Window], parts: int = 2
) -> list[DecodeGroup]:
    """tables [B, max blocks], contexts [B], both int64. Groups hold GATHER_TOKENS or a single decode."""
    lengths = contexts.tolist()
    if lengths and len(lengths) * max(lengths) <= GATHER_TOKENS:
        return [_plan_group(slice(0, len(lengths)), max(lengths), tables, contexts, block_size, windows, parts)]
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    groups = []
    while order:
        longest = lengths[order[0]]
        size = max(1, GATHER_TOKENS // longest)
        rows, order = order[:size], order[size:]
        picked = torch.tensor(rows, device=tables.device)
        groups.append(_plan_group(picked, longest, tables, contexts, block_size, windows, parts))
    return groups


def _plan_group(
    rows: Tensor | slice,
    longest: int,
    tables: Tensor,
    contexts: Tensor,
    block_size: int,
    windows: Sequence[Window],
    parts: int,
) -> DecodeGroup:
    blocks = tables[rows][:, : -(-longest // block_size)].flatten()
    ends = contexts[rows].view(-1, 1, 1, 1)
    at = torch.arange(longest, device=tables.device)
    gathered = torch.arange(blocks.numel() * block_size, device=tables.device).view(len(ends), -1)
    padding = gathered[:, :longest][at >= ends.view(-1, 1)]
    masks: dict[Window, Tensor | None] = {}
    for window in windows:
        mask = at < ends if window is None else (at < ends) & (at >= ends - window)
        masks[window] = None if bool(mask.all()) else mask
    every = torch.cat([padding + part * gathered.numel() for part in range(parts)])
    return DecodeGroup(rows, _pages(blocks, parts), every, longest, masks)


def _pages(blocks: Tensor, parts: int) -> Tensor:
    """Of these blocks, those of one part before those of the next."""
    return torch.cat([blocks * parts + part for part in range(parts)])


def plan_chunk(
    start: int, length: int, context: int, table: Tensor, windows: Sequence[Window], parts: int = 2
) -> ChunkPlan:
    """table [ceil(context / S)] int64."""
    blocks = table if context > length else table[:0]
    query = torch.arange(context - length, context, device=table.device).unsqueeze(1)
    key = torch.arange(context, device=table.device)
    masks: dict[Window, Tensor | None] = {}
    for window in windows:
        if context == length and (window is None or window >= context):
            masks[window] = None
        else:
            masks[window] = key <= query if window is None else (key <= query) & (key > query - window)
    return ChunkPlan(start, start + length, _pages(blocks, parts), context, masks)


def page_rows(slots: Tensor, block_size: int) -> Tensor:
    """slots [T], block * S + offset -> [2 T]: K row and V row of each in the cache seen as [blocks * 2 * S, Hkv, D]."""
    keys = slots + slots // block_size * block_size
    return torch.stack((keys, keys + block_size), 1).flatten()


def write_kv(cache: Tensor, rows: Tensor, key_value: Tensor) -> None:
    """key_value [T, 2 Hkv, D], K heads first, in the cache's dtype; rows as `page_rows` gives them."""
    _, _, _, heads, dim = cache.shape
    cache.view(-1, heads, dim).index_copy_(0, rows, key_value.reshape(-1, heads, dim))


def gather(
    cache: Tensor, pages: Tensor, padding: Tensor | None, batch: int, context: int, dtype: torch.dtype
) -> Tensor:
    """-> K and V, or other parts, [parts, batch, Hkv, L, D] in `dtype`, strided; zeros where the padding is. A mask
    alone would not do: what an earlier owner left there may be infinite or NaN, and times zero that is NaN."""
    _, parts, size, heads, dim = cache.shape
    flat = cache.view(-1, size * heads * dim).index_select(0, pages)
    if padding is not None and padding.numel():
        flat.view(-1, heads * dim).index_fill_(0, padding, 0)
    flat = flat.to(dtype)
    return flat.view(parts, batch, -1, heads, dim)[:, :, :context].transpose(2, 3)


def decode_attention(query: Tensor, cache: Tensor, group: DecodeGroup, window: Window) -> Tensor:
    """query [B, H, D] -> [B, H, D]. The G query heads of a key-value head are rows of one product: K is not copied."""
    batch, heads, dim = query.shape
    key, value = gather(cache, group.pages, group.padding, batch, group.context, query.dtype)
    grouped = query.view(batch, key.shape[1], -1, dim)
    out = functional.scaled_dot_product_attention(grouped, key, value, attn_mask=group.masks[window])
    return out.reshape(batch, heads, dim)


def chunk_attention(query: Tensor, key_value: Tensor, cache: Tensor, plan: ChunkPlan, window: Window) -> Tensor:
    """The chunk's query [T, H, D] and key_value [T, 2 Hkv, D] as it was written to the cache -> [T, H, D]."""
    if plan.pages.numel():
        keys, values = gather(cache, plan.pages, None, 1, plan.context, query.dtype)
    else:
        keys, values = key_value.to(query.dtype).transpose(0, 1).unsqueeze(0).chunk(2, 1)
    mask = plan.masks[window]
    out = functional.scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0), keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def attention_reference(query: Tensor, keys: Tensor, values: Tensor, window: Window) -> Tensor:
    """One sequence, in float64: query [T, H, D] of its last T tokens, keys and values [L, Hkv, D] -> [T, H, D]."""
    rows, heads, dim = query.shape
    context, kv_heads, _ = keys.shape
    wide_keys, wide_values = (t.double().repeat_interleave(heads // kv_heads, 1) for t in (keys, values))
    scores = torch.einsum("thd,lhd->htl", query.double(), wide_keys) / dim**0.5
    distance = torch.arange(context - rows, context).unsqueeze(1) - torch.arange(context)
    hidden = (distance < 0) | (distance >= (window or context))
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("htl,lhd->thd", weights, wide_values).to(query.dtype)
