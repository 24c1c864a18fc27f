"""What the next step computes: every running decode that fits, then chunks of prompts. The policy (engine/policy.py)
chooses who comes first and who is preempted when blocks run out; a preempted sequence is later recomputed."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from tercet.engine.blocks import BlockPool, Hold
from tercet.engine.policy import Policy
from tercet.engine.prefix import PrefixIndex
from tercet.engine.report import Faulted, StepReport
from tercet.engine.sequence import Phase, Sequence
from tercet.errors import WorkerDrained


@dataclass(frozen=True)
class Chunk:
    sequence: Sequence
    length: int  # tokens from sequence.planned on
    last: bool  # no token is left to compute after it, so the next one is sampled
    push: range = range(0)  # indices of the blocks that it completes and that are handed over


@dataclass(frozen=True)
class Step:
    decodes: tuple[Sequence, ...] = ()
    chunks: tuple[Chunk, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.decodes or self.chunks)

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        return (*self.decodes, *(chunk.sequence for chunk in self.chunks))

    @property
    def drawing(self) -> tuple[Sequence, ...]:
        """Those that get a token, in the order of their draws."""
        return (*self.decodes, *(chunk.sequence for chunk in self.chunks if chunk.last))


@dataclass
class Scheduler:
    """Not thread-safe."""

    pool: BlockPool
    index: PrefixIndex
    policy: Policy
    block_size: int
    max_running: int
    max_context: int
    running: list[Sequence] = field(default_factory=list)  # in order of arrival
    waiting: deque[Sequence] = field(default_factory=deque)
    preemptions: int = 0
    evicted: StepReport = field(default_factory=list)  # those that ended here, and can go on elsewhere

    def schedule(self, *, behind: bool = False) -> Step:
        """Choose the next step and allocate its blocks.

        behind: a step is in flight. Then the next one is empty if it takes what only the end of that one gives: room,
        for none whose blocks a step uses is preempted, or a token that a penalty counts."""
        if behind and self._must_wait():
            return Step()
        step = self._choose()
        while not step and not behind and len(self.running) > 1 and self._lacks_blocks() and self._preempt():
            step = self._choose()  # half-done prompts each held blocks that the others needed
        return step

    def remove(self, sequence: Sequence) -> None:
        if sequence in self.running:
            self.running.remove(sequence)
        if sequence in self.waiting:
            self.waiting.remove(sequence)

    def evict(self, sequence: Sequence, why: str) -> None:
        self.evicted.append(Faulted(sequence, WorkerDrained(why)))

    @property
    def claims(self) -> int:
        """Blocks that a newcomer must leave free: each running sequence's next one, and all of the waiting ones'."""
        return len(self.running) + sum(self._blocks_of(len(s.token_ids)) for s in self.waiting)

    def _must_wait(self) -> bool:
        decoding = list(filter(self._goes_on, self.running))
        counted = any(s.drawing and s.params.penalises for s in decoding)
        return counted or sum(self._missing(s, 1) for s in decoding) > self.pool.available

    def _goes_on(self, sequence: Sequence) -> bool:
        """Whether it decodes, and is not at its last token even now."""
        output = sequence.num_output + sequence.drawing
        return (
            sequence.decodes and output < sequence.params.max_tokens and sequence.num_prompt + output < self.max_context
        )

    def _lacks_blocks(self) -> bool:
        """Whether somebody would go on if there were more; the others wait for images."""
        return any(s.decodes or s.computable > s.planned for s in self.running)

    def _choose(self) -> Step:
        fitting = [s for s in list(self.running) if self._goes_on(s) and self._fit(s, 1)]
        decodes = [s for s in fitting if s.decodes]  # without those preempted for a later one
        budget = self.policy.prompt_tokens(len(decodes))
        chunks: list[Chunk] = []
        for sequence in [s for s in self.running if s.phase is Phase.PREFILLING and not s.drawing]:
            budget -= self._chunk(sequence, budget, chunks)
        while self.waiting and budget > 0 and len(self.running) < self.max_running:
            sequence = self.policy.next(self.waiting)
            if not self._start(sequence):
                break
            budget -= self._chunk(sequence, budget, chunks)
        return Step(tuple(decodes), tuple(chunks))

    def _start(self, sequence: Sequence) -> bool:
        """Move a waiting sequence to running, reusing what the prefix cache has; False if it must wait."""
        # The last token is always computed, for its logits; all of them are, if the prompt's logprobs are wanted.
        reusable = 0 if sequence.wants_scores else (len(sequence.token_ids) - 1) // self.block_size
        matched = self.index.find(sequence.extend_hashes(self.block_size)[:reusable])
        self.pool.share(matched)
        rest = self._blocks_of(len(sequence.token_ids)) - len(matched)
        must_fit = bool(self.running) or sequence.hand_over
        if rest > self.pool.available and must_fit:
            self.pool.release(matched, Hold.OWNED)
            return False
        sequence.blocks = matched
        sequence.start_at(len(matched) * self.block_size)
        sequence.published = len(matched)
        if sequence.hand_over:
            # All at once: what is being sent can't be preempted, so two of them must not wait for each other.
            sequence.blocks = matched + self.pool.allocate(rest, Hold.OWNED)
        if not sequence.num_output:
            sequence.cached_tokens = sequence.computed
            sequence.scores = []
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.phase = Phase.PREFILLING
        return True

    def _chunk(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        """Add the next chunk of a prefilling sequence, as long as budget and blocks allow. -> tokens taken."""
        assert sequence.pending > 0, f"{sequence.ticket} has no token left to compute"
        room = (len(sequence.blocks) + self.pool.available) * self.block_size - sequence.planned
        length = min(sequence.pending, budget, room, sequence.computable - sequence.planned)
        if length <= 0:
            return 0
        sequence.blocks += self.pool.allocate(self._missing(sequence, length), Hold.OWNED)
        last = length == sequence.pending
        chunks.append(Chunk(sequence, length, last, self._push_of(sequence, length, last)))
        return length

    def _push_of(self, sequence: Sequence, length: int, last: bool) -> range:
        """Blocks that a chunk completes, and with the last chunk the partial block too."""
        if not sequence.hand_over:
            return range(0)
        end = sequence.planned + length
        complete = self._blocks_of(end) if last else end // self.block_size
        return range(sequence.pushed_blocks, max(sequence.pushed_blocks, complete))

    def _fit(self, sequence: Sequence, length: int) -> bool:
        """Give the sequence blocks for `length` more tokens, preempting others if it must."""
        while self._missing(sequence, length) > self.pool.available:
            if not self._preempt() or sequence not in self.running:
                return False
        sequence.blocks += self.pool.allocate(self._missing(sequence, length), Hold.OWNED)
        return True

    def _preempt(self) -> bool:
        """Send one back to waiting, to be recomputed; none whose blocks a transfer reads."""
        victim = next((s for s in self.policy.victims(self.running) if not s.hand_over), None)
        if victim is None:
            return False
        self.running.remove(victim)
        self.pool.release(victim.blocks, Hold.OWNED)
        victim.blocks, victim.published = [], 0
        victim.start_at(0)
        if victim.can_start_again:
            victim.phase = Phase.WAITING
            self.waiting.appendleft(victim)
        else:
            victim.phase = Phase.OVER
            self.evict(victim, "preempted, and its images are not here to compute it again")
        self.preemptions += 1
        return True

    def _missing(self, sequence: Sequence, length: int) -> int:
        return max(0, self._blocks_of(sequence.planned + length) - len(sequence.blocks))

    def _blocks_of(self, tokens: int) -> int:
        return -(-tokens // self.block_size)
