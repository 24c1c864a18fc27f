"""What every role does with its legs: take them in, watch their deadlines, give them up. Event loop only."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from tercet.core import Leg, Ticket
from tercet.engine.loop import Engine
from tercet.engine.report import StepReport
from tercet.engine.sequence import Sequence
from tercet.errors import DeadlineExceeded, Overloaded, TercetError
from tercet.wire.worker_server import ReportStream


@dataclass(eq=False)
class ActiveLeg:
    leg: Leg
    stream: ReportStream
    sequence: Sequence
    timer: asyncio.TimerHandle

    @property
    def ticket(self) -> Ticket:
        return self.sequence.ticket


class LegRole(ABC):
    """A `wire.worker_server.LegHandler`. A subclass says how a leg begins and how it is given up."""

    engine: Engine

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._legs: dict[Ticket, ActiveLeg] = {}
        self._draining = False
        self._dead: TercetError | None = None  # why no leg can be served here any more

    @abstractmethod
    def begin(self, active: ActiveLeg) -> None:
        """Take a leg in, or raise Overloaded."""

    @abstractmethod
    def give_up(self, active: ActiveLeg, error: TercetError) -> None:
        """Free what the leg holds here and at the peer; the leg is already out of the table."""

    def settling(self, ticket: Ticket) -> bool:
        """Whether blocks of an earlier leg of this ticket are not settled yet."""
        return False

    @abstractmethod
    def on_sampled(self, report: StepReport) -> None:
        """What an engine step brought: tokens, or the faults that ended sequences. Called on the engine's thread."""

    def start(self, leg: Leg, stream: ReportStream) -> None:
        ticket = leg.ticket
        if self._dead is not None:
            stream.failed(leg, self._dead)
            return
        if self._draining or ticket in self._legs or self.settling(ticket):
            stream.rejected(leg, "the worker is draining" if self._draining else f"{ticket} is not over yet")
            return
        sequence = Sequence(ticket, list(leg.token_ids), leg.num_prompt, leg.params)
        timer = self._loop.call_later(leg.timeout_s, self._expire, ticket)
        active = self._legs[ticket] = ActiveLeg(leg, stream, sequence, timer)
        try:
            self.engine.check_ids(leg.token_ids)
            self.begin(active)
        except Overloaded as error:
            self.forget(active)
            stream.rejected(leg, str(error))
        except TercetError as error:
            self.fail(active, error)

    def abort(self, ticket: Ticket) -> None:
        active = self._legs.get(ticket)
        if active is not None:
            self.forget(active)
            self.give_up(active, TercetError("the request was aborted"))

    def meet(self, endpoints: Iterable[str]) -> None:  # noqa: B027  # only a prefill worker goes to others
        """Connect to these decode workers, before the first request needs them."""

    def disconnected(self, stream: ReportStream) -> None:
        for active in [a for a in self._legs.values() if a.stream is stream]:
            self.abort(active.ticket)

    def fail(self, active: ActiveLeg, error: TercetError) -> None:
        """End a leg with an error, if it has not ended yet."""
        if self.forget(active):
            active.stream.failed(active.leg, error)

    def die(self, error: TercetError) -> None:
        """The engine is dead: fail every leg, and each that still comes."""
        self._dead = error
        for active in list(self._legs.values()):
            self.fail(active, error)

    def forget(self, active: ActiveLeg) -> bool:
        """Take a leg out of the table. False: it was out already."""
        active.timer.cancel()
        return self._legs.pop(active.ticket, None) is not None

    async def drain(self, timeout_s: float) -> None:
        """Take no new legs and wait for those under way."""
        self._draining = True
        deadline = self._loop.time() + timeout_s
        while self._legs and self._loop.time() < deadline:
            await asyncio.sleep(0.05)

    def _expire(self, ticket: Ticket) -> None:
        active = self._legs.get(ticket)
        if active is not None:
            error = DeadlineExceeded(f"request {ticket.request_id} ran out of its {active.leg.timeout_s:.1f} s")
            self.fail(active, error)
            self.give_up(active, error)
