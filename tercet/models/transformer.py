"""The Llama family's decoder, once for all of them: Llama, SmolLM2, Mistral, Qwen2, Qwen3. Config and weights differ.

    T rows of the batch   R rows whose logits are wanted   E hidden size
    H query heads   Hkv key-value heads   D head dimension

Called by the engine's runner with a `StepBatch` and its KV cache. Activations have `compute_dtype` of the weights,
the cache has the weights' dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tercet.kernels import attention
from tercet.kernels.activation import silu_and_mul
from tercet.kernels.attention import ChunkPlan, DecodeGroup, Window
from tercet.kernels.linear import PackedLinear, compute_dtype
from tercet.kernels.norm import RmsNorm
from tercet.kernels.rope import apply_rope
from tercet.models.batch import StepBatch
from tercet.models.config import ModelConfig
from tercet.models.rope_table import rope_table
from tercet.transfer.memory.layout import KvLayout


@dataclass(frozen=True)
class Layer:
    attention_norm: RmsNorm
    qkv: PackedLinear  # E -> (H + 2 Hkv) * D: queries, keys, values
    qk_norm: RmsNorm | None  # weight [H + Hkv, D]
    output: PackedLinear  # H * D -> E
    mlp_norm: RmsNorm
    gate_up: PackedLinear  # E -> 2 * intermediate: gate, up
    down: PackedLinear


@dataclass(frozen=True)
class Weights:
    embedding: Tensor  # [vocab, E]
    layers: tuple[Layer, ...]
    final_norm: RmsNorm
    head: PackedLinear  # E -> vocab


@dataclass(frozen=True)
class _StepTensors:
    """What all layers of one step share."""

    cos: Tensor  # [T, 1, D]
    signed_sin: Tensor
    cache_rows: Tensor  # [2 T]
    decodes: list[DecodeGroup]
    chunks: list[ChunkPlan]


class Transformer:
    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self.dtype = weights.embedding.dtype  # of the weights and of the KV cache
        self._weights = weights
        self.device = weights.embedding.device
        self._compute_dtype = compute_dtype(self.dtype, self.device)
        self._rope = rope_table(config, self.device)
        self._windows: list[Window] = list(dict.fromkeys(config.sliding_windows))

    def kv_layout(self, blocks: int, block_size: int) -> KvLayout:
        """Of a KV cache for this model."""
        config, dtype = self.config, str(self.dtype).removeprefix("torch.")
        return KvLayout(config.num_layers, blocks, block_size, config.num_kv_heads, config.head_dim, dtype)

    @torch.inference_mode()
    def forward(self, batch: StepBatch, kv_cache: Tensor, on_layer: Callable[[int], None] | None = None) -> Tensor:
        """-> logits [R, vocab] float32. Writes the cache and calls on_layer as `hidden` does."""
        return self.logits(self.hidden(batch, kv_cache, on_layer)[batch.logit_rows])

    @torch.inference_mode()
    def hidden(self, batch: StepBatch, kv_cache: Tensor, on_layer: Callable[[int], None] | None = None) -> Tensor:
        """-> the last layer's output for each row, [T, E]. Writes kv_cache [layers, blocks, 2, block size, Hkv, D].

        on_layer(i) is called once layer i's K and V of this batch are in the cache, before the layer has finished.
        """
        step = self._plan(batch, kv_cache.shape[3])
        x = self._weights.embedding[batch.token_ids].to(self._compute_dtype)
        for i, layer in enumerate(self._weights.layers):
            query, key_value = self._project(layer, x, step)
            attention.write_kv(kv_cache[i], step.cache_rows, key_value)
            if on_layer is not None:
                on_layer(i)
            attended = self._attend(query, key_value, kv_cache[i], step, self.config.sliding_windows[i])
            x = layer.output.linear(attended).add_(x)
            x = layer.down.linear(silu_and_mul(layer.gate_up.linear(layer.mlp_norm(x)))).add_(x)
        return x

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[R, E] -> [R, vocab] float32."""
        return self._weights.head.linear(self._weights.final_norm(hidden)).float()

    def _plan(self, batch: StepBatch, block_size: int) -> _StepTensors:
        cos, signed_sin = self._rope.rows(batch.positions, self._compute_dtype)
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

    def _project(self, layer: Layer, x: Tensor, step: _StepTensors) -> tuple[Tensor, Tensor]:
        """x [T, E] -> query [T, H, D] in the compute dtype, keys and values [T, 2 Hkv, D] in the cache's."""
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        qkv = layer.qkv.linear(layer.attention_norm(x)).view(len(x), heads + 2 * kv_heads, self.config.head_dim)
        rotary = qkv[:, : heads + kv_heads]
        normed = rotary if layer.qk_norm is None else layer.qk_norm(rotary)
        apply_rope(normed, step.cos, step.signed_sin, out=rotary)
        return qkv[:, :heads], qkv[:, heads:].to(self.dtype)

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
