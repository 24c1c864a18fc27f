"""Turn a plan into tensors, run the model over the paged cache, and draw tokens.

The KV cache is a tensor over the bytes of a transfer Region, or a tensor on a device, of which the region is the host
copy (kv_cache.py). Tokens are drawn on the host, or by the Triton kernels where the logits are: then nothing in
`launch` waits for the device, and the next step may take tokens that nobody has seen yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Rows
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tercet.core import PromptScore, Ticket, TokenEvent
from tercet.engine.graphs import DecodeGraphs, Recorder
from tercet.engine.inputs import Arrays, BatchInputs
from tercet.engine.kv_cache import HostCache, cache_of
from tercet.engine.outputs import Outputs
from tercet.engine.plan import Draw, ImageKey, Piece, PieceResult, StepPlan, StepResult
from tercet.engine.sampler import sample
from tercet.engine.scores import PieceScores
from tercet.errors import EngineFault
from tercet.models.batch import StepBatch
from tercet.models.transformer import Transformer
from tercet.transfer.memory.device import KvRegion

if TYPE_CHECKING:
    from tercet.engine.device_sampler import DeviceDraws

PushBlocks = Callable[[Ticket, int, int, Rows[int]], object]
"""(ticket, layer, first, blocks): the prompt's blocks from index `first` on are complete in cache blocks `blocks` of
`layer`. Called during a step, before its result is known; after a fault the same ones may come again."""

Events = Rows[TokenEvent | EngineFault]


class RunningStep:
    def __init__(self, plan: StepPlan, outputs: Outputs, cache: HostCache) -> None:
        self.tokens: Tensor | None = None  # [R] int64, on the device; None if they were drawn on the host
        self._plan, self._outputs, self._cache = plan, outputs, cache
        self.events: Callable[[Rows[Tensor]], Events] = lambda _: ()
        self.scores: list[PieceScores] = []  # of each piece

    def close(self) -> None:
        """All of it is launched."""
        self._outputs.close()
        self._mark = self._cache.mark()

    def result(self) -> StepResult:
        fetched = self._outputs.fetched()
        self._cache.wait(self._mark)
        drawn = iter(self.events(fetched))
        tokens = [next(drawn) if piece.draw is not None else None for piece in self._plan.pieces]
        return [_result(token, scores.scores(fetched)) for token, scores in zip(tokens, self.scores, strict=True)]


class Runner:
    def __init__(self, model: Transformer, region: KvRegion, push: PushBlocks | None = None) -> None:
        """push: hands over the blocks that a plan says to; not needed if no plan does."""
        self._model, self._push = model, push
        self._block_size, self._first_layer = region.layout.block_size, region.layout.first_layer
        self._place = model.ranks.place
        self._cache = cache_of(region, model.dtype, model.device)
        self._graphs: DecodeGraphs | None = None
        self.kv_cache = self._cache.tensor
        self._embeddings: dict[ImageKey, Tensor] = {}  # [levels, tokens, E]
        self.vocab_size = model.config.vocab_size  # rows of the embedding
        self.ahead = model.kernels.kind == "triton"  # others wait for the logits, to draw on the host

    @property
    def layers_done(self) -> int:
        return self._model.layers_done

    @property
    def captures(self) -> bool:
        """Whether decode steps can be recorded."""
        return self._model.captures

    def capture(self, sizes: Iterable[int], max_context: int, recorder: Recorder) -> None:
        """Record decode steps of these batch sizes, the largest first."""
        forward = partial(self._model.forward, kv_cache=self.kv_cache)
        graphs = DecodeGraphs(forward, self._model.device, self._block_size, max_context)
        graphs.capture(sizes, recorder)
        self._graphs = graphs

    def close(self) -> None:
        """No step follows. The region may be closed after this."""
        self._cache.close()

    def see(self, key: ImageKey, embeddings: Tensor) -> None:
        self._embeddings[key] = embeddings.to(self._model.device)

    def forget(self, key: ImageKey) -> None:
        self._embeddings.pop(key, None)

    @torch.inference_mode()
    def launch(self, plan: StepPlan, before: Tensor | None = None) -> RunningStep:
        """Compute the step's KV, and draw a token for each piece that is to get one."""
        self._cache.begin(plan.landed)
        size = None if self._graphs is None else self._graphs.size_for(plan)
        arrays, inputs = self._inputs(plan, size)
        draws = [piece.draw for piece in plan.pieces if piece.draw is not None]
        device_draws = self._device_draws(arrays, draws)
        scores = [PieceScores(arrays, piece) for piece in plan.pieces]
        packed = arrays.packed(pin=self._model.device.type != "cpu").to(self._model.device, non_blocking=True)
        landed = arrays.views(packed)
        batch = inputs.batch(landed, before, self._seen(plan))

        outputs = Outputs(self._model.device)
        logits: Tensor | None
        if size is not None:
            assert self._graphs is not None
            logits = self._graphs.run(size, packed)[: len(draws)]
        else:
            logits = self._computed(batch, scores, landed, outputs, self._on_layer(plan.chunks))
        if logits is None:  # another rank draws
            step = RunningStep(StepPlan(), outputs, self._cache)
        else:
            step = RunningStep(plan, outputs, self._cache)
            step.scores = scores
            self._draw_into(step, logits, draws, device_draws, landed, outputs)
        step.close()
        return step

    def _computed(
        self,
        batch: StepBatch,
        scores: Rows[PieceScores],
        landed: Rows[Tensor],
        outputs: Outputs,
        on_layer: Callable[[int], None] | None,
    ) -> Tensor | None:
        """The logits of the rows that draw, where this rank draws; every rank of the last stage helps with them."""
        hidden = self._model.hidden(batch, self.kv_cache, on_layer)
        if not self._place.is_last:
            return None
        logits = self._model.logits(hidden[batch.logit_rows])
        self._score(batch, hidden, scores, landed, outputs)
        return logits

    def _draw_into(
        self,
        step: RunningStep,
        logits: Tensor,
        draws: Rows[Draw],
        device_draws: DeviceDraws | None,
        landed: Rows[Tensor],
        outputs: Outputs,
    ) -> None:
        if device_draws is None:
            events = self._draw(logits, draws)
            step.events = lambda _: events
        elif draws:
            step.tokens = device_draws.launch(logits, landed, outputs)
            step.events = device_draws.events

    def _seen(self, plan: StepPlan) -> Tensor | None:
        """[levels, M, E], of all images in the order of the pieces."""
        parts = [
            self._embeddings[piece.ticket, s.image][:, s.offset : s.offset + s.tokens]
            for piece in plan.pieces
            for s in piece.seen
        ]
        return torch.cat(parts, 1) if parts else None

    def tokens_of(self, token_ids: Rows[int]) -> Tensor:
        return torch.tensor(token_ids, dtype=torch.int64, device=self._model.device)

    @torch.inference_mode()
    def check(self) -> None:
        """Compute a dummy token, in a scratch cache. Raises what the model raises: then no request is at fault."""
        zero = torch.zeros(1, dtype=torch.int64, device=self._model.device)
        batch = StepBatch(zero, zero, zero, 1, zero.view(1, 1), zero + 1, (), zero)
        self._model.forward(batch, torch.zeros_like(self.kv_cache[:, :1]))

    def _inputs(self, plan: StepPlan, size: int | None) -> tuple[Arrays, BatchInputs]:
        if size is not None:
            assert self._graphs is not None
            return self._graphs.inputs(plan, size)
        arrays = Arrays()
        return arrays, BatchInputs(arrays, plan, self._block_size)

    def _device_draws(self, arrays: Arrays, draws: Rows[Draw]) -> DeviceDraws | None:
        if not self.ahead:
            return None
        from tercet.engine.device_sampler import DeviceDraws  # it imports Triton, which other kernels do without

        return DeviceDraws(arrays, draws, self.vocab_size)

    def _draw(self, logits: Tensor, draws: Rows[Draw]) -> Events:
        return sample(logits.cpu(), draws, native=self._model.kernels.native) if draws else ()

    def _score(
        self, batch: StepBatch, hidden: Tensor, scores: Rows[PieceScores], landed: Rows[Tensor], outputs: Outputs
    ) -> None:
        firsts = [*range(batch.num_decodes), *(rows.start_row for rows in batch.chunks)]
        for piece, first in zip(scores, firsts, strict=True):
            piece.launch(hidden[first:], self._model.logits, landed, outputs)

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
                published = partial(self._push, ticket, self._first_layer + layer, push.first, push.blocks)
                self._cache.publish(layer, push.blocks, published)

        return on_layer


def _result(token: TokenEvent | EngineFault | None, scores: list[PromptScore] | EngineFault) -> PieceResult:
    for outcome in (scores, token):
        if isinstance(outcome, EngineFault):
            return PieceResult(fault=outcome)
    assert not isinstance(token, EngineFault)
    assert not isinstance(scores, EngineFault)
    return PieceResult((token,) if token is not None else (), scores)
