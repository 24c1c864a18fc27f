"""The decoder layers of the Llama family, by torch's operations.

T rows of the batch   E hidden size   H query heads   Hkv key-value heads   D head dimension
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tercet.distributed.collectives import Collectives
from tercet.kernels import attention
from tercet.kernels.attention import ChunkPlan, DecodeGroup, Window
from tercet.kernels.rope import RopeTable, apply_rope
from tercet.models.batch import StepBatch
from tercet.models.config import ModelConfig
from tercet.models.layer import GroupedQuery, Layer


class Layers(Protocol):
    """Those of a model that are here, with the heads and columns that are. The tensor ranks sum what each half of a
    layer makes."""

    @property
    def layers_done(self) -> int:
        """Over all steps; grows during a step. Any thread."""

    def forward(self, x: Tensor, batch: StepBatch, kv_cache: Tensor, on_layer: Callable[[int], None] | None) -> Tensor:
        """x [T, E], which may be overwritten -> the last layer's output, [T, E]. Writes kv_cache [layers, blocks, 2,
        block size, Hkv, D].

        on_layer(i) is called once layer i's K and V of this batch are in the cache, before the layer has finished.
        """


@dataclass(frozen=True)
class _StepTensors:
    """What all layers of one step share."""

    cos: Tensor  # [T, 1, D]
    signed_sin: Tensor
    cache_rows: Tensor  # [2 T]
    decodes: list[DecodeGroup]
    chunks: list[ChunkPlan]


class TorchLayers:
    def __init__(self, config: ModelConfig, layers: tuple[Layer, ...], rope: RopeTable, tensor: Collectives) -> None:
        self._config, self._layers, self._rope, self._tensor = config, layers, rope, tensor
        self._windows: list[Window] = list(dict.fromkeys(config.sliding_windows))
        self.layers_done = 0

    def forward(self, x: Tensor, batch: StepBatch, kv_cache: Tensor, on_layer: Callable[[int], None] | None) -> Tensor:
        step = self._plan(batch, kv_cache.shape[3], x.dtype)
        for i, layer in enumerate(self._layers):
            attended = self._attention(i, layer.attention_norm(x), step, kv_cache, on_layer)
            x = self._tensor.all_reduce(attended).add_(x)
            x = self._tensor.all_reduce(layer.mlp.forward(layer.mlp_norm(x))).add_(x)
            if batch.images is not None:
                batch.images.add_behind(i, x)
            self.layers_done += 1
        return x

    def _attention(
        self, i: int, x: Tensor, step: _StepTensors, kv_cache: Tensor, on_layer: Callable[[int], None] | None
    ) -> Tensor:
        """Layer i's: normed x [T, E] -> behind the output projection, before the residual is added, [T, E]."""
        layer, cache = self._layers[i].attention, kv_cache[i]
        query, key_value = self._project(layer, x, step, cache.dtype)
        attention.write_kv(cache, step.cache_rows, key_value)
        if on_layer is not None:
            on_layer(i)
        return layer.output.linear(self._attend(query, key_value, cache, step, self._config.sliding_windows[i]))

    def _plan(self, batch: StepBatch, block_size: int, dtype: torch.dtype) -> _StepTensors:
        cos, signed_sin = self._rope.rows(batch.positions, dtype)
        tables, contexts = batch.decode_block_tables, batch.decode_context_lens
        return _StepTensors(
            cos,
            signed_sin,
            attention.page_rows(batch.slots, block_size),
            attention.plan_decodes(tables, contexts, block_size, self._windows),
            [
                attention.plan_chunk(c.start_row, c.length, c.context, c.block_table, self._windows)
                for c in batch.chunks
            ],
        )

    def _project(
        self, layer: GroupedQuery, x: Tensor, step: _StepTensors, cached: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """normed x [T, E] -> query [T, H, D] in x's dtype, keys and values [T, 2 Hkv, D] in the cache's."""
        heads, kv_heads = self._config.num_heads, self._config.num_kv_heads
        qkv = layer.qkv.linear(x).view(len(x), heads + 2 * kv_heads, self._config.head_dim)
        rotary = qkv[:, : heads + kv_heads]
        normed = rotary if layer.qk_norm is None else layer.qk_norm(rotary)
        apply_rope(normed, step.cos, step.signed_sin, out=rotary)
        return qkv[:, :heads], qkv[:, heads:].to(cached)

    def _attend(self, query: Tensor, key_value: Tensor, cache: Tensor, step: _StepTensors, window: Window) -> Tensor:
        """-> [T, H * D]. Each row attends to its own sequence."""
        if not step.chunks and len(step.decodes) == 1:
            return attention.decode_attention(query, cache, step.decodes[0], window).flatten(1)
        out = torch.empty_like(query)
        for group in step.decodes:
            out[group.rows] = attention.decode_attention(query[group.rows], cache, group, window)
        for chunk in step.chunks:
            rows = slice(chunk.start, chunk.stop)
            out[rows] = attention.chunk_attention(query[rows], key_value[rows], cache, chunk, window)
        return out.flatten(1)
