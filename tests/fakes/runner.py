"""A runner without a model: the next token is a function of the tokens so far, so how a prompt was cut, preempted or
cached can change nothing. It checks at each step that what the step reads stands where the sequence says."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable

from tercet.core import TokenEvent
from tercet.engine.runner import Computed
from tercet.engine.scheduler import Step
from tercet.engine.sequence import Sequence

VOCAB = 50


def next_token(token_ids: list[int]) -> int:
    return zlib.crc32(bytes(token_ids)) % VOCAB


def contents(token_ids: list[int]) -> list[int]:
    """What stands for the KV of each token: a hash of it and of all before it."""
    return list(itertools.accumulate(token_ids, lambda before, token: hash((before, token)), initial=0))[1:]


class FakeRunner:
    """`memory` is the KV cache: (block, offset) -> what stands for the tokens up to the one whose KV is there."""

    vocab_size = VOCAB

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.layers_done = 0
        self.memory: dict[tuple[int, int], int] = {}
        self.largest = 0  # tokens of one step
        self.fails: Callable[[Step], bool] = lambda _: False
        self.broken = False
        self._wrong: AssertionError | None = None

    def check(self) -> None:
        if self.broken:
            raise RuntimeError("the model fails")
        if self._wrong is not None:  # it is no request's fault
            raise self._wrong

    def run(self, step: Step) -> Computed:
        try:
            return self._run(step)
        except AssertionError as error:
            self._wrong = error
            raise

    def _run(self, step: Step) -> Computed:
        assert len(set(step.sequences)) == len(step.sequences), "a sequence twice in one step"
        if self.broken or self.fails(step):
            raise RuntimeError("this step fails")
        self.layers_done += 1
        self.largest = max(self.largest, len(step.decodes) + sum(chunk.length for chunk in step.chunks))
        for sequence in step.decodes:
            self._compute(sequence, len(sequence.token_ids) - 1, len(sequence.token_ids))
        for chunk in step.chunks:
            end = chunk.sequence.computed + chunk.length
            self._compute(chunk.sequence, chunk.sequence.computed, end)
            assert chunk.last == (end == len(chunk.sequence.token_ids))
            self._push(chunk.sequence, chunk.push)
        sampled = [*step.decodes, *(chunk.sequence for chunk in step.chunks if chunk.last)]
        return Computed({sequence: TokenEvent(next_token(sequence.token_ids)) for sequence in sampled})

    def _compute(self, sequence: Sequence, start: int, end: int) -> None:
        assert sequence.computed == start, "KV is computed with a gap before it"
        for position, content in enumerate(contents(sequence.token_ids[:end])):
            at = sequence.blocks[position // self.block_size], position % self.block_size
            if position >= start:
                self.memory[at] = content
            assert self.memory.get(at) == content, f"block {at[0]} holds another sequence's KV"

    def _push(self, sequence: Sequence, indices: range) -> None:
        if indices:
            blocks = sequence.blocks[indices.start : indices.stop]
            sequence.handoff.push(sequence.ticket, 0, indices.start, blocks)
