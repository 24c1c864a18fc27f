"""Multi-head latent attention of a layer (DeepSeek-V2, arXiv:2405.04434, section 2.1), by torch's operations.

T rows of the batch   E hidden size   H heads   R rank of the latent   P rotary, N plain, V value dimension of a head
C = R + P
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tercet.kernels import attention, latent
from tercet.kernels.attention import ChunkPlan, DecodeGroup, Window
from tercet.kernels.rope import RopeTable, apply_rope
from tercet.models.batch import StepBatch
from tercet.models.config import LatentConfig
from tercet.models.layer import GroupedQuery, Latent


@dataclass(frozen=True)
class LatentStep:
    """What all layers of one step share, and the attention of each."""

    config: LatentConfig
    cos: Tensor  # [T, 1, P]
    signed_sin: Tensor
    slots: Tensor  # [T]
    decodes: list[DecodeGroup]
    chunks: list[ChunkPlan]

    def attend(
        self, layer: GroupedQuery | Latent, x: Tensor, cache: Tensor, window: Window, written: Callable[[], None]
    ) -> Tensor:
        """normed x [T, E] -> behind the output projection, before the residual is added, [T, E]. cache: the layer's
        [blocks, 1, block size, 1, C]; written() is called once its latents are there."""
        assert isinstance(layer, Latent)
        assert window is None
        query, latents = self._query(layer, x), self._latents(layer, x).to(cache.dtype)
        latent.write_latents(cache, self.slots, latents)
        written()
        attended = self._attend(query, latents, cache)
        values = torch.einsum("thr,hvr->thv", attended, layer.value_up)
        return layer.output.linear(values.flatten(1))

    def _query(self, layer: Latent, x: Tensor) -> Tensor:
        """-> [T, H, C]: the plain part behind the transpose of the key's projection, and the rotated part."""
        if layer.query_down is not None and layer.query_norm is not None:
            x = layer.query_norm(layer.query_down.linear(x))
        heads, rank = len(layer.key_up), self.config.rank
        made = layer.query.linear(x).view(len(x), heads, self.config.plain_dim + self.config.rotary_dim)
        plain, rotary = torch.split(made, [self.config.plain_dim, self.config.rotary_dim], -1)
        query = x.new_empty(len(x), heads, rank + self.config.rotary_dim)
        query[..., :rank] = torch.einsum("thn,hnr->thr", plain, layer.key_up)
        apply_rope(rotary, self.cos, self.signed_sin, out=query[..., rank:])
        return query

    def _latents(self, layer: Latent, x: Tensor) -> Tensor:
        """-> [T, C]: what the cache holds."""
        made, rank = layer.latent.linear(x), self.config.rank
        out = torch.empty_like(made)
        out[:, :rank] = layer.latent_norm(made[:, :rank])
        apply_rope(made[:, None, rank:], self.cos, self.signed_sin, out=out[:, None, rank:])
        return out

    def _attend(self, query: Tensor, latents: Tensor, cache: Tensor) -> Tensor:
        """-> [T, H, R]. Each row attends to its own sequence."""
        rank, scale = self.config.rank, self.config.softmax_scale
        out = query.new_empty(*query.shape[:2], rank)
        for group in self.decodes:
            out[group.rows] = latent.decode_attention(query[group.rows], cache, group, rank, scale)
        for chunk in self.chunks:
            rows = slice(chunk.start, chunk.stop)
            out[rows] = latent.chunk_attention(query[rows], latents[rows], cache, chunk, rank, scale)
        return out


def plan_latent(
    config: LatentConfig, rope: RopeTable, batch: StepBatch, block_size: int, dtype: torch.dtype
) -> LatentStep:
    """dtype: of the activations."""
    tables, contexts = batch.decode_block_tables, batch.decode_context_lens
    return LatentStep(
        config,
        *rope.rows(batch.positions, dtype),
        batch.slots,
        attention.plan_decodes(tables, contexts, block_size, [None], parts=1),
        [attention.plan_chunk(c.start_row, c.length, c.context, c.block_table, (), parts=1) for c in batch.chunks],
    )
