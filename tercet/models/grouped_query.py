"""Grouped-query attention of a layer, by torch's operations.

T rows of the batch   E hidden size   H query heads   Hkv key-value heads   D head dimension
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tercet.kernels import attention
from tercet.kernels.attention import ChunkPlan, DecodeGroup, Window
from tercet.kernels.rope import RopeTable, apply_rope
from tercet.models.batch import StepBatch
from tercet.models.config import ModelConfig
from tercet.models.layer import GroupedQuery, Latent


@dataclass(frozen=True)
class GroupedQueryStep:
    """What all layers of one step share, and the attention of each."""

    config: ModelConfig
    cos: Tensor  # [T, 1, D]
    signed_sin: Tensor
    cache_rows: Tensor  # [2 T]
    decodes: list[DecodeGroup]
    chunks: list[ChunkPlan]

    def attend(
        self, layer: GroupedQuery | Latent, x: Tensor, cache: Tensor, window: Window, written: Callable[[], None]
    ) -> Tensor:
        """normed x [T, E] -> behind the output projection, before the residual is added, [T, E]. cache: the layer's
        [blocks, 2, block size, Hkv, D]; written() is called once its K and V are there."""
        assert isinstance(layer, GroupedQuery)
        query, key_value = self._project(layer, x, cache.dtype)
        attention.write_kv(cache, self.cache_rows, key_value)
        written()
        return layer.output.linear(self._attend(query, key_value, cache, window))

    def _project(self, layer: GroupedQuery, x: Tensor, cached: torch.dtype) -> tuple[Tensor, Tensor]:
        """normed x [T, E] -> query [T, H, D] in x's dtype, keys and values [T, 2 Hkv, D] in the cache's."""
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        qkv = layer.qkv.linear(x).view(len(x), heads + 2 * kv_heads, self.config.head_dim)
        rotary = qkv[:, : heads + kv_heads]
        normed = rotary if layer.qk_norm is None else layer.qk_norm(rotary)
        apply_rope(normed, self.cos, self.signed_sin, out=rotary)
        return qkv[:, :heads], qkv[:, heads:].to(cached)

    def _attend(self, query: Tensor, key_value: Tensor, cache: Tensor, window: Window) -> Tensor:
        """-> [T, H * D]. Each row attends to its own sequence."""
        if not self.chunks and len(self.decodes) == 1:
            return attention.decode_attention(query, cache, self.decodes[0], window).flatten(1)
        out = torch.empty_like(query)
        for group in self.decodes:
            out[group.rows] = attention.decode_attention(query[group.rows], cache, group, window)
        for chunk in self.chunks:
            rows = slice(chunk.start, chunk.stop)
            out[rows] = attention.chunk_attention(query[rows], key_value[rows], cache, chunk, window)
        return out.flatten(1)


def plan_grouped_query(
    config: ModelConfig, rope: RopeTable, batch: StepBatch, block_size: int, dtype: torch.dtype
) -> GroupedQueryStep:
    """dtype: of the activations."""
    windows: Sequence[Window] = list(dict.fromkeys(config.sliding_windows))
    tables, contexts = batch.decode_block_tables, batch.decode_context_lens
    return GroupedQueryStep(
        config,
        *rope.rows(batch.positions, dtype),
        attention.page_rows(batch.slots, block_size),
        attention.plan_decodes(tables, contexts, block_size, windows),
        [attention.plan_chunk(c.start_row, c.length, c.context, c.block_table, windows) for c in batch.chunks],
    )
