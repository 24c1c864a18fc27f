"""A step of sequences (scheduler.py) as the data that an executor takes (plan.py)."""

from __future__ import annotations

from collections.abc import Collection

from tercet.engine.images import overlaps, positions_of, shift_at
from tercet.engine.plan import Draw, Piece, Push, Seen, StepPlan
from tercet.engine.scheduler import Chunk, Step
from tercet.engine.sequence import Sequence


def plan_of(step: Step, before: Step, landed: Collection[int], block_size: int, *, mrope: bool = False) -> StepPlan:
    """before: the step in flight, whose draws the sequences of this one may take; empty if there is none. landed: what
    transfers wrote since the last plan. mrope: the model's rotary positions are those of M-RoPE."""
    rows = {sequence: row for row, sequence in enumerate(before.drawing)}
    decodes = [_decode(sequence, rows, block_size) for sequence in step.decodes]
    chunks = [_chunk(chunk, block_size) for chunk in step.chunks]
    if any(sequence.images for sequence in step.sequences):
        decodes = [_seeing(*each, mrope) for each in zip(decodes, step.decodes, strict=True)]
        chunks = [_seeing(piece, chunk.sequence, mrope) for piece, chunk in zip(chunks, step.chunks, strict=True)]
    return StepPlan(tuple(decodes), tuple(chunks), tuple(landed))


def _seeing(piece: Piece, sequence: Sequence, mrope: bool) -> Piece:
    """With what the sequence's images mean for it."""
    found = overlaps(sequence.images, piece.start, piece.end)
    piece = piece._replace(seen=tuple(Seen(o.image, o.start - piece.start, o.tokens, o.offset) for o in found))
    if not mrope or not sequence.images:
        return piece
    if not piece.seen:
        return piece._replace(shift=shift_at(sequence.images, piece.start))
    positions = positions_of(sequence.images, len(sequence.token_ids))
    return piece._replace(positions=positions[:, piece.start : piece.end].tolist())


def _decode(sequence: Sequence, rows: dict[Sequence, int], block_size: int) -> Piece:
    piece = _piece(sequence, 1, block_size, draws=True)
    return piece._replace(token_ids=(0,), drawn=rows[sequence]) if sequence.drawing else piece


def _chunk(chunk: Chunk, block_size: int) -> Piece:
    sequence, end = chunk.sequence, chunk.sequence.planned + chunk.length
    piece = _piece(sequence, chunk.length, block_size, draws=chunk.last)
    if chunk.push:
        blocks = sequence.blocks[chunk.push.start : chunk.push.stop]
        piece = piece._replace(push=Push(chunk.push.start, blocks, end % block_size if chunk.last else 0))
    if sequence.wants_scores:
        follow = sequence.token_ids[sequence.planned + 1 : end + 1]
        piece = piece._replace(follow=follow, most_likely=sequence.params.prompt_logprobs or 0)
    return piece


def _piece(sequence: Sequence, length: int, block_size: int, *, draws: bool) -> Piece:
    start, end = sequence.planned, sequence.planned + length
    blocks = sequence.blocks[: -(-end // block_size)]
    return Piece(sequence.ticket, sequence.token_ids[start:end], start, blocks, _draw_of(sequence) if draws else None)


def _draw_of(sequence: Sequence) -> Draw:
    params, position = sequence.params, sequence.num_output + sequence.drawing
    if not params.penalises:
        return Draw(params, position)
    return Draw(params, position, sequence.token_ids[: sequence.num_prompt], sequence.token_ids[sequence.num_prompt :])
