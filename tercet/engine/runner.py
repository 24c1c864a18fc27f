"""Turn a step into tensors, run the model over the paged cache, and sample.

The KV cache is the tensor `[layers, blocks, 2, block_size, kv_heads, head_dim]` over the bytes of a transfer Region,
so what the model writes is what a transfer reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tercet.core import PromptScore, TokenEvent
from tercet.engine.sampler import sample, score
from tercet.engine.scheduler import Chunk, Step
from tercet.engine.sequence import Sequence
from tercet.errors import EngineFault
from tercet.models.batch import PrefillChunk, StepBatch
from tercet.models.transformer import Transformer
from tercet.transfer.memory.layout import KvLayout
from tercet.transfer.memory.region import Region

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def kv_layout(model: Transformer, blocks: int, block_size: int, dtype: str) -> KvLayout:
    config = model.config
    return KvLayout(config.num_layers, blocks, block_size, config.num_kv_heads, config.head_dim, dtype)


SCORE_ROWS = 64  # of a prompt at a time: logits of a whole one would be gigabytes


@dataclass(frozen=True)
class Computed:
    """What a step has brought."""

    outcomes: dict[Sequence, TokenEvent | EngineFault]  # the next token, or why there is none
    scores: dict[Sequence, list[PromptScore]] = field(default_factory=dict)  # of the prompt's next tokens, if wanted


class Runner:
    def __init__(self, model: Transformer, region: Region) -> None:
        self._model = model
        self._block_size = region.layout.block_size
        self.layers_done = 0  # of all steps together; grows while a step runs
        flat = torch.frombuffer(region.view, dtype=DTYPES[region.layout.dtype])
        self.kv_cache = flat.view(region.layout.shape)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: the token ids that the model knows."""
        return self._model.config.vocab_size

    @torch.inference_mode()
    def run(self, step: Step) -> Computed:
        """Compute the step's KV and sample a token for each sequence whose last token it computed. Changes no
        sequence, so that the same step may run again."""
        batch, sampled = self._batch(step)
        if not any(chunk.sequence.wants_scores for chunk in step.chunks):
            logits = self._model.forward(batch, self.kv_cache, self._on_layer(step.chunks))
            return Computed(_outcomes(logits, sampled))
        hidden = self._model.hidden(batch, self.kv_cache, self._on_layer(step.chunks))
        computed = Computed(_outcomes(self._model.logits(hidden[batch.logit_rows]), sampled))
        for rows, chunk in zip(batch.chunks, step.chunks, strict=True):
            if chunk.sequence.wants_scores:
                self._score(chunk, hidden[rows.start_row :], computed)
        return computed

    @torch.inference_mode()
    def check(self) -> None:
        """Compute a token of nobody's, in a cache of its own. Raises what the model raises: no request is at fault."""
        zero, one = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
        batch = StepBatch(zero, zero, zero, 1, zero.view(1, 1), one, (), zero)
        self._model.forward(batch, torch.zeros_like(self.kv_cache[:, :1]))

    def _score(self, chunk: Chunk, hidden: Tensor, computed: Computed) -> None:
        """The logprobs of the prompt's tokens that follow those of the chunk. hidden: of the chunk's rows, and more."""
        sequence, start = chunk.sequence, chunk.sequence.computed
        follow = sequence.token_ids[start + 1 : start + chunk.length + 1]
        scores: list[PromptScore] = []
        for at in range(0, len(follow), SCORE_ROWS):
            wanted = follow[at : at + SCORE_ROWS]
            logits = self._model.logits(hidden[at : at + len(wanted)])
            if not logits.amax().isfinite():
                computed.outcomes[sequence] = EngineFault("the model's logits for the prompt are not finite numbers")
                return
            scores += score(logits, wanted, sequence.params.prompt_logprobs or 0)
        computed.scores[sequence] = scores

    def _batch(self, step: Step) -> tuple[StepBatch, list[Sequence]]:
        """-> the batch and, for each of its logit rows, the sequence that it is for."""
        tokens = [s.token_ids[-1] for s in step.decodes]
        positions = [len(s.token_ids) - 1 for s in step.decodes]
        slots = [slot for s in step.decodes for slot in self._slots(s, len(s.token_ids) - 1, 1)]
        logit_rows, sampled = list(range(len(tokens))), list(step.decodes)
        chunks = []
        for chunk in step.chunks:
            sequence, start, length = chunk.sequence, chunk.sequence.computed, chunk.length
            blocks = sequence.blocks[: -(-(start + length) // self._block_size)]
            chunks.append(PrefillChunk(len(tokens), length, start + length, torch.tensor(blocks)))
            tokens += sequence.token_ids[start : start + length]
            positions += range(start, start + length)
            slots += self._slots(sequence, start, length)
            if chunk.last:
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

    def _on_layer(self, chunks: tuple[Chunk, ...]) -> Callable[[int], None]:
        """What counts a layer once it is computed, and hands over the blocks that are complete in it."""
        pushes = [(c.sequence, c.push.start, c.sequence.blocks[c.push.start : c.push.stop]) for c in chunks if c.push]
        for chunk in chunks:
            if chunk.push and chunk.last:
                self._zero_tail(chunk.sequence.blocks[chunk.push.stop - 1], len(chunk.sequence.token_ids))

        def on_layer(layer: int) -> None:
            self.layers_done += 1
            for sequence, first, blocks in pushes:
                assert sequence.handoff is not None
                sequence.handoff.push(sequence.ticket, layer, first, blocks)

        return on_layer

    def _zero_tail(self, block: int, tokens: int) -> None:
        """Nothing of an earlier owner of the block crosses to another worker."""
        used = tokens % self._block_size
        if used:
            self.kv_cache[:, block, :, used:] = 0


def _outcomes(logits: Tensor, sampled: list[Sequence]) -> dict[Sequence, TokenEvent | EngineFault]:
    return dict(zip(sampled, sample(logits, sampled), strict=True)) if sampled else {}
