"""The state and decisions of a worker's engine: verbs by which roles put requests in and take them out, and the two
halves of a step, `plan` and `commit`. No thread, no lock, no clock (see engine/loop.py), no torch.

Verbs may be called between `plan` and `commit`. One more step may be planned before a step's commit: its sequences then
take tokens that are being drawn (Piece.drawn). Blocks that a step touches are freed only after its commit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace

from tercet.core import FinishReason, Load, PromptLogprobs, TokenEvent
from tercet.engine.blocks import BlockPool, Hold
from tercet.engine.pieces import plan_of
from tercet.engine.plan import ImageKey, PieceResult, StepPlan, StepResult
from tercet.engine.policy import FirstComeFirstServed
from tercet.engine.prefix import PrefixIndex
from tercet.engine.report import Faulted, Sampled, Scored, StepReport
from tercet.engine.scheduler import Scheduler, Step
from tercet.engine.sequence import Phase, Sequence
from tercet.errors import Overloaded
from tercet.spec import RoleSpec


class EngineState:
    """Not thread-safe."""

    def __init__(
        self,
        spec: RoleSpec,
        max_context: int,
        eos_token_ids: tuple[int, ...],
        quarantine_blocks: int,
        on_work: Callable[[], None],
        *,
        mrope: bool = False,
    ) -> None:
        """on_work: called whenever `plan` may find more to do than the last time. mrope: the model has M-RoPE."""
        self._mrope, self._on_work = mrope, on_work
        self._max_running = spec.scheduler.max_running
        self._max_active = spec.scheduler.max_running + spec.scheduler.max_waiting
        self._block_size, self._quarantine_blocks = spec.kv.block_size, quarantine_blocks
        self._max_context, self._eos = max_context, eos_token_ids
        self._index = PrefixIndex(enabled=spec.kv.prefix_cache)
        self._pool = BlockPool(spec.kv.blocks, self._index, on_work)
        policy = FirstComeFirstServed(spec.scheduler.token_budget)
        self._scheduler = Scheduler(self._pool, self._index, policy, self._block_size, self._max_running, max_context)
        self._reserved: set[Sequence] = set()  # their KV is on its way
        self._sending: set[Sequence] = set()  # a transfer reads their blocks, until `op_done`
        self._in_flight: deque[Step] = deque()  # planned, not yet committed; the oldest first
        self._unseen: list[ImageKey] = []  # images that no step to come takes, until `forgotten`
        self._landed: set[int] = set()  # blocks that transfers have written and no plan has named yet

    # ---- verbs

    def add(self, sequence: Sequence, now: float) -> None:
        """Queue a sequence whose prompt is computed here. Raises Overloaded when too many are running or waiting."""
        active = len(self._scheduler.running) + len(self._scheduler.waiting)
        if active >= self._max_active:
            raise Overloaded(f"{active} requests are running or waiting already")
        sequence.arrived = now
        if sequence.hand_over:
            self._sending.add(sequence)
        self._scheduler.waiting.append(sequence)
        self._on_work()

    def reserve(self, sequence: Sequence) -> tuple[int, list[int]]:
        """Hold blocks for a prompt whose KV another worker will write. -> (blocks that the prefix index has, blocks
        leased for the rest). Raises Overloaded when the batch, the pool or the quarantine is full."""
        self._require_room()
        hits = self._index.find(sequence.extend_hashes(self._block_size))
        self._pool.share(hits)
        missing = -(-len(sequence.token_ids) // self._block_size) - len(hits)
        # Leave running sequences their next block, else one is preempted at once; those preempted came first, too.
        if missing + self._scheduler.claims > self._pool.available:
            free = self._pool.available
            self._pool.release(hits, Hold.OWNED)
            raise Overloaded(
                f"{missing} KV blocks are needed, {free} are free, "
                f"{self._scheduler.claims} of them for requests that are here already"
            )
        leased = self._pool.allocate(missing, Hold.LEASED)
        sequence.blocks = hits + leased
        sequence.published = len(hits)
        sequence.phase = Phase.RESERVED
        self._reserved.add(sequence)
        return len(hits), leased

    def join(self, sequence: Sequence, first_token: int) -> None:
        """The KV of a reserved sequence has landed and is verified: decode it from its first token on, unless that
        one already ends it."""
        self._reserved.remove(sequence)
        self._landed.update(sequence.blocks[sequence.published :])
        self._pool.move(sequence.blocks[sequence.published :], Hold.LEASED, Hold.OWNED)
        sequence.joined = True
        sequence.start_at(len(sequence.token_ids))
        self._publish(sequence)
        sequence.token_ids.append(first_token)
        if self._finish_of(sequence) is None:
            sequence.phase = Phase.DECODING
            self._scheduler.running.append(sequence)
            self._on_work()
        else:
            self._retire(sequence)

    def quarantine(self, sequence: Sequence) -> None:
        """A reserved sequence failed, but its writer may still write: keep its leased blocks until `release`."""
        if sequence in self._reserved:
            self._pool.move(sequence.blocks[sequence.published :], Hold.LEASED, Hold.QUARANTINED)
            self._pool.release(sequence.blocks[: sequence.published], Hold.OWNED)
            self._reserved.remove(sequence)
            sequence.phase = Phase.QUARANTINED

    def release(self, sequence: Sequence, verified: int = 0) -> None:
        """It is proven that nobody writes into the blocks of a reserved or quarantined sequence any more. The first
        `verified` of the leased ones hold their tokens' KV, so that another attempt need not fetch them again."""
        written = sequence.blocks[sequence.published :]
        hashes = sequence.extend_hashes(self._block_size)[sequence.published :]
        for block, digest in zip(written[:verified], hashes, strict=False):
            self._index.publish(block, digest)
        self._landed.update(written[:verified])
        if sequence in self._reserved:
            self._reserved.remove(sequence)
            self._pool.release(written, Hold.LEASED)
            self._pool.release(sequence.blocks[: sequence.published], Hold.OWNED)
        else:
            assert sequence.phase is Phase.QUARANTINED
            self._pool.release(written, Hold.QUARANTINED)
        sequence.blocks, sequence.phase = [], Phase.OVER

    def see(self, sequence: Sequence, image: int) -> bool:
        """The executor gets the embeddings of an image of the prompt. False: the sequence takes none any more."""
        if takes := sequence.phase in (Phase.WAITING, Phase.PREFILLING, Phase.DECODING):
            sequence.here.add(image)
            self._on_work()
        return takes

    def evicted(self) -> StepReport:
        """Sequences that can only go on elsewhere, each once: a plan took their blocks, or `lose` ended them."""
        report, self._scheduler.evicted = self._scheduler.evicted, []
        return report

    def lose(self) -> None:
        """The memory of the KV is gone: what runs or waits ends."""
        for sequence in (*self._scheduler.running, *self._scheduler.waiting):
            self._retire(sequence)
            self._scheduler.evict(sequence, "the rank that had its KV is lost")

    def forgotten(self) -> list[ImageKey]:
        """Images whose embeddings no step to come takes, each once."""
        self._unseen, unseen = [], self._unseen
        return unseen

    def abort(self, sequence: Sequence) -> None:
        """Stop computing a sequence that was added or joined; its blocks are free once no step and no transfer reads
        them."""
        if sequence.phase in (Phase.WAITING, Phase.PREFILLING, Phase.DECODING):
            self._retire(sequence)

    def op_done(self, sequence: Sequence) -> None:
        """The transfer out of a handed-over sequence's blocks has ended."""
        self._sending.discard(sequence)
        if sequence.over and not self._touched(sequence):
            self._pool.release(sequence.blocks, Hold.IN_FLIGHT)
            sequence.blocks = []

    def finish_after(self, sequence: Sequence, token_id: int) -> tuple[FinishReason, int | None] | None:
        """Why `sequence` would be over with `token_id` as its next token, with the id that stops it, if one does."""
        return sequence.finish_reason_of(token_id, sequence.num_output + 1, self._eos, self._max_context)

    def load(self) -> Load:
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
        self._pool.check_integrity()

    # ---- steps

    def plan(self, now: float) -> StepPlan:
        """The next step, its blocks allocated; `commit` follows. Empty if there is nothing to do, or nothing before the
        commit of the step in flight. At most one may be."""
        assert len(self._in_flight) < 2, "a step would take tokens of more than the one before it"
        step = self._scheduler.schedule(behind=bool(self._in_flight))
        if not step:
            return StepPlan()
        before = self._in_flight[-1] if self._in_flight else Step()
        landed, self._landed = tuple(self._landed), set()
        plan = plan_of(step, before, landed, self._block_size, mrope=self._mrope)
        for sequence in step.sequences:
            sequence.first_scheduled = sequence.first_scheduled or now
        for sequence in step.decodes:
            sequence.planned += 1
        for chunk in step.chunks:
            chunk.sequence.planned += chunk.length
            chunk.sequence.chunks += 1
            chunk.sequence.pushed_blocks = max(chunk.sequence.pushed_blocks, chunk.push.stop)
        for sequence in step.drawing:
            sequence.drawing += 1
        self._in_flight.append(step)
        return plan

    def commit(self, result: StepResult) -> StepReport:
        """Take the result of the oldest step: advance what was computed, append the tokens, retire what is over; a
        sequence at fault ends here."""
        step = self._in_flight.popleft()
        for sequence in step.decodes:
            sequence.computed += 1
        for chunk in step.chunks:
            chunk.sequence.computed += chunk.length
        for sequence in step.drawing:
            sequence.drawing -= 1
        taken = zip(step.sequences, result, strict=True)
        return [item for sequence, piece in taken for item in self._take(sequence, piece)]

    def _take(self, sequence: Sequence, piece: PieceResult) -> StepReport:
        """Apply a step's result to a sequence, which may have ended meanwhile."""
        if piece.fault is not None:
            self._index.forget(sequence.blocks)
        elif not sequence.over:
            self._publish(sequence)
        if sequence.over:
            if not self._touched(sequence):
                self._give_back(sequence)
            return []
        if piece.fault is not None:
            self._retire(sequence)
            return [Faulted(sequence, piece.fault)]
        report: StepReport = []
        sequence.scores += piece.scores
        if piece.tokens and sequence.wants_scores:
            report.append(Scored(sequence, PromptLogprobs(tuple(sequence.scores))))
        for token in piece.tokens:
            report.append(sampled := self._append(sequence, token))
            if sampled.token.finish is not None:
                break
        return report

    def _append(self, sequence: Sequence, token: TokenEvent) -> Sampled:
        if sequence.hand_over:
            self._retire(sequence)
            return Sampled(sequence, token)
        sequence.token_ids.append(token.token_id)
        sequence.phase = Phase.DECODING
        over = self._finish_of(sequence)
        if over is None:
            return Sampled(sequence, token)
        self._retire(sequence)
        return Sampled(sequence, replace(token, finish=over[0]), over[1])

    def _finish_of(self, sequence: Sequence) -> tuple[FinishReason, int | None] | None:
        return sequence.finish_reason(self._eos, self._max_context)

    # ---- blocks

    def _require_room(self) -> None:
        active = len(self._scheduler.running) + len(self._scheduler.waiting) + len(self._reserved)
        if active >= self._max_running:
            raise Overloaded(f"{active} requests are running already")
        quarantined = self._pool.counts()[Hold.QUARANTINED]
        if quarantined >= self._quarantine_blocks:
            raise Overloaded(f"{quarantined} KV blocks are in quarantine, the bound is {self._quarantine_blocks}")

    def _publish(self, sequence: Sequence) -> None:
        """Offer the blocks that have become full to later prompts."""
        full = min(sequence.computed // self._block_size, len(sequence.extend_hashes(self._block_size)))
        for index in range(sequence.published, full):
            self._index.publish(sequence.blocks[index], sequence.hashes[index])
        sequence.published = max(sequence.published, full)

    def _retire(self, sequence: Sequence) -> None:
        sequence.phase = Phase.OVER
        self._scheduler.remove(sequence)
        self._on_work()  # its place in the batch is free
        if not self._touched(sequence):
            self._give_back(sequence)

    def _touched(self, sequence: Sequence) -> bool:
        """Whether a step in flight uses its blocks."""
        return any(sequence in step.sequences for step in self._in_flight)

    def _give_back(self, sequence: Sequence) -> None:
        self._unseen += [(sequence.ticket, image) for image in sorted(sequence.here)]
        sequence.here = set()
        if sequence in self._sending:
            self._pool.move(sequence.blocks, Hold.OWNED, Hold.IN_FLIGHT)
            return
        self._pool.release(sequence.blocks, Hold.OWNED)
        sequence.blocks = []
