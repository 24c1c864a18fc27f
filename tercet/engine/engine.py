"""The loop of a worker: schedule, run, commit; and the verbs by which its role puts requests in and takes them out.

Threads: `run` loops on one thread; the verbs may be called from any. One lock guards pool and scheduler; it is a leaf
(nothing else is locked under it) and it is not held during a forward pass. Blocks that a forward pass touches are
released only after it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from tercet.core import FinishReason, Load, PromptLogprobs, TokenEvent
from tercet.engine.blocks import BlockPool, Hold
from tercet.engine.isolation import Isolated
from tercet.engine.runner import Computed, Runner
from tercet.engine.scheduler import Scheduler, Step
from tercet.engine.sequence import Phase, Sequence
from tercet.errors import EngineFault, InvalidRequest, Overloaded
from tercet.spec import RoleSpec


@dataclass(frozen=True)
class Sampled:
    """A sequence got its next token; `token.finish` says why it is over, if it is."""

    sequence: Sequence
    token: TokenEvent
    stop_token_id: int | None = None


@dataclass(frozen=True)
class Faulted:
    """A sequence's own step failed, and ended it."""

    sequence: Sequence
    error: EngineFault


@dataclass(frozen=True)
class Scored:
    """The logprobs of a whole prompt, as its request wanted; the first token follows."""

    sequence: Sequence
    scores: PromptLogprobs


StepReport = list[Sampled | Faulted | Scored]


