"""The decoder layers by torch's operations, and what layers by other kernels do as well.

T rows of the batch   E hidden size   Hkv key-value heads   D head dimension
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from tercet.distributed.collectives import Collectives
from tercet.kernels.rope import RopeTable
from tercet.models.batch import StepBatch
from tercet.models.config import ModelConfig
from tercet.models.grouped_query import GroupedQueryStep, plan_grouped_query
from tercet.models.latent import LatentStep, plan_latent
from tercet.models.layer import Layer


class Layers(Protocol):
    """Those of a model that are here, with the heads and columns that are. The tensor ranks sum what each half of a
    layer makes."""

    @property
    def layers_done(self) -> int:
        """Over all steps; grows during a step. Any thread."""

    def forward(self, x: Tensor, batch: StepBatch, kv_cache: Tensor, on_layer: Callable[[int], None] | None) -> Tensor:
        """x [T, E], which may be overwritten -> the last layer's output, [T, E]. Writes kv_cache [layers, blocks,
        parts, block size, Hkv, D]; the parts are K and V, or one for latents.

        on_layer(i) is called once layer i's K and V of this batch are in the cache, before the layer has finished.
        """


class TorchLayers:
    def __init__(self, config: ModelConfig, layers: tuple[Layer, ...], rope: RopeTable, tensor: Collectives) -> None:
        self._config, self._layers, self._rope, self._tensor = config, layers, rope, tensor
        self.layers_done = 0

    def forward(self, x: Tensor, batch: StepBatch, kv_cache: Tensor, on_layer: Callable[[int], None] | None) -> Tensor:
        step = self._plan(batch, kv_cache.shape[3], x.dtype)
        for i, (layer, window) in enumerate(zip(self._layers, self._config.sliding_windows, strict=True)):
            written = _nobody if on_layer is None else partial(on_layer, i)
            attended = step.attend(layer.attention, layer.attention_norm(x), kv_cache[i], window, written)
            x = self._tensor.all_reduce(attended).add_(x)
            x = self._tensor.all_reduce(layer.mlp.forward(layer.mlp_norm(x))).add_(x)
            if batch.images is not None:
                batch.images.add_behind(i, x)
            self.layers_done += 1
        return x

    def _plan(self, batch: StepBatch, block_size: int, dtype: torch.dtype) -> GroupedQueryStep | LatentStep:
        config = self._config
        if config.latent is not None:
            return plan_latent(config.latent, self._rope, batch, block_size, dtype)
        return plan_grouped_query(config, self._rope, batch, block_size, dtype)


def _nobody() -> None:
    """Told of a layer that is written."""
