"""Attention by others, beside ours: torch's SDPA and FlexAttention, and FlashAttention and FlashInfer where they are
installed. Their K and V are contiguous, ours are in pages: what a page table costs counts against us.

B sequences   R query rows of each   L tokens in the cache   H query heads   Hkv key-value heads   D head size
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu_timing import Work

OPTIONAL = ("flash_attn", "flashinfer")


def installed() -> list[str]:
    return [name for name in OPTIONAL if importlib.util.find_spec(name) is not None]


def decode_rivals(query: Tensor, keys: Tensor, values: Tensor, *, flex: bool) -> dict[str, Work]:
    """query [B, H, D], keys and values [B, Hkv, L, D] -> works that give [B, H, D] in any layout. flex: compiling it
    takes tens of seconds."""
    row = query.unsqueeze(2)
    works: dict[str, Work] = {
        "SDPA": lambda: scaled_dot_product_attention(row, keys, values, enable_gqa=True).squeeze(2)
    }
    if flex:
        compiled = _flex(query.device)
        works["FlexAttention"] = lambda: compiled(row, keys, values, enable_gqa=True).squeeze(2)
    if "flash_attn" in installed():
        library: Any = importlib.import_module("flash_attn")
        token, k, v = query.unsqueeze(1), *_tokens_first(keys, values)
        works["FlashAttention"] = lambda: library.flash_attn_with_kvcache(token, k, v, causal=True).squeeze(1)
    if "flashinfer" in installed() and len(query) == 1:
        other: Any = importlib.import_module("flashinfer")
        one_k, one_v = (part[0] for part in _tokens_first(keys, values))
        works["FlashInfer"] = lambda: other.single_decode_with_kv_cache(query[0], one_k, one_v).unsqueeze(0)
    return works


def prefill_rivals(query: Tensor, keys: Tensor, values: Tensor, *, flex: bool) -> dict[str, Work]:
    """query [R, H, D] of the last R of L tokens, keys and values [1, Hkv, L, D] -> works that give [R, H, D]."""
    rows, length = len(query), keys.shape[2]
    heads = query.transpose(0, 1).unsqueeze(0).contiguous()
    mask = {"is_causal": True} if rows == length else {"attn_mask": causal_lower_right(rows, length)}
    works: dict[str, Work] = {
        "SDPA": lambda: _rows(scaled_dot_product_attention(heads, keys, values, enable_gqa=True, **mask))
    }
    if flex:
        compiled, before = _flex(query.device), length - rows
        seen = create_block_mask(lambda b, h, q, k: q + before >= k, None, None, rows, length, str(query.device))
        works["FlexAttention"] = lambda: _rows(compiled(heads, keys, values, block_mask=seen, enable_gqa=True))
    if "flash_attn" in installed():
        library: Any = importlib.import_module("flash_attn")
        k, v = _tokens_first(keys, values)
        works["FlashAttention"] = lambda: library.flash_attn_func(query.unsqueeze(0), k, v, causal=True)[0]
    if "flashinfer" in installed():
        other: Any = importlib.import_module("flashinfer")
        one_k, one_v = (part[0] for part in _tokens_first(keys, values))
        works["FlashInfer"] = lambda: other.single_prefill_with_kv_cache(query, one_k, one_v, causal=True)
    return works


def _rows(out: Tensor) -> Tensor:
    """[1, H, R, D] -> [R, H, D], a view."""
    return out[0].transpose(0, 1)


def _tokens_first(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """[B, Hkv, L, D] -> [B, L, Hkv, D]."""
    return keys.transpose(1, 2).contiguous(), values.transpose(1, 2).contiguous()


@functools.cache
def _flex(device: torch.device) -> Any:
    """Compiled for a GPU; elsewhere only its values are wanted."""
    return torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention
