"""Turn a step into tensors, run the model over the paged cache, and sample.

The KV cache is the tensor `[layers, blocks, 2, block_size, kv_heads, head_dim]` over the bytes of a transfer Region,
so what the model writes is what a transfer reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tercet.core import TokenEvent
from tercet.engine.sampler import sample
from tercet.engine.scheduler import Chunk, Step
from tercet.engine.sequence import Sequence
from tercet.models.batch import PrefillChunk, StepBatch
from tercet.models.transformer import Transformer
from tercet.transfer.layout import KvLayout
from tercet.transfer.region import Region

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def kv_layout(model: Transformer, blocks: int, block_size: int, dtype: str) -> KvLayout:
    config = model.config
    return KvLayout(config.num_layers, blocks, block_size, config.num_kv_heads, config.head_dim, dtype)


class Runner:
    def __init__(self, model: Transformer, region: Region) -> None:
        self._model = model
        self._block_size = region.layout.block_size
        flat = torch.frombuffer(region.view, dtype=DTYPES[region.layout.dtype])
        self.kv_cache = flat.view(region.layout.shape)

    @torch.inference_mode()
    def run(self, step: Step) -> list[tuple[Sequence, TokenEvent]]:
        """Compute the step's KV and sample a token for each sequence whose last token it computed."""
        batch, sampled = self._batch(step)
        pushes = [push for chunk in step.chunks if (push := self._push_of(chunk)) is not None]

        def on_layer(layer: int) -> None:
            for sequence, first, blocks in pushes:
                assert sequence.handoff is not None
                sequence.handoff.push(sequence.ticket, layer, first, blocks)

        logits = self._model.forward(batch, self.kv_cache, on_layer if pushes else None)
        return list(zip(sampled, sample(logits, sampled), strict=True)) if sampled else []

    def _batch(self, step: Step) -> tuple[StepBatch, list[Sequence]]:
        spans = [(s, s.computed, 1) for s in step.decodes] + [
            (c.sequence, c.sequence.computed, c.length) for c in step.chunks
        ]
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        sampled: list[Sequence] = []
        logit_rows: list[int] = []
        chunks: list[PrefillChunk] = []
        for number, (sequence, start, length) in enumerate(spans):
            if number >= len(step.decodes):
                context = start + length
                table = torch.tensor(sequence.blocks[: -(-context // self._block_size)])
                chunks.append(PrefillChunk(len(tokens), length, context, table))
            tokens += sequence.token_ids[start : start + length]
            positions += range(start, start + length)
            slots += self._slots(sequence, start, length)
            if start + length == len(sequence.token_ids):
                logit_rows.append(len(tokens) - 1)
                sampled.append(sequence)
        tables, lengths = self._decode_tables(step.decodes)
        batch = StepBatch(
            token_ids=torch.tensor(tokens),
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            num_decodes=len(step.decodes),
            decode_block_tables=tables,
            decode_context_lens=lengths,
            chunks=tuple(chunks),
            logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
        )
        return batch, sampled

    def _slots(self, sequence: Sequence, start: int, length: int) -> list[int]:
        size, blocks = self._block_size, sequence.blocks
        return [blocks[p // size] * size + p % size for p in range(start, start + length)]

    def _decode_tables(self, decodes: tuple[Sequence, ...]) -> tuple[Tensor, Tensor]:
        """Block tables padded with 0, and context lengths with the new token included."""
        lengths = [len(s.token_ids) for s in decodes]
        width = max((-(-n // self._block_size) for n in lengths), default=0)
        rows = [s.blocks[:width] + [0] * (width - len(s.blocks)) for s in decodes]
        return torch.tensor(rows, dtype=torch.int64).view(len(decodes), width), torch.tensor(lengths, dtype=torch.int64)

    def _push_of(self, chunk: Chunk) -> tuple[Sequence, int, list[int]] | None:
        """Blocks that this chunk completes, and with the prompt's last chunk its partial block too."""
        sequence = chunk.sequence
        if sequence.handoff is None:
            return None
        end = sequence.computed + chunk.length
        last = end == len(sequence.token_ids)
        complete = -(-end // self._block_size) if last else end // self._block_size
        first, sequence.pushed_blocks = sequence.pushed_blocks, complete
        if last:
            self._zero_tail(sequence.blocks[complete - 1], end)
        return (sequence, first, sequence.blocks[first:complete]) if complete > first else None

    def _zero_tail(self, block: int, tokens: int) -> None:
        """Nothing of an earlier owner of the block crosses to another worker."""
        used = tokens % self._block_size
        if used:
            self.kv_cache[:, block, :, used:] = 0
