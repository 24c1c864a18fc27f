"""The decoder, once for all families: Llama, SmolLM2, Mistral, Qwen2, Qwen3, Mixtral, Qwen3-MoE, DeepSeek-V2 and V3.
Config and weights differ.

    T rows of the batch   R rows whose logits are wanted   E hidden size   V vocabulary

A rank of a group has a share of it: some of the layers, and of each of them some heads and columns; of the vocabulary
some rows of the embedding and of the head.

Called by the engine's runner with a `StepBatch` and its KV cache. Activations have the kernels' `activation_dtype`,
the cache has a dtype of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tercet.distributed.collectives import Collectives
from tercet.distributed.place import share
from tercet.distributed.ranks import Ranks
from tercet.kernels.kinds import Kernels
from tercet.kernels.linear import PackedLinear
from tercet.kernels.norm import RmsNorm
from tercet.kernels.packing import activation_dtype
from tercet.kernels.rope import RopeTable
from tercet.kernels.routing_counts import RoutingCounts
from tercet.models.batch import StepBatch
from tercet.models.config import ModelConfig
from tercet.models.layer import Layer, MixtureMlp
from tercet.models.layers import Layers, TorchLayers
from tercet.models.native_layers import CompiledLayers
from tercet.models.rope_table import rope_table
from tercet.models.shard import Shard, kv_layout
from tercet.transfer.memory.layout import KvLayout


@dataclass(frozen=True)
class Weights:
    embedding: Tensor | None  # [V here, E]; None: not the first stage
    layers: tuple[Layer, ...]
    final_norm: RmsNorm | None  # None: not the last stage, which alone has these two
    head: PackedLinear | None  # E -> V here


def _layers_of(
    config: ModelConfig, kernels: Kernels
) -> Callable[[ModelConfig, tuple[Layer, ...], RopeTable, Collectives], Layers]:
    if config.latent is not None:
        return TorchLayers  # there are no other kernels for it; its linear layers are those of these kernels
    if kernels.kind == "triton":
        from tercet.models.triton_layers import TritonLayers  # it imports Triton, which other kernels do without

        return TritonLayers
    return CompiledLayers if kernels.native else TorchLayers


class Transformer:
    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        kernels: Kernels,
        dtype: torch.dtype,
        ranks: Ranks | None = None,
        routing: RoutingCounts | None = None,
    ) -> None:
        """config: of the whole model. ranks: None: this process computes all of it. routing: what its mixtures
        count."""
        self.config = config
        self.dtype = dtype  # of the KV cache
        self.device = kernels.device
        self.kernels = kernels
        self.ranks = ranks or Ranks()
        self.routing = routing
        self._weights = weights
        self._activations = activation_dtype(self.dtype, kernels)
        here, rope = Shard(config, self.ranks.place).here, rope_table(config, self.device)
        self._layers: Layers = _layers_of(config, kernels)(here, weights.layers, rope, self.ranks.tensor)

    @property
    def layers_done(self) -> int:
        """Over all steps; grows during a step. Any thread."""
        return self._layers.layers_done

    @property
    def mixtures(self) -> dict[int, MixtureMlp]:
        """Layer of the model -> its mixture, of those that are here."""
        return {layer.mlp.layer: layer.mlp for layer in self._weights.layers if isinstance(layer.mlp, MixtureMlp)}

    @property
    def captures(self) -> bool:
        """Whether a decode step can be captured as a graph, since it does not wait for the device."""
        return self.kernels.kind == "triton" and self.config.latent is None

    def kv_layout(self, blocks: int, block_size: int) -> KvLayout:
        """Of a KV cache for this model."""
        dtype = str(self.dtype).removeprefix("torch.")
        return kv_layout(self.config, self.ranks.place, blocks, block_size, dtype)

    @torch.inference_mode()
    def forward(self, batch: StepBatch, kv_cache: Tensor, on_layer: Callable[[int], None] | None = None) -> Tensor:
        """-> logits [R, V] float32. Writes the cache and calls on_layer as `Layers.forward` does. Not for groups."""
        logits = self.logits(self.hidden(batch, kv_cache, on_layer)[batch.logit_rows])
        assert logits is not None, "some ranks of a group get no logits"
        return logits

    @torch.inference_mode()
    def hidden(self, batch: StepBatch, kv_cache: Tensor, on_layer: Callable[[int], None] | None = None) -> Tensor:
        """-> the last layer's output for each row, [T, E]; of the last of those that are here, if there are stages."""
        x = self._layers.forward(self._input(batch), batch, kv_cache, on_layer)
        if not self.ranks.place.is_last:
            assert self.ranks.stages is not None
            self.ranks.stages.send(x)
        return x

    def _input(self, batch: StepBatch) -> Tensor:
        if self._weights.embedding is None:
            assert self.ranks.stages is not None
            rows, width = len(batch.token_ids), self.config.hidden_size
            return self.ranks.stages.receive(rows, width, self._activations, self.device)
        x = self._embedded(batch.token_ids, self._weights.embedding).to(self._activations)
        if batch.images is not None:
            batch.images.replace(x)
        return x

    def _embedded(self, token_ids: Tensor, embedding: Tensor) -> Tensor:
        """Each rank looks up the ids that it has, and has zeros for the others."""
        tensor = self.ranks.tensor
        if tensor.size == 1:
            return embedding[token_ids]
        here = share(self.config.vocab_size, tensor.rank, tensor.size)
        elsewhere = (token_ids < here.start) | (token_ids >= here.stop)
        x = embedding[(token_ids - here.start).masked_fill(elsewhere, 0)]
        return tensor.all_reduce(x.masked_fill_(elsewhere.unsqueeze(1), 0))

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor | None:
        """[R, E] -> [R, V] float32; None where another rank gets them. For the ranks of the last stage."""
        assert self._weights.final_norm is not None
        assert self._weights.head is not None
        tensor, parts = self.ranks.tensor, self._weights.head.linear(self._weights.final_norm(hidden)).float()
        if tensor.size == 1:
            return parts
        counts = [len(share(self.config.vocab_size, rank, tensor.size)) for rank in range(tensor.size)]
        gathered = tensor.gather(functional.pad(parts, (0, max(counts) - parts.shape[1])))
        if gathered is None:
            return None
        return torch.cat([part[:, :count] for part, count in zip(gathered, counts, strict=True)], 1)
