"""Turn a plan into tensors, run the model over the paged cache, and draw tokens.

The KV cache is a tensor over the bytes of a transfer Region, or a tensor on a device, of which the region is the host
copy (kv_cache.py). Tokens are drawn on the host, or on the device by the Triton kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from tercet.core import PromptScore, Ticket, TokenEvent
from tercet.engine.kv_cache import cache_of
from tercet.engine.plan import Draw, Piece, PieceResult, StepPlan, StepResult
from tercet.engine.sampler import sample, score
from tercet.errors import EngineFault
from tercet.models.batch import PrefillChunk, StepBatch
from tercet.models.transformer import Transformer
from tercet.transfer.memory.region import Region

SCORE_ROWS = 64  # prompt tokens at a time: the logits of a whole prompt would take gigabytes

PushBlocks = Callable[[Ticket, int, int, Rows[int]], object]
"""(ticket, layer, first, blocks): the prompt's blocks from index `first` on are complete in cache blocks `blocks` of
`layer`. Called on the engine's thread during a step; after a fault the same ones may come again."""


class Runner:
    def __init__(self, model: Transformer, region: Region, push: PushBlocks | None = None) -> None:
        """push: hands over the blocks that a plan says to; not needed if no plan does."""
        self._model = model
        self._push = push
        self._block_size = region.layout.block_size
        self.vocab_size = model.config.vocab_size  # rows of the embedding
        self._cache = cache_of(region, model.dtype, model.device)
        self.kv_cache = self._cache.tensor

    @property
    def layers_done(self) -> int:
        return self._model.layers_done

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Compute the step's KV, and draw a token for each piece that is to get one."""
        self._cache.take(plan.landed)
        batch = self._batch(plan)
        hidden = self._model.hidden(batch, self.kv_cache, self._on_layer(plan.chunks))
        draws = [piece.draw for piece in plan.pieces if piece.draw is not None]
        drawn = iter(self._draw(hidden[batch.logit_rows], draws))
        tokens = [next(drawn) if piece.draw is not None else None for piece in plan.pieces]
        firsts = [*range(batch.num_decodes), *(rows.start_row for rows in batch.chunks)]
        scores = [self._scores(piece, hidden[first:]) for piece, first in zip(plan.pieces, firsts, strict=True)]
        return list(map(_result, tokens, scores))

    def _draw(self, hidden: Tensor, draws: Rows[Draw]) -> list[TokenEvent | EngineFault]:
        if not draws:
            return []
        logits, kind = self._model.logits(hidden), self._model.kernels.kind
        return sample(logits if kind == "triton" else logits.cpu(), draws, kind)

    @torch.inference_mode()
    def check(self) -> None:
        """Compute a dummy token, in a scratch cache. Raises what the model raises: then no request is at fault."""
        zero = torch.zeros(1, dtype=torch.int64, device=self._model.device)
        batch = StepBatch(zero, zero, zero, 1, zero.view(1, 1), zero + 1, (), zero)
        self._model.forward(batch, torch.zeros_like(self.kv_cache[:, :1]))

    def _scores(self, piece: Piece, hidden: Tensor) -> list[PromptScore] | EngineFault:
        """The logprobs of the piece's `follow`. hidden: begins with the piece's rows."""
        scores: list[PromptScore] = []
        for at in range(0, len(piece.follow), SCORE_ROWS):
            wanted = piece.follow[at : at + SCORE_ROWS]
            logits = self._model.logits(hidden[at : at + len(wanted)]).cpu()
            if not logits.amax().isfinite():
                return EngineFault("the model's logits for the prompt are not finite numbers")
            scores += score(logits, wanted, piece.most_likely)
        return scores

    def _batch(self, plan: StepPlan) -> StepBatch:
        """The plan as tensors. Its logit rows are those of the pieces that draw, in order."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        logit_rows: list[int] = []
        chunks: list[PrefillChunk] = []
        for number, piece in enumerate(plan.pieces):
            if number >= len(plan.decodes):
                chunks.append(PrefillChunk(len(tokens), len(piece.token_ids), piece.end, self._ints(piece.blocks)))
            tokens += piece.token_ids
            positions += range(piece.start, piece.end)
            slots += self._slots(piece)
            if piece.draw is not None:
                logit_rows.append(len(tokens) - 1)
        tables, lengths = self._decode_tables(plan.decodes)
        return StepBatch(
            token_ids=self._ints(tokens),
            positions=self._ints(positions),
            slots=self._ints(slots),
            num_decodes=len(plan.decodes),
            decode_block_tables=tables,
            decode_context_lens=lengths,
            chunks=tuple(chunks),
            logit_rows=self._ints(logit_rows),
        )

    def _slots(self, piece: Piece) -> list[int]:
        size, blocks = self._block_size, piece.blocks
        return [blocks[p // size] * size + p % size for p in range(piece.start, piece.end)]

    def _decode_tables(self, decodes: Rows[Piece]) -> tuple[Tensor, Tensor]:
        """Block tables padded with 0, and context lengths with the new token included."""
        width = max((len(piece.blocks) for piece in decodes), default=0)
        rows = [[*piece.blocks, *[0] * (width - len(piece.blocks))] for piece in decodes]
        return self._ints(rows).view(len(decodes), width), self._ints([piece.end for piece in decodes])

    def _ints(self, values: Rows[int] | Rows[Rows[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._model.device)

    def _on_layer(self, chunks: Rows[Piece]) -> Callable[[int], None] | None:
        """A callback that hands over the blocks that are complete in a layer, if there are any."""
        pushed = [(chunk.ticket, chunk.push) for chunk in chunks if chunk.push is not None]
        if not pushed:
            return None
        for _, push in pushed:
            if push.tail:  # so that no KV of the block's earlier owner crosses
                self.kv_cache[:, push.blocks[-1], :, push.tail :] = 0

        def on_layer(layer: int) -> None:
            for ticket, push in pushed:
                assert self._push is not None, "a plan says push, but nobody does"
                self._cache.publish(layer, push.blocks)
                self._push(ticket, layer, push.first, push.blocks)

        return on_layer


def _result(token: TokenEvent | EngineFault | None, scores: list[PromptScore] | EngineFault) -> PieceResult:
    for outcome in (scores, token):
        if isinstance(outcome, EngineFault):
            return PieceResult(fault=outcome)
    assert not isinstance(token, EngineFault)
    assert not isinstance(scores, EngineFault)
    return PieceResult((token,) if token is not None else (), scores)
