"""The decoder layers by the Triton kernels, on a GPU. Nothing here waits for the device.

T rows of the batch   D decodes, the first rows   N prefill chunks   E hidden size
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tercet.distributed.collectives import Collectives
from tercet.kernels.norm import RmsNorm
from tercet.kernels.rope import RopeTable
from tercet.kernels.triton.activation import silu_and_mul
from tercet.kernels.triton.decode import DecodePlan, attend_into, plan_decode
from tercet.kernels.triton.prefill import prefill_attention
from tercet.kernels.triton.rms_norm import add_rms_norm, rms_norm
from tercet.kernels.triton.rope import rope_and_write
from tercet.kernels.triton.row_linear import MOST_ROWS, Norm, row_linear
from tercet.models.batch import StepBatch
from tercet.models.config import ModelConfig
from tercet.models.layer import DenseMlp, GroupedQuery, Layer

Window = int | None
PROGRAMS_OF_AN_SM = 2  # of the decode kernel, whose shared memory is sized for it
PROGRAMS_WITHOUT = 4  # where there is no GPU


@dataclass(frozen=True)
class _Decodes:
    """The step's decodes: all layers with the same window share a plan."""

    count: int
    tables: Tensor  # [D, max_blocks] int32
    contexts: Tensor  # [D] int32
    plans: dict[Window, DecodePlan]


@dataclass(frozen=True)
class _Chunks:
    tables: Tensor  # [N, max_blocks] int32, padded with 0
    starts: Tensor  # [N + 1] int32
    contexts: Tensor  # [N] int32
    most_rows: int


@dataclass(frozen=True)
class _Step:
    """What all layers of one step share."""

    cos: Tensor  # [T, head dimension / 2] float32
    sin: Tensor
    slots: Tensor  # [T] int64
    decodes: _Decodes | None
    chunks: _Chunks | None


@dataclass(frozen=True)
class Hidden:
    """A layer's input: the sum of both."""

    residual: Tensor  # [T, E]
    update: Tensor | None  # [T, E]


class TritonLayers:
    def __init__(self, config: ModelConfig, layers: tuple[Layer, ...], rope: RopeTable, tensor: Collectives) -> None:
        self._config, self._tensor = config, tensor
        self._layers = [(layer, _grouped_query(layer)) for layer in layers]
        self._rope = rope
        self._programs = decode_programs(rope.device)
        self.layers_done = 0

    def forward(self, x: Tensor, batch: StepBatch, kv_cache: Tensor, on_layer: Callable[[int], None] | None) -> Tensor:
        step = self._plan(batch, kv_cache.shape[3])
        halves = _RowHalves if len(x) <= MOST_ROWS and self._tensor.size == 1 else _Halves
        hidden = Hidden(x, None)
        for i, ((layer, attention), window) in enumerate(zip(self._layers, self._config.sliding_windows, strict=True)):
            projected, hidden = halves.project(layer.attention_norm, attention, hidden)
            qkv = self._normed(attention, projected)
            rope_and_write(qkv, step.cos, step.sin, kv_cache[i], step.slots, self._config.num_kv_heads)
            if on_layer is not None:
                on_layer(i)
            attended = _attend(qkv[:, : self._config.num_heads], kv_cache[i], step, window)
            hidden = self._summed(halves.output(attention, attended.flatten(1), hidden))
            hidden = self._summed(halves.mlp(layer, hidden))
            if batch.images is not None:
                batch.images.add_behind(i, hidden.residual)
            self.layers_done += 1
        return hidden.residual if hidden.update is None else hidden.update.add_(hidden.residual)

    def _summed(self, half: Hidden) -> Hidden:
        """Over the ranks of a group; of one rank it may have no update."""
        return half if half.update is None else Hidden(half.residual, self._tensor.all_reduce(half.update))

    def _plan(self, batch: StepBatch, block_size: int) -> _Step:
        decodes = self._plan_decodes(batch, block_size) if batch.num_decodes else None
        chunks = _plan_chunks(batch) if batch.chunks else None
        return _Step(*self._rope.turns(batch.positions), batch.slots, decodes, chunks)

    def _plan_decodes(self, batch: StepBatch, block_size: int) -> _Decodes:
        tables, contexts = batch.decode_block_tables.int(), batch.decode_context_lens.int()
        most = tables.shape[1] * block_size  # the longest context itself is known on the device only
        plans = {
            window: plan_decode(
                contexts, self._config.num_kv_heads, most_context=most, window=window, programs=self._programs
            )
            for window in set(self._config.sliding_windows)
        }
        return _Decodes(batch.num_decodes, tables, contexts, plans)

    def _normed(self, layer: GroupedQuery, projected: Tensor) -> Tensor:
        """-> queries, keys and values, [T, H + 2 Hkv, head dimension]."""
        heads, kv_heads = self._config.num_heads, self._config.num_kv_heads
        qkv = projected.view(len(projected), heads + 2 * kv_heads, self._config.head_dim)
        if (norm := layer.qk_norm) is not None:
            rotary = qkv[:, : heads + kv_heads]
            rotary.copy_(rms_norm(rotary, norm.weight, norm.eps))
        return qkv


