"""The data replicas of a group as one state: each has requests, blocks and a prefix cache of its own, and all compute
their steps together, since they share experts. A replica with nothing to do takes part with an empty plan.

Which replica a request goes to: where KV is handed over, both ends know it from the ticket alone (`replica_of`); else
the one with the fewest requests.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import fields, replace

from tercet.core import FinishReason, Load, Ticket
from tercet.engine.plan import ImageKey, StepPlan, StepResult
from tercet.engine.report import StepReport
from tercet.engine.sequence import Sequence
from tercet.engine.state import EngineState
from tercet.errors import WorkerDrained

SUMMED = [field.name for field in fields(Load) if isinstance(field.default, int)]


def replica_of(ticket: Ticket, replicas: int) -> int:
    """The next attempt at a request gets another one, so that one that is lost is not tried again and again."""
    return (zlib.crc32(ticket.request_id.encode()) + ticket.attempt) % replicas


class Replicas:
    """Not thread-safe. The verbs are those of EngineState."""

    def __init__(self, count: int, new: Callable[[], EngineState]) -> None:
        """new: makes the state of a replica."""
        self._new = new
        self._states = [new() for _ in range(count)]  # of each replica; one that comes back has another one
        self._lost: set[int] = set()  # replicas whose rank is out
        self._left: list[EngineState] = []  # of those that came back: they may have sequences to report
        self._preemptions = 0  # of states that are no more
        self._losses = 0
        self._in_flight: deque[list[tuple[EngineState, int]]] = deque()  # who planned, and how many pieces

    def add(self, sequence: Sequence, now: float) -> None:
        if sequence.hand_over:
            self._place(sequence, replica_of(sequence.ticket, len(self._states)))
        else:
            loads = {replica: self._states[replica].load() for replica in self._live}
            self._place(sequence, min(loads, key=lambda r: loads[r].running + loads[r].waiting))
        self._of(sequence).add(sequence, now)

    def reserve(self, sequence: Sequence) -> tuple[int, list[int]]:
        self._place(sequence, replica_of(sequence.ticket, len(self._states)))
        return self._of(sequence).reserve(sequence)

    def join(self, sequence: Sequence, first_token: int) -> None:
        self._of(sequence).join(sequence, first_token)

    def quarantine(self, sequence: Sequence) -> None:
        self._of(sequence).quarantine(sequence)

    def release(self, sequence: Sequence, verified: int = 0) -> None:
        self._of(sequence).release(sequence, verified)

    def see(self, sequence: Sequence, image: int) -> bool:
        return self._of(sequence).see(sequence, image)

    def evicted(self) -> StepReport:
        left, self._left = self._left, []
        return [item for state in (*left, *self._states) for item in state.evicted()]

    def forgotten(self) -> list[ImageKey]:
        return [key for state in self._states for key in state.forgotten()]

    def abort(self, sequence: Sequence) -> None:
        self._of(sequence).abort(sequence)

    def op_done(self, sequence: Sequence) -> None:
        self._of(sequence).op_done(sequence)

    def finish_after(self, sequence: Sequence, token_id: int) -> tuple[FinishReason, int | None] | None:
        return self._of(sequence).finish_after(sequence, token_id)

    def load(self) -> Load:
        loads = [self._states[replica].load() for replica in self._live]
        total = replace(loads[0], **{name: sum(getattr(load, name) for load in loads) for name in SUMMED})
        preemptions = self._preemptions + sum(state.load().preemptions for state in self._states)
        # A replica that can be lost has one rank.
        return replace(total, preemptions=preemptions, ranks_lost=len(self._lost), rank_losses=self._losses)

    def check_integrity(self) -> None:
        for state in self._states:
            state.check_integrity()

    def plan(self, now: float) -> StepPlan:
        """That of the first replica, with those of the others in `others`; empty if all are."""
        plans = [state.plan(now) for state in self._states]
        if not any(plan.pieces for plan in plans):
            return StepPlan()
        sizes = [len(plan.pieces) for plan in plans]
        self._in_flight.append([(state, size) for state, size in zip(self._states, sizes, strict=True) if size])
        return plans[0]._replace(others=tuple(plans[1:]))

    def commit(self, result: StepResult) -> StepReport:
        report: StepReport = []
        rest = list(result)
        for state, size in self._in_flight.popleft():
            report += state.commit(rest[:size])
            rest = rest[size:]
        return report

    def lose(self, replica: int) -> None:
        """Its rank is lost, with its KV. What it has ends (`evicted`), and nothing more goes there."""
        self._lost.add(replica)
        self._losses += 1
        self._states[replica].lose()

    def restore(self, replica: int) -> None:
        """Its rank is there again, with empty memory."""
        self._left.append(self._states[replica])
        self._preemptions += self._states[replica].load().preemptions
        self._states[replica] = self._new()
        self._lost.discard(replica)

    @property
    def _live(self) -> list[int]:
        return [replica for replica in range(len(self._states)) if replica not in self._lost]

    def _place(self, sequence: Sequence, replica: int) -> None:
        """Raises WorkerDrained, so that the request goes on elsewhere: the next attempt gets another replica."""
        if replica in self._lost:
            raise WorkerDrained(f"the rank of replica {replica} is lost")
        sequence.state = self._states[replica]

    def _of(self, sequence: Sequence) -> EngineState:
        """One that ends before it is added has no state, and holds nothing in any."""
        return sequence.state or self._states[0]
