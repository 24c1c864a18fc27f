"""The decoder, once for all families: Llama, SmolLM2, Mistral, Qwen2, Qwen3, Mixtral, Qwen3-MoE, DeepSeek-V2 and V3.
Config and weights differ.

    T rows of the batch   R rows whose logits are wanted   E hidden size

Called by the engine's runner with a `StepBatch` and its KV cache. Activations have the kernels' `activation_dtype`,
the cache has a dtype of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tercet.kernels.kinds import Kernels
from tercet.kernels.linear import PackedLinear
from tercet.kernels.norm import RmsNorm
from tercet.kernels.packing import activation_dtype
from tercet.kernels.rope import RopeTable
from tercet.models.batch import StepBatch
from tercet.models.config import ModelConfig
from tercet.models.layer import Layer
from tercet.models.layers import Layers, TorchLayers
from tercet.models.native_layers import CompiledLayers
from tercet.models.rope_table import rope_table
from tercet.transfer.memory.layout import KvLayout


@dataclass(frozen=True)
class Weights:
    embedding: Tensor  # [vocab, E]
    layers: tuple[Layer, ...]
    final_norm: RmsNorm
    head: PackedLinear  # E -> vocab


def _layers_of(config: ModelConfig, kernels: Kernels) -> Callable[[ModelConfig, tuple[Layer, ...], RopeTable], Layers]:
    if config.latent is not None:
        return TorchLayers  # there are no other kernels for it; its linear layers are those of these kernels
    if kernels.kind == "triton":
        from tercet.models.triton_layers import TritonLayers  # it imports Triton, which other kernels do without

        return TritonLayers
    return CompiledLayers if kernels.native else TorchLayers


class Transformer:
    def __init__(self, config: ModelConfig, weights: Weights, kernels: Kernels, dtype: torch.dtype) -> None:
        self.config = config
        self.dtype = dtype  # of the KV cache
        self.device = weights.embedding.device
        self.kernels = kernels
        self._weights = weights
        self._activations = activation_dtype(self.dtype, kernels)
        self._layers: Layers = _layers_of(config, kernels)(config, weights.layers, rope_table(config, self.device))

    @property
    def layers_done(self) -> int:
        """Over all steps; grows during a step. Any thread."""
        return self._layers.layers_done

    def kv_layout(self, blocks: int, block_size: int) -> KvLayout:
        """Of a KV cache for this model."""
        config, dtype = self.config, str(self.dtype).removeprefix("torch.")
        heads, dim, parts = config.num_kv_heads, config.head_dim, config.kv_parts
        return KvLayout(config.num_layers, blocks, block_size, heads, dim, dtype, parts=parts)

    @torch.inference_mode()
    def forward(self, batch: StepBatch, kv_cache: Tensor, on_layer: Callable[[int], None] | None = None) -> Tensor:
        """-> logits [R, vocab] float32. Writes the cache and calls on_layer as `Layers.forward` does."""
        return self.logits(self.hidden(batch, kv_cache, on_layer)[batch.logit_rows])

    @torch.inference_mode()
    def hidden(self, batch: StepBatch, kv_cache: Tensor, on_layer: Callable[[int], None] | None = None) -> Tensor:
        """-> the last layer's output for each row, [T, E]."""
        x = self._weights.embedding[batch.token_ids].to(self._activations)
        if batch.images is not None:
            batch.images.replace(x)
        return self._layers.forward(x, batch, kv_cache, on_layer)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[R, E] -> [R, vocab] float32."""
        return self._weights.head.linear(self._weights.final_norm(hidden)).float()