class Engine:
    def __init__(
        self,
        runner: Runner,
        spec: RoleSpec,
        max_context: int,
        eos_token_ids: tuple[int, ...],
        quarantine_blocks: int,
        on_sampled: Callable[[StepReport], None],
    ) -> None:
        self._runner = runner
        self._isolated = Isolated(runner)
        self._spec = spec
        self._max_context = max_context
        self._eos = eos_token_ids
        self._quarantine_blocks = quarantine_blocks
        self._on_sampled = on_sampled
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._pool = BlockPool(spec.kv.blocks, prefix_cache=spec.kv.prefix_cache, on_free=self._work.notify)
        scheduler = spec.scheduler
        self._scheduler = Scheduler(self._pool, spec.kv.block_size, scheduler.token_budget, scheduler.max_running)
        self._reserved: set[Sequence] = set()  # their KV is on its way
        self._stopping = False
        self.step_started: float | None = None  # time.monotonic() of the step that is running; health looks at it
        self.failure: BaseException | None = None  # what ended the loop, if it died

    # ---- verbs

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence whose prompt is computed here. Raises Overloaded when too many are."""
        with self._work:
            active = len(self._scheduler.running) + len(self._scheduler.waiting)
            if active >= self._spec.scheduler.max_running + self._spec.scheduler.max_waiting:
                raise Overloaded(f"{active} requests are running or waiting already")
            sequence.arrived = time.monotonic()
            sequence.sending = sequence.handoff is not None
            self._scheduler.waiting.append(sequence)
            self._work.notify()

    def reserve(self, sequence: Sequence) -> tuple[int, list[int]]:
        """Hold blocks for a prompt whose KV another worker will write. -> (blocks that the prefix cache has, blocks
        leased for the rest). Raises Overloaded when the batch, the pool or the quarantine is full."""
        size = self._spec.kv.block_size
        with self._lock:
            self._require_room()
            sequence.blocks = self._pool.match(sequence.extend_hashes(size))
            hits = len(sequence.blocks)
            missing = -(-len(sequence.token_ids) // size) - hits
            try:
                # Who runs needs a next block, or is preempted at once; and who was preempted came first.
                if missing + self._scheduler.claims > self._pool.available:
                    raise Overloaded(
                        f"{missing} KV blocks are needed, {self._pool.available} are free, "
                        f"{self._scheduler.claims} of them for requests that are here already"
                    )
                leased = self._pool.allocate(missing, Hold.LEASED)
            except Overloaded:
                self._pool.release(sequence.blocks, Hold.OWNED)
                raise
            sequence.blocks += leased
            sequence.published = hits
            sequence.phase = Phase.RESERVED
            self._reserved.add(sequence)
            return hits, leased

    def join(self, sequence: Sequence, first_token: int) -> None:
        """The KV of a reserved sequence has landed and is verified: decode it from its first token on, unless it is
        over with that one already."""
        with self._work:
            self._reserved.remove(sequence)
            self._pool.move(sequence.blocks[sequence.published :], Hold.LEASED, Hold.OWNED)
            sequence.computed = len(sequence.token_ids)
            self._publish(sequence)
            sequence.token_ids.append(first_token)
            if self._finish_of(sequence) is None:
                sequence.phase = Phase.DECODING
                self._scheduler.running.append(sequence)
                self._work.notify()
            else:
                self._retire(sequence)

    def quarantine(self, sequence: Sequence) -> None:
        """A reserved sequence failed, but its writer may still write: keep its leased blocks until `release`."""
        with self._lock:
            if sequence in self._reserved:
                self._pool.move(sequence.blocks[sequence.published :], Hold.LEASED, Hold.QUARANTINED)
                self._pool.release(sequence.blocks[: sequence.published], Hold.OWNED)
                self._reserved.remove(sequence)
                sequence.phase = Phase.OVER

    def release(self, sequence: Sequence, verified: int = 0) -> None:
        """It is proven that nobody writes into the blocks of a reserved or quarantined sequence any more. The first
        `verified` of the leased ones hold their tokens' KV, so that another attempt need not fetch them again."""
        with self._work:
            assert sequence.over or sequence in self._reserved
            hashes = sequence.extend_hashes(self._spec.kv.block_size)
            for index in range(sequence.published, min(sequence.published + verified, len(hashes))):
                self._pool.publish(sequence.blocks[index], hashes[index])
            if sequence in self._reserved:
                self._reserved.remove(sequence)
                self._pool.release(sequence.blocks[sequence.published :], Hold.LEASED)
                self._pool.release(sequence.blocks[: sequence.published], Hold.OWNED)
            else:
                self._pool.release(sequence.blocks[sequence.published :], Hold.QUARANTINED)
            sequence.blocks, sequence.phase = [], Phase.OVER

    def abort(self, sequence: Sequence) -> None:
        """Stop computing a sequence that was added or joined; its blocks are free once no pass and no transfer
        reads them."""
        with self._work:
            if not sequence.over and sequence not in self._reserved:
                self._retire(sequence)

    def op_done(self, sequence: Sequence) -> None:
        """The transfer out of a handed-over sequence's blocks has ended."""
        with self._work:
            sequence.sending = False
            if sequence.over and not sequence.in_step:
                self._pool.release(sequence.blocks, Hold.IN_FLIGHT)
                sequence.blocks = []

    def check_ids(self, token_ids: Iterable[int]) -> None:
        """Raises InvalidRequest for an id that the embedding has no row for, wherever it comes from."""
        size = self._runner.vocab_size
        wrong = next((token for token in token_ids if not 0 <= token < size), None)
        if wrong is not None:
            raise InvalidRequest(f"token id {wrong} is outside the model's vocabulary (0 to {size - 1})")

    @property
    def computed(self) -> int:
        """How much has been computed so far, in layers of steps; it grows while the engine works. Any thread."""
        return self._runner.layers_done

    def load(self) -> Load:
        with self._lock:
            counts = self._pool.counts()
            return Load(
                running=len(self._scheduler.running) + len(self._reserved),
                waiting=len(self._scheduler.waiting),
                blocks_total=self._pool.total,
                blocks_free=counts[None],
                blocks_owned=counts[Hold.OWNED],
                blocks_leased=counts[Hold.LEASED],
                blocks_in_flight=counts[Hold.IN_FLIGHT],
                blocks_quarantined=counts[Hold.QUARANTINED],
                preemptions=self._scheduler.preemptions,
            )

    def check_integrity(self) -> None:
        with self._lock:
            self._pool.check_integrity()

    def stop(self) -> None:
        with self._work:
            self._stopping = True
            self._work.notify()

    # ---- the loop

    def run(self) -> None:
        """Until `stop`. A fault ends the loop and stands in `failure`: the worker is then unhealthy and replaced."""
        try:
            while (step := self._next_step()) is not None:
                self._run(step)
        except BaseException as error:
            self.failure = error
            raise

    def _next_step(self) -> Step | None:
        """Waits for one; None: the engine stops."""
        with self._work:
            while not self._stopping:
                if step := self._begin_step():
                    return step
                self._work.wait()
            return None

    def _begin_step(self) -> Step:
        step = self._scheduler.schedule()
        for sequence in step.sequences:
            sequence.in_step = True
            sequence.first_scheduled = sequence.first_scheduled or time.monotonic()
        return step

    def _run(self, step: Step) -> None:
        self.step_started = time.monotonic()
        report = self._commit(step, self._isolated.run(step))
        self.step_started = None
        self._on_sampled(report)

    def _commit(self, step: Step, computed: Computed) -> StepReport:
        """Advance what was computed, append the tokens, retire what is over; a sequence at fault ends here."""
        with self._lock:
            for sequence in step.decodes:
                sequence.computed += 1
            for chunk in step.chunks:
                chunk.sequence.computed += chunk.length
                chunk.sequence.pushed_blocks = max(chunk.sequence.pushed_blocks, chunk.push.stop)
            for sequence, scores in computed.scores.items():
                sequence.scores += scores
            for sequence in step.sequences:
                self._leave_step(sequence, computed.outcomes.get(sequence))
            live = [(s, outcome) for s, outcome in computed.outcomes.items() if not s.over]
            scored = [Scored(s, PromptLogprobs(tuple(s.scores))) for s, _ in live if s.wants_scores]
            return [*scored, *(self._report(s, outcome) for s, outcome in live)]

    def _leave_step(self, sequence: Sequence, outcome: TokenEvent | EngineFault | None) -> None:
        sequence.in_step = False
        if isinstance(outcome, EngineFault):
            self._pool.unpublish(sequence.blocks)
        if sequence.over:
            self._give_back(sequence)
        elif not isinstance(outcome, EngineFault):
            self._publish(sequence)

    def _report(self, sequence: Sequence, outcome: TokenEvent | EngineFault) -> Sampled | Faulted:
        if isinstance(outcome, EngineFault):
            self._retire(sequence)
            return Faulted(sequence, outcome)
        if sequence.handoff is not None:
            self._retire(sequence)
            return Sampled(sequence, outcome)
        sequence.token_ids.append(outcome.token_id)
        sequence.phase = Phase.DECODING
        over = self._finish_of(sequence)
        if over is None:
            return Sampled(sequence, outcome)
        self._retire(sequence)
        return Sampled(sequence, replace(outcome, finish=over[0]), over[1])

    def finish_after(self, sequence: Sequence, token_id: int) -> tuple[FinishReason, int | None] | None:
        """Why `sequence` would be over with `token_id` as its next token, with the id that stops it, if it does."""
        return sequence.finish_reason_of(token_id, sequence.num_output + 1, self._eos, self._max_context)

    def _finish_of(self, sequence: Sequence) -> tuple[FinishReason, int | None] | None:
        return sequence.finish_reason(self._eos, self._max_context)

    # ---- blocks, under the lock

    def _require_room(self) -> None:
        active = len(self._scheduler.running) + len(self._scheduler.waiting) + len(self._reserved)
        if active >= self._spec.scheduler.max_running:
            raise Overloaded(f"{active} requests are running already")
        quarantined = self._pool.counts()[Hold.QUARANTINED]
        if quarantined >= self._quarantine_blocks:
            raise Overloaded(f"{quarantined} KV blocks are in quarantine, the bound is {self._quarantine_blocks}")

    def _publish(self, sequence: Sequence) -> None:
        """Offer the blocks that have become full to later prompts."""
        size = self._spec.kv.block_size
        full = min(sequence.computed // size, len(sequence.extend_hashes(size)))
        for index in range(sequence.published, full):
            self._pool.publish(sequence.blocks[index], sequence.hashes[index])
        sequence.published = max(sequence.published, full)

    def _retire(self, sequence: Sequence) -> None:
        sequence.phase = Phase.OVER
        self._scheduler.remove(sequence)
        self._work.notify()  # it leaves a place in the batch
        if not sequence.in_step:
            self._give_back(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        if sequence.sending:
            self._pool.move(sequence.blocks, Hold.OWNED, Hold.IN_FLIGHT)
            return
        self._pool.release(sequence.blocks, Hold.OWNED)
        sequence.blocks = []
