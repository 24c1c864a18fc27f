"""The decoder layers by the native kernels: one call computes all of them, or one call each half of a layer, if there
are mixtures of experts or several ranks.

T rows of the batch   E hidden size
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tercet.distributed.collectives import Collectives
from tercet.kernels.native.layers import NativeLayer, NativeLayers, NativeShape, NativeStep
from tercet.kernels.native.linear import NativeLinear
from tercet.kernels.norm import RmsNorm
from tercet.kernels.rope import RopeTable
from tercet.models.batch import StepBatch
from tercet.models.config import ModelConfig
from tercet.models.layer import DenseMlp, GroupedQuery, Layer


class CompiledLayers:
    def __init__(self, config: ModelConfig, layers: tuple[Layer, ...], rope: RopeTable, tensor: Collectives) -> None:
        self._rope, self._count, self._tensor = rope, config.num_layers, tensor
        shape = NativeShape(config.num_heads, config.num_kv_heads, config.head_dim, config.rms_norm_eps, *rope.halves())
        windows = config.sliding_windows
        self._layers = NativeLayers(shape, [_native(*each) for each in zip(layers, windows, strict=True)])
        self._mlps = [(layer.mlp_norm, layer.mlp) for layer in layers]
        self._whole = tensor.size == 1 and all(isinstance(layer.mlp, DenseMlp) for layer in layers)

    @property
    def layers_done(self) -> int:
        return self._layers.layers_done

    def forward(self, x: Tensor, batch: StepBatch, kv_cache: Tensor, on_layer: Callable[[int], None] | None) -> Tensor:
        positions, turns = batch.positions, None
        if positions.dim() > 1:
            positions, turns = torch.arange(len(x)), self._rope.turns(positions)
        step = NativeStep(positions, batch.slots, _spans(batch), turns)
        if not self._whole:
            return self._forward_by_halves(x, step, batch, kv_cache, on_layer)
        images, done = batch.images, 0
        while images is not None and done < min(images.deeper, self._count):
            self._layers.forward(x, step, kv_cache, on_layer, range(done, done + 1))
            images.add_behind(done, x)
            done += 1
        self._layers.forward(x, step, kv_cache, on_layer, range(done, self._count))
        return x

    def _forward_by_halves(
        self,
        x: Tensor,
        step: NativeStep,
        batch: StepBatch,
        kv_cache: Tensor,
        on_layer: Callable[[int], None] | None,
    ) -> Tensor:
        """The residual is a part of the first rank's summand."""
        for layer in range(self._count):
            summand = self._summand(x)
            self._layers.attention_half(layer, x, summand, step, kv_cache, on_layer)
            x = self._tensor.all_reduce(summand)
            x = self._tensor.all_reduce(self._with_mlp(layer, x))
            if batch.images is not None:
                batch.images.add_behind(layer, x)
            self._layers.count()
        return x

    def _with_mlp(self, layer: int, x: Tensor) -> Tensor:
        """This rank's summand: its share of the MLP, of the first rank with the residual, x [T, E] -> [T, E]."""
        norm, mlp = self._mlps[layer]
        summand = self._summand(x)
        if isinstance(mlp, DenseMlp):
            self._layers.mlp_half(layer, x, summand)
        else:
            summand += mlp.forward(norm(x))
        return summand

    def _summand(self, x: Tensor) -> Tensor:
        return x if self._tensor.rank == 0 else torch.zeros_like(x)


def _spans(batch: StepBatch) -> Tensor:
    tables = batch.decode_block_tables
    at, width = tables.data_ptr(), tables.shape[1] * tables.element_size()
    decodes = [[row, 1, context, at + row * width] for row, context in enumerate(batch.decode_context_lens.tolist())]
    chunks = [[c.start_row, c.length, c.context, c.block_table.data_ptr()] for c in batch.chunks]
    return torch.tensor(decodes + chunks, dtype=torch.int64)


def _native(layer: Layer, window: int | None) -> NativeLayer:
    attention, mlp = layer.attention, layer.mlp
    assert isinstance(attention, GroupedQuery), "there are native kernels for no other attention"
    return NativeLayer(
        _weight(layer.attention_norm),
        None if attention.qk_norm is None else _weight(attention.qk_norm),
        _weight(layer.mlp_norm),
        _linear(attention.qkv),
        _linear(attention.output),
        _linear(mlp.gate_up) if isinstance(mlp, DenseMlp) else None,
        _linear(mlp.down) if isinstance(mlp, DenseMlp) else None,
        window,
    )


def _weight(norm: RmsNorm) -> Tensor:
    return norm.weight.float().contiguous()


def _linear(layer: object) -> NativeLinear:
    assert isinstance(layer, NativeLinear), "packed for other kernels"
    return layer
