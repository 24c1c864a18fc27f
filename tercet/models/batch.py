"""What one engine step computes: the engine makes it, `Transformer.forward` runs it.

Rows of the flat token batch (T of them): D decodes first, one row each, then the rows of each prefill chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class PrefillChunk:
    """One contiguous piece of one prompt. It covers the positions context - length .. context - 1."""

    start_row: int  # its first row in the flat token batch
    length: int  # rows
    context: int  # tokens in the cache once this chunk is written
    block_table: Tensor  # [ceil(context / block_size)] int64


@dataclass(frozen=True)
class ImageRows:
    """Rows of the batch at which an image stands, and what stands there in place of their tokens."""

    rows: Tensor  # [M] int64
    embeddings: Tensor  # [levels, M, E]: the input, then what is added behind each of the first layers

    @property
    def deeper(self) -> int:
        """Layers behind which something is added."""
        return len(self.embeddings) - 1

    def replace(self, x: Tensor) -> None:
        """x [T, E], the batch's input."""
        x[self.rows] = self.embeddings[0].to(x.dtype)

    def add_behind(self, layer: int, x: Tensor) -> None:
        """x [T, E], the layer's output."""
        if layer < self.deeper:
            x[self.rows] += self.embeddings[layer + 1].to(x.dtype)


@dataclass(frozen=True)
class StepBatch:
    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64; or [3, T], if an image is in a batch of a model with M-RoPE
    slots: Tensor  # [T] int64, block * block_size + offset: where each row's K and V are written
    num_decodes: int  # D
    decode_block_tables: Tensor  # [D, max_blocks] int64, padded with 0
    decode_context_lens: Tensor  # [D] int64, the new token included
    chunks: tuple[PrefillChunk, ...]
    logit_rows: Tensor  # [R] int64, rows whose logits are wanted
    # [2 N + 1] int64 of the N chunks: their first rows, the last one's end, and their contexts. Triton's layers read it
    chunk_bounds: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    images: ImageRows | None = None