def decode_programs(device: torch.device) -> int:
    """How many programs share a step's decodes."""
    if device.type != "cuda":
        return PROGRAMS_WITHOUT
    return PROGRAMS_OF_AN_SM * int(torch.cuda.get_device_properties(device).multi_processor_count)


def _plan_chunks(batch: StepBatch) -> _Chunks:
    """Their rows follow each other."""
    chunks, bounds = batch.chunks, batch.chunk_bounds.int()
    tables = pad_sequence([chunk.block_table for chunk in chunks], batch_first=True).int()
    starts, contexts = bounds[: len(chunks) + 1], bounds[len(chunks) + 1 :]
    return _Chunks(tables, starts, contexts, max(chunk.length for chunk in chunks))


# ---- what stands before and behind a layer's attention


class _Halves:
    """Each half's result is the update of what is returned: the residual is added by the next norm."""

    @staticmethod
    def project(norm: RmsNorm, layer: GroupedQuery, x: Hidden) -> tuple[Tensor, Hidden]:
        """-> what `layer.qkv` makes of the layer's normed input, [T, (H + 2 Hkv) * head dimension], and x."""
        normed, residual = _add_and_norm(norm, x)
        return layer.qkv.linear(normed), Hidden(residual, None)

    @staticmethod
    def output(layer: GroupedQuery, attended: Tensor, x: Hidden) -> Hidden:
        """attended [T, H * head dimension]; x as `project` gives it -> the input of the layer's MLP."""
        return Hidden(x.residual, layer.output.linear(attended))

    @staticmethod
    def mlp(layer: Layer, x: Hidden) -> Hidden:
        """-> the layer's output."""
        normed, residual = _add_and_norm(layer.mlp_norm, x)
        if not isinstance(layer.mlp, DenseMlp):
            return Hidden(residual, layer.mlp.forward(normed))
        return Hidden(residual, layer.mlp.down.linear(silu_and_mul(layer.mlp.gate_up.linear(normed))))


class _RowHalves:
    """As `_Halves`, for few rows: each half's result is returned with the residual added."""

    @staticmethod
    def project(norm: RmsNorm, layer: GroupedQuery, x: Hidden) -> tuple[Tensor, Hidden]:
        return row_linear(x.residual, layer.qkv.weight, layer.qkv.bias, norm=_norm(norm)), x

    @staticmethod
    def output(layer: GroupedQuery, attended: Tensor, x: Hidden) -> Hidden:
        output = layer.output
        return Hidden(row_linear(attended, output.weight, output.bias, residual=x.residual), None)

    @staticmethod
    def mlp(layer: Layer, x: Hidden) -> Hidden:
        if not isinstance(layer.mlp, DenseMlp):
            normed, residual = _add_and_norm(layer.mlp_norm, x)
            return Hidden(layer.mlp.forward(normed).add_(residual), None)
        gate_up, down = layer.mlp.gate_up, layer.mlp.down
        gated = row_linear(x.residual, gate_up.weight, gate_up.bias, norm=_norm(layer.mlp_norm), gated=True)
        return Hidden(row_linear(gated, down.weight, down.bias, residual=x.residual), None)


def _grouped_query(layer: Layer) -> GroupedQuery:
    assert isinstance(layer.attention, GroupedQuery), "there are Triton kernels for no other attention"
    return layer.attention


def _norm(norm: RmsNorm) -> Norm:
    return Norm(norm.weight, norm.eps)


def _add_and_norm(norm: RmsNorm, x: Hidden) -> tuple[Tensor, Tensor]:
    """-> the norm of the sum, and the sum."""
    if x.update is None:
        return rms_norm(x.residual, norm.weight, norm.eps), x.residual
    return add_rms_norm(x.update, x.residual, norm.weight, norm.eps)


def _attend(query: Tensor, cache: Tensor, step: _Step, window: Window) -> Tensor:
    """query [T, H, head dimension] -> the same shape. Each row attends to its own sequence."""
    if step.chunks is None:
        out = query.new_empty(query.shape)
    else:  # it leaves the decodes' rows undefined
        chunks = step.chunks
        out = prefill_attention(
            query, cache, chunks.tables, chunks.starts, chunks.contexts, most_rows=chunks.most_rows, window=window
        )
    if step.decodes is not None:
        decodes = step.decodes
        rows = slice(0, decodes.count)
        attend_into(
            out[rows], None, query[rows], cache, decodes.tables, decodes.contexts, decodes.plans[window], None, None
        )
    return out
