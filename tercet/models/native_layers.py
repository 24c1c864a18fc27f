"""The decoder layers by the native kernels: one call computes all of them, or one call each half of a layer, if there
are mixtures of experts.

T rows of the batch   E hidden size
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tercet.kernels.native.layers import NativeLayer, NativeLayers, NativeShape, NativeStep
from tercet.kernels.native.linear import NativeLinear
from tercet.kernels.norm import RmsNorm
from tercet.kernels.rope import RopeTable
from tercet.models.batch import StepBatch
from tercet.models.config import ModelConfig
from tercet.models.layer import DenseMlp, GroupedQuery, Layer


class CompiledLayers:
    def __init__(self, config: ModelConfig, layers: tuple[Layer, ...], rope: RopeTable) -> None:
        self._rope, self._count = rope, config.num_layers
        shape = NativeShape(config.num_heads, config.num_kv_heads, config.head_dim, config.rms_norm_eps, *rope.halves())
        windows = config.sliding_windows
        self._layers = NativeLayers(shape, [_native(*each) for each in zip(layers, windows, strict=True)])
        self._mlps, self._norms = [layer.mlp for layer in layers], [layer.mlp_norm for layer in layers]
        self._all_dense = all(isinstance(mlp, DenseMlp) for mlp in self._mlps)
        self._done_by_halves = 0

    @property
    def layers_done(self) -> int:
        return self._layers.layers_done + self._done_by_halves

    def forward(self, x: Tensor, batch: StepBatch, kv_cache: Tensor, on_layer: Callable[[int], None] | None) -> Tensor:
        positions, turns = batch.positions, None
        if positions.dim() > 1:
            positions, turns = torch.arange(len(x)), self._rope.turns(positions)
        step = NativeStep(positions, batch.slots, _spans(batch), turns)
        if not self._all_dense:
            return self._by_halves(x, step, batch, kv_cache, on_layer)
        images, done = batch.images, 0
        while images is not None and done < min(images.deeper, self._count):
            self._layers.forward(x, step, kv_cache, on_layer, range(done, done + 1))
            images.add_behind(done, x)
            done += 1
        self._layers.forward(x, step, kv_cache, on_layer, range(done, self._count))
        return x

    def _by_halves(
        self,
        x: Tensor,
        step: NativeStep,
        batch: StepBatch,
        kv_cache: Tensor,
        on_layer: Callable[[int], None] | None,
    ) -> Tensor:
        for i in range(self._count):
            update = torch.zeros_like(x)
            self._layers.attention_half(i, x, update, step, kv_cache, on_layer)
            x += update
            x += self._mlp(i, x)
            if batch.images is not None:
                batch.images.add_behind(i, x)
            self._done_by_halves += 1
        return x

    def _mlp(self, i: int, x: Tensor) -> Tensor:
        """Of layer i, with its norm, before the residual is added: x [T, E] -> [T, E]."""
        mlp = self._mlps[i]
        if not isinstance(mlp, DenseMlp):
            return mlp.forward(self._norms[i](x))
        update = torch.zeros_like(x)
        self._layers.mlp_half(i, x, update)
        return update


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
