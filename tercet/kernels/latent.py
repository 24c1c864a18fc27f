"""Attention over a paged cache of latents (DeepSeek-V2, arXiv:2405.04434, section 2.1), in plain torch.

Keys and values are not expanded: a query that went through the transpose of the key's projection is compared with the
latents themselves, and the weighted sum of latents goes through the value's projection, once, behind the attention.
So to the cache it is attention of all heads over one head.

T rows of the batch   B sequences   H heads   R rank of the latent   P rotary dimension   C = R + P
L tokens of context   N plain, V value dimension of a head   S block size
cache   one layer's [blocks, 1, S, 1, C]: each token's latent, then its rotary key
"""

from __future__ import annotations

import torch
from torch import Tensor

from tercet.kernels.attention import ChunkPlan, DecodeGroup, gather

MOST_SCORES = 1 << 24  # that are held at once: 64 MiB of float32


def write_latents(cache: Tensor, slots: Tensor, latents: Tensor) -> None:
    """latents [T, C] in the cache's dtype; slots [T] int64, block * S + offset."""
    cache.view(-1, latents.shape[1]).index_copy_(0, slots, latents)


def decode_attention(query: Tensor, cache: Tensor, group: DecodeGroup, rank: int, scale: float) -> Tensor:
    """query [B, H, C] -> [B, H, R]."""
    latents = gather(cache, group.pages, group.padding, len(query), group.context, query.dtype)[0, :, 0]
    mask = group.masks[None]
    hidden = None if mask is None else ~mask.squeeze(1)
    return _attend(query.unsqueeze(1), latents, hidden, rank, scale).squeeze(1)


def chunk_attention(query: Tensor, latents: Tensor, cache: Tensor, plan: ChunkPlan, rank: int, scale: float) -> Tensor:
    """The chunk's query [T, H, C] and latents [T, C] as they were written to the cache -> [T, H, R]."""
    if plan.pages.numel():
        context = gather(cache, plan.pages, None, 1, plan.context, query.dtype)[0, :, 0]
    else:
        context = latents.to(query.dtype).unsqueeze(0)
    out = query.new_empty(*query.shape[:2], rank)
    at, first = torch.arange(plan.context, device=query.device), plan.context - len(query)
    most = max(1, MOST_SCORES // (query.shape[1] * plan.context))
    for start in range(0, len(query), most):
        rows = query[start : start + most]
        own = torch.arange(first + start, first + start + len(rows), device=query.device)
        out[start : start + most] = _attend(rows.unsqueeze(0), context, (at > own.unsqueeze(1))[None], rank, scale)[0]
    return out


def _attend(query: Tensor, latents: Tensor, hidden: Tensor | None, rank: int, scale: float) -> Tensor:
    """query [B, T, H, C], latents [B, L, C]; hidden [B, T, L], True where not attended -> [B, T, H, R]."""
    scores = torch.einsum("bthc,blc->bthl", query, latents).float() * scale
    if hidden is not None:
        scores.masked_fill_(hidden.unsqueeze(2), -torch.inf)
    return torch.einsum("bthl,blr->bthr", scores.softmax(-1).to(query.dtype), latents[..., :rank])


def latent_attention_reference(
    query: Tensor, latents: Tensor, key_up: Tensor, value_up: Tensor, scale: float
) -> Tensor:
    """One sequence, keys and values expanded, in float64: query [T, H, N + P] of its last T tokens, latents [L, C],
    key_up [H, N, R], value_up [H, V, R] -> [T, H, V]."""
    rows, heads = query.shape[:2]
    rank = key_up.shape[2]
    low, rotary = latents[:, :rank].double(), latents[:, rank:].double()
    keys = torch.cat((torch.einsum("lr,hnr->hln", low, key_up.double()), rotary.expand(heads, -1, -1)), -1)
    values = torch.einsum("lr,hvr->hlv", low, value_up.double())
    scores = torch.einsum("thd,hld->htl", query.double(), keys) * scale
    later = torch.arange(len(latents)) > torch.arange(len(latents) - rows, len(latents)).unsqueeze(1)
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    return torch.einsum("htl,hlv->thv", weights, values).to(query.dtype)
