"""A runner without a model: the next token is a function of the tokens so far, so how a prompt was cut, preempted or
cached, and whether steps ran ahead, can change nothing. It checks at each step that what the step reads stands where
the sequence says."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from collections.abc import Sequence as Rows

from tercet.core import Ticket, TokenEvent
from tercet.engine.plan import Piece, PieceResult, StepPlan, StepResult, pack, unpack
from tercet.engine.sequence import Sequence

VOCAB = 50


def next_token(token_ids: list[int]) -> int:
    return zlib.crc32(bytes(token_ids)) % VOCAB


def contents(token_ids: list[int]) -> list[int]:
    """What stands for the KV of each token: a hash of it and of all before it."""
    return list(itertools.accumulate(token_ids, lambda before, token: hash((before, token)), initial=0))[1:]


class FakeStep:
    def __init__(self, results: StepResult) -> None:
        self._results = results
        self.tokens = [token.token_id for result in results for token in result.tokens]

    def result(self) -> StepResult:
        return self._results


class FakeRunner:
    """`memory` is the KV cache: (block, offset) -> what stands for the tokens up to the one whose KV is there. A plan
    brings only the new tokens, so the fake remembers those before them by their ticket."""

    vocab_size = VOCAB
    ahead = False

    def __init__(self, block_size: int, push: Callable[[Ticket, int, int, Rows[int]], None] = lambda *_: None) -> None:
        self.block_size = block_size
        self.layers_done = 0
        self.memory: dict[tuple[int, int], int] = {}
        self.tokens: dict[Ticket, list[int]] = {}
        self._prompts: dict[Ticket, int] = {}  # how many of them are the prompt
        self.largest = 0  # tokens of one step
        self.fails: Callable[[StepPlan], bool] = lambda _: False
        self.broken = False
        self._push = push
        self._wrong: AssertionError | None = None

    def meet(self, sequence: Sequence) -> None:
        """Whoever puts a sequence in calls this first."""
        self.tokens[sequence.ticket] = sequence.token_ids
        self._prompts[sequence.ticket] = sequence.num_prompt

    def check(self) -> None:
        if self.broken:
            raise RuntimeError("the model fails")
        if self._wrong is not None:  # it is no request's fault
            raise self._wrong

    def launch(self, plan: StepPlan, before: list[int] | None = None) -> FakeStep:
        try:
            return FakeStep(self._run(unpack(pack(plan)), before))
        except AssertionError as error:
            self._wrong = error
            raise

    def tokens_of(self, token_ids: Rows[int]) -> list[int]:
        return [*token_ids]

    def _run(self, plan: StepPlan, before: list[int] | None) -> StepResult:
        assert len({piece.ticket for piece in plan.pieces}) == len(plan.pieces), "a sequence twice in one step"
        if self.broken or self.fails(plan):
            raise RuntimeError("this step fails")
        self.layers_done += 1
        self.largest = max(self.largest, sum(len(piece.token_ids) for piece in plan.pieces))
        for piece in plan.decodes:
            assert len(piece.token_ids) == 1
            assert piece.draw is not None
        return [self._compute(piece, before) for piece in plan.pieces]

    def _compute(self, piece: Piece, before: list[int] | None) -> PieceResult:
        tokens = self.tokens[piece.ticket]
        if piece.drawn >= 0:
            assert before is not None
            tokens = [*tokens, before[piece.drawn]]
            piece = piece._replace(token_ids=tokens[-1:])
        assert tokens[piece.start : piece.end] == list(piece.token_ids), "other tokens than those of the sequence"
        assert (piece.draw is not None) == (piece.end == len(tokens)), "a token is drawn behind the last one only"
        for position, content in enumerate(contents(tokens[: piece.end])):
            at = piece.blocks[position // self.block_size], position % self.block_size
            if position >= piece.start:
                self.memory[at] = content
            assert self.memory.get(at) == content, f"block {at[0]} holds another sequence's KV"
        if piece.push is not None:
            self._push(piece.ticket, 0, piece.push.first, piece.push.blocks)
        if piece.draw is None:
            return PieceResult()
        assert piece.draw.position == len(tokens) - self._prompts[piece.ticket], "the draw of another position"
        assert piece.draw.position < piece.draw.params.max_tokens, "a token that nobody wants"
        if piece.draw.params.penalises:
            assert [*piece.draw.prompt, *piece.draw.output] == tokens, "a penalty counts other tokens"
        return PieceResult((TokenEvent(next_token(tokens)),))
