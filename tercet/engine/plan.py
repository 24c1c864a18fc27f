"""What a step computes and its results, as plain data: all that an executor needs, in whatever process it runs.

    EngineState.plan ─StepPlan─> Executor.launch ─StepResult─> EngineState.commit

A plan is made of tuples and lists, so msgpack packs it as it is; `pack` and `unpack` are for an executor in another
process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any, NamedTuple

import msgpack

from tercet.core import PromptScore, SamplingParams, Ticket, TokenEvent
from tercet.errors import EngineFault, WorkerDrained


class Draw(NamedTuple):
    """All that decides the next token besides the logits: equal draws give equal tokens, on whichever worker."""

    params: SamplingParams
    position: int  # tokens of the output so far
    prompt: Sequence[int] = ()  # the tokens so far; empty unless a penalty counts them
    output: Sequence[int] = ()


class Push(NamedTuple):
    """Prompt blocks that this step completes, layer by layer, and that are handed over."""

    first: int  # index of the first one among the prompt's blocks
    blocks: Sequence[int]
    tail: int = 0  # tokens in the last block, if it stays partial; the rest of it is zeroed


ImageKey = tuple[Ticket, int]  # an image by its number in the prompt of a request


class Seen(NamedTuple):
    """Tokens of an image in a piece: embeddings stand in their place."""

    image: int  # its number in the prompt
    row: int  # of the piece, the first of them
    tokens: int
    offset: int  # of the image's embeddings, the first of them


class Piece(NamedTuple):
    """One sequence's part of a step: compute the KV of tokens that follow each other, then perhaps draw the next."""

    ticket: Ticket
    token_ids: Sequence[int]
    start: int  # position of the first
    blocks: Sequence[int]  # the block table, up to the last of them
    draw: Draw | None = None
    push: Push | None = None
    follow: Sequence[int] = ()  # the prompt token after each of `token_ids`, if its logprob is wanted
    most_likely: int = 0  # how many top logprobs are wanted for each of `follow`
    drawn: int = -1  # if its one token is what the step before draws: the number of that draw; `token_ids` says 0
    seen: Sequence[Seen] = ()
    positions: Sequence[Sequence[int]] = ()  # M-RoPE: three numbers of each token, if there are images among them
    shift: int = 0  # M-RoPE: what is added to a token's place otherwise

    @property
    def end(self) -> int:
        """Position behind the last token."""
        return self.start + len(self.token_ids)


class StepPlan(NamedTuple):
    decodes: Sequence[Piece] = ()  # one token each, computed as one batch
    chunks: Sequence[Piece] = ()  # of prompts
    landed: Sequence[int] = ()  # blocks that transfers wrote since the last plan; the cache takes them first
    others: Sequence[StepPlan] = ()  # of a group's further data replicas, each over blocks of its own

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Those of the other replicas come last."""
        return (*self.decodes, *self.chunks, *(piece for other in self.others for piece in other.pieces))

    @property
    def replicas(self) -> list[StepPlan]:
        """Of each data replica its own plan."""
        return [self._replace(others=()), *self.others]

    def apart(self) -> Iterator[StepPlan]:
        """Each piece as a step of its own, in order. Only the first takes `landed`: a step may
        since have written to the same blocks."""
        alone = [StepPlan(decodes=(piece,)) for piece in self.decodes]
        alone += [StepPlan(chunks=(piece,)) for piece in self.chunks]
        yield from (plan._replace(landed=() if number else self.landed) for number, plan in enumerate(alone))

    def divided(self, most: int) -> list[tuple[StepPlan, list[int]]]:
        """As micro-batches, at most so many and about equally long, each with the numbers of its pieces here."""
        sizes = [len(piece.token_ids) for piece in self.pieces]
        parts: list[list[int]] = [[] for _ in range(min(most, len(sizes)))]
        rows = [0] * len(parts)
        for number in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
            least = rows.index(min(rows))
            parts[least].append(number)
            rows[least] += sizes[number]
        return [(self._of(sorted(part), first=not at), sorted(part)) for at, part in enumerate(parts)]

    def _of(self, numbers: list[int], *, first: bool) -> StepPlan:
        decodes = tuple(self.decodes[n] for n in numbers if n < len(self.decodes))
        chunks = tuple(self.chunks[n - len(self.decodes)] for n in numbers if n >= len(self.decodes))
        return StepPlan(decodes, chunks, self.landed if first else ())


class PieceResult(NamedTuple):
    """The result of a step for one sequence."""

    tokens: Sequence[TokenEvent] = ()  # drawn
    scores: Sequence[PromptScore] = ()  # of Piece.follow
    fault: EngineFault | WorkerDrained | None = None  # what ends the sequence; the latter: it can go on elsewhere


StepResult = list[PieceResult]  # one per piece, in their order


_values_of = attrgetter(*(field.name for field in fields(SamplingParams)))


def pack(plan: StepPlan) -> bytes:
    packed: bytes = msgpack.packb(plan, default=_values_of)
    return packed


def unpack(packed: bytes) -> StepPlan:
    return _plan(msgpack.unpackb(packed, use_list=False))


def _plan(fields: tuple[Any, ...]) -> StepPlan:
    decodes, chunks, landed, others = fields
    return StepPlan(tuple(map(_piece, decodes)), tuple(map(_piece, chunks)), landed, tuple(map(_plan, others)))


def pack_result(result: StepResult) -> bytes:
    """A token's time and its end are not packed: the engine that gets it sets them."""
    packed: bytes = msgpack.packb(
        [
            (
                [(token.token_id, token.logprob, token.top_logprobs) for token in piece.tokens],
                piece.scores,
                None if piece.fault is None else str(piece.fault),  # an EngineFault: the other kind is rank 0's
            )
            for piece in result
        ]
    )
    return packed


def unpack_result(packed: bytes) -> StepResult:
    return [
        PieceResult(
            tuple(TokenEvent(*token) for token in tokens), scores, None if fault is None else EngineFault(fault)
        )
        for tokens, scores, fault in msgpack.unpackb(packed, use_list=False)
    ]


def _piece(fields: tuple[object, ...]) -> Piece:
    piece = Piece(*fields)  # type: ignore[arg-type]  # as `pack` has packed them
    draw = piece.draw and Draw(SamplingParams(*piece.draw[0]), *piece.draw[1:])  # type: ignore[misc]  # likewise
    seen = tuple(Seen(*each) for each in piece.seen)
    return piece._replace(ticket=Ticket(*piece.ticket), draw=draw, push=piece.push and Push(*piece.push), seen=seen)
