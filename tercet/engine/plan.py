"""What a step computes and what it brings, as plain data: an executor needs nothing else, in whatever process it runs.

    EngineState.plan ─StepPlan─> Executor.execute ─StepResult─> EngineState.commit

Tuples all the way down, so msgpack packs a plan as it is; `pack` and `unpack` are for an executor elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from operator import attrgetter
from typing import NamedTuple

import msgpack

from tercet.core import PromptScore, SamplingParams, Ticket, TokenEvent
from tercet.errors import EngineFault


class Draw(NamedTuple):
    """All that decides the next token beside its logits: the same draw gives the same token, wherever it is made."""

    params: SamplingParams
    position: int  # tokens of the output so far
    prompt: Sequence[int] = ()  # the tokens so far, where a penalty counts them
    output: Sequence[int] = ()


class Push(NamedTuple):
    """Prompt blocks that stand complete with this step, layer by layer, and are handed over."""

    first: int  # index in the prompt
    blocks: Sequence[int]
    tail: int = 0  # tokens in the last one, if it is not full and no more will come; behind them it is zeroed


class Piece(NamedTuple):
    """One sequence's part of a step: compute the KV of tokens that follow each other, then perhaps draw the next."""

    ticket: Ticket
    token_ids: Sequence[int]
    start: int  # position of the first
    blocks: Sequence[int]  # the block table, up to the last of them
    draw: Draw | None = None
    push: Push | None = None
    follow: Sequence[int] = ()  # tokens of the prompt behind each of these, whose logprobs are wanted
    most_likely: int = 0  # so many for each of them, too

    @property
    def end(self) -> int:
        """Position behind the last token."""
        return self.start + len(self.token_ids)


class StepPlan(NamedTuple):
    decodes: Sequence[Piece] = ()  # one token each; they are computed together
    chunks: Sequence[Piece] = ()  # of prompts
    landed: Sequence[int] = ()  # blocks that transfers have written since the plan before; to be taken before all else

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return (*self.decodes, *self.chunks)

    def apart(self) -> Iterator[StepPlan]:
        """Each piece as a step of its own, in order. What has landed is taken once: a step may write behind it."""
        alone = [StepPlan(decodes=(piece,)) for piece in self.decodes]
        alone += [StepPlan(chunks=(piece,)) for piece in self.chunks]
        yield from (plan._replace(landed=() if number else self.landed) for number, plan in enumerate(alone))


class PieceResult(NamedTuple):
    """What a step has brought one sequence."""

    tokens: Sequence[TokenEvent] = ()  # drawn
    scores: Sequence[PromptScore] = ()  # of Piece.follow
    fault: EngineFault | None = None  # what ends the sequence


StepResult = list[PieceResult]  # one a piece, in their order


_values_of = attrgetter(*(field.name for field in fields(SamplingParams)))


def pack(plan: StepPlan) -> bytes:
    packed: bytes = msgpack.packb(plan, default=_values_of)
    return packed


def unpack(packed: bytes) -> StepPlan:
    decodes, chunks, landed = msgpack.unpackb(packed, use_list=False)
    return StepPlan(tuple(map(_piece, decodes)), tuple(map(_piece, chunks)), landed)


def _piece(fields: tuple[object, ...]) -> Piece:
    piece = Piece(*fields)  # type: ignore[arg-type]  # as `pack` has packed them
    draw = piece.draw and Draw(SamplingParams(*piece.draw[0]), *piece.draw[1:])  # type: ignore[misc]  # likewise
    return piece._replace(ticket=Ticket(*piece.ticket), draw=draw, push=piece.push and Push(*piece.push))
