"""The legs of a worker: each is served by the handler of its kind, all on one engine. Event loop only.

`Legs` is what the wire and the engine talk to (a `wire.worker_server.LegHandler`). It accepts legs, watches their
deadlines and ends them; a `Handler` says how legs of its kind begin, what a step's report means for them, and how
they are given up. A worker serves the kinds of legs that it has handlers for, whatever its role.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from opentelemetry.trace import Span, SpanKind

from tercet import logs, tracing
from tercet.core import Leg, Load, Role, Ticket
from tercet.engine.loop import Engine
from tercet.engine.report import StepItem, StepReport
from tercet.engine.runner import PushBlocks
from tercet.engine.sequence import Sequence
from tercet.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineFault,
    InvalidRequest,
    Overloaded,
    ProtocolViolation,
    TercetError,
    WorkerDrained,
)
from tercet.roles.stages import LastImage
from tercet.wire.worker_server import ReportStream

if TYPE_CHECKING:
    from tercet.roles.embeddings import Embedded, EmbeddingSource, Leave

log = logging.getLogger(__name__)


@dataclass(eq=False)
class ActiveLeg:
    leg: Leg
    stream: ReportStream
    sequence: Sequence
    timer: asyncio.TimerHandle
    unseen: dict[int, Leave] = field(default_factory=dict)  # images whose embeddings are on their way
    last_image: LastImage | None = None  # of those that came
    span: Span = tracing.UNTRACED  # from here until `Legs.forget`

    @property
    def ticket(self) -> Ticket:
        return self.sequence.ticket


class Legs:
    def __init__(self, loop: asyncio.AbstractEventLoop, spans: tracing.Tracing = tracing.OFF) -> None:
        self.loop = loop
        self.spans = spans
        self.handlers: dict[Role, Handler] = {}  # kind of leg -> who serves it
        self._active: dict[Ticket, ActiveLeg] = {}
        self.engine: Engine | None = None  # of a worker that computes prompts or decodes
        self.images: EmbeddingSource | None = None  # where prompts are computed, of a model that sees
        self._draining = False
        self._dead: TercetError | None = None  # why no leg can be served here any more

    # ---- what the wire calls

    def start(self, leg: Leg, stream: ReportStream) -> None:
        ticket = leg.ticket
        if self._dead is not None:
            stream.failed(leg, self._dead)
            return
        handler = self.handlers.get(leg.kind)
        if handler is None:
            stream.failed(
                leg, ProtocolViolation(f"{leg.kind} legs are not served here, only {', '.join(self.handlers)}")
            )
            return
        if self._draining or ticket in self._active or self._settling(ticket):
            stream.rejected(leg, "the worker is draining" if self._draining else f"{ticket} is not over yet")
            return
        sequence = Sequence(ticket, list(leg.token_ids), leg.num_prompt, leg.params, kind=leg.kind, images=leg.images)
        timer = self.loop.call_later(leg.timeout_s, self._expire, ticket)
        active = self._active[ticket] = ActiveLeg(leg, stream, sequence, timer, span=self._span(leg))
        try:
            if self.engine is not None:
                self.engine.check_ids(leg.token_ids)
            self._check_images(leg)
            handler.begin(active)
            self._want_images(active)
        except Overloaded as error:
            self.forget(active, error)
            stream.rejected(leg, str(error))
        except TercetError as error:
            self.fail(active, error)

    def abort(self, ticket: Ticket) -> None:
        active = self._active.get(ticket)
        if active is not None:
            aborted = Cancelled("the request was aborted")
            self.forget(active, aborted)
            self._give_up(active, aborted)

    def meet(self, endpoints: Iterable[str]) -> None:
        for handler in self.handlers.values():
            handler.meet(endpoints)

    def disconnected(self, stream: ReportStream) -> None:
        for active in [a for a in self._active.values() if a.stream is stream]:
            self.abort(active.ticket)

    # ---- what the engine calls

    def on_step(self, report: StepReport) -> None:
        """On the engine's thread."""
        for kind, handler in self.handlers.items():
            own = [item for item in report if item.sequence.kind == kind]
            if own:
                handler.on_step(own)

    # ---- what handlers call

    def of(self, ticket: Ticket) -> ActiveLeg | None:
        return self._active.get(ticket)

    def fail(self, active: ActiveLeg, error: TercetError) -> None:
        """End a leg with an error, if it has not ended yet."""
        if self.forget(active, error):
            active.stream.failed(active.leg, error)

    def forget(self, active: ActiveLeg, error: TercetError | None = None) -> bool:
        """Remove a leg from the table; error: why it did not succeed. False: it was removed before."""
        if log.isEnabledFor(logging.DEBUG):
            how = "is done" if error is None else logs.reason(error)
            log.debug("a %s leg %s", active.leg.kind, how, extra=logs.about(active.ticket.asked, active.span))
        tracing.end(active.span, error)
        active.timer.cancel()
        if active.leg.images and self.engine is not None:
            self.engine.abort(active.sequence)  # one that was never queued may have been given embeddings
        while active.unseen:
            active.unseen.popitem()[1]()
        return self._active.pop(active.ticket, None) is not None

    def take_each(self, report: StepReport, take: Callable[[StepItem, float], None]) -> None:
        """On the engine's thread: have `take(item, now)` called on the loop for each item. One that raises ends its own
        leg, and costs the others of the step nothing."""
        self.loop.call_soon_threadsafe(self._take_each, report, take, time.monotonic())

    def _take_each(self, report: StepReport, take: Callable[[StepItem, float], None], now: float) -> None:
        for item in report:
            try:
                take(item, now)
            except Exception as error:  # a boundary between requests
                log.exception("a report could not be passed on", extra=logs.about(item.sequence.ticket.asked))
                if (active := self._active.get(item.sequence.ticket)) is not None:
                    self._end(active, EngineFault(f"{active.ticket}: unexpected {type(error).__name__}: {error}"))

    # ---- what the worker calls

    def die(self, error: TercetError) -> None:
        """The engine is dead: fail every leg, and each later one."""
        self._dead = error
        for active in list(self._active.values()):
            self.fail(active, error)

    async def drain(self, timeout_s: float) -> None:
        """Take no new legs and wait for those under way; those not done in time end with WorkerDrained."""
        self._draining = True
        deadline = self.loop.time() + timeout_s
        while self._active and self.loop.time() < deadline:
            await asyncio.sleep(0.05)
        for active in list(self._active.values()):
            self._end(active, WorkerDrained(f"{active.ticket} did not end within the {timeout_s:g} s of the drain"))

    def load(self) -> Load:
        """The engine's load, with the handlers' counters."""
        load = Load() if self.engine is None else self.engine.load()
        for handler in self.handlers.values():
            load = handler.counted(load)
        load = replace(load, spans_dropped=self.spans.dropped)
        return load if self.images is None else self.images.counted(load)

    async def close(self) -> None:
        for handler in self.handlers.values():
            await handler.close()
        if self.images is not None:
            await self.images.close()

    # ---- inside

    def _check_images(self, leg: Leg) -> None:
        """Raises InvalidRequest, ProtocolViolation."""
        end, computes = 0, leg.kind in (Role.PREFILL, Role.AGGREGATED)
        if leg.images and computes and self.images is None:
            raise InvalidRequest("this model takes no images")
        if not leg.images and leg.kind is Role.ENCODE:
            raise ProtocolViolation("a leg to encode no images")
        takes_files = computes and self.images is not None and self.images.takes_files
        for image in leg.images:
            tiles, rows, columns = image.grid
            for first, count in image.spans:
                if not end <= first < first + count <= leg.num_prompt:
                    raise ProtocolViolation(f"an image at {image.spans} of a prompt of {leg.num_prompt} tokens")
                end = first + count
            if image.tokens != tiles * rows * columns or not image.tokens:
                raise ProtocolViolation(f"an image of {image.grid} tokens, {image.tokens} in the prompt")
            if bool(image.content) != takes_files and leg.kind is not Role.ENCODE:
                raise ProtocolViolation(f"an image came {'with' if image.content else 'without'} its file")

    def _want_images(self, active: ActiveLeg) -> None:
        """Give the images' embeddings to the engine, each as it comes."""
        if self.images is None or active.leg.kind not in (Role.PREFILL, Role.AGGREGATED):
            return
        for number, image in enumerate(active.leg.images):
            take = partial(self._embedded, active, number)
            active.unseen[number] = self.images.want(active.ticket, image, take)

    def _embedded(self, active: ActiveLeg, number: int, what: Embedded | BaseException) -> None:
        active.unseen.pop(number, None)
        if self._active.get(active.ticket) is not active or self.engine is None:
            return
        if isinstance(what, TercetError):
            self._end(active, what)
        elif isinstance(what, BaseException):
            log.error("an image could not be encoded", exc_info=what, extra=logs.about(active.ticket.asked))
            self._end(active, EngineFault(f"an image of {active.ticket}: unexpected {type(what).__name__}: {what}"))
        else:
            active.last_image = LastImage(time.monotonic(), what.transfer_s)
            self.engine.see(active.sequence, number, what.values)

    def _span(self, leg: Leg) -> Span:
        told: tracing.Told = {
            "tercet.request_id": leg.ticket.asked,
            "tercet.attempt": leg.ticket.attempt,
            "tercet.tokens": leg.size,
        }
        return self.spans.below(leg.trace, leg.kind.value, told, SpanKind.SERVER)

    def _settling(self, ticket: Ticket) -> bool:
        return any(handler.settling(ticket) for handler in self.handlers.values())

    def _give_up(self, active: ActiveLeg, error: TercetError) -> None:
        self.handlers[active.leg.kind].give_up(active, error)

    def _expire(self, ticket: Ticket) -> None:
        active = self._active.get(ticket)
        if active is not None:
            error = DeadlineExceeded(f"request {ticket.request_id} ran out of its {active.leg.timeout_s:.1f} s")
            self._end(active, error)

    def _end(self, active: ActiveLeg, error: TercetError) -> None:
        self.fail(active, error)
        self._give_up(active, error)


class Handler(ABC):
    """Serves the legs of one kind."""

    push: PushBlocks | None = None  # called with the blocks that the engine completes
    endpoint: str = ""  # where workers of the stage before send what this handler's legs need

    def __init__(self, legs: Legs) -> None:
        self.legs = legs

    @property
    def engine(self) -> Engine:
        assert self.legs.engine is not None, "only an encode worker has none"
        return self.legs.engine

    @abstractmethod
    def begin(self, active: ActiveLeg) -> None:
        """Accept a leg, or raise Overloaded."""

    @abstractmethod
    def give_up(self, active: ActiveLeg, error: TercetError) -> None:
        """Free what the leg holds here and at the peer; it is no longer in the table."""

    @abstractmethod
    def on_step(self, report: StepReport) -> None:
        """Take a step's report on legs of this kind. Called on the engine's thread."""

    def settling(self, ticket: Ticket) -> bool:
        """Whether blocks of an earlier leg of this ticket are not settled yet."""
        return False

    def meet(self, endpoints: Iterable[str]) -> None:  # noqa: B027  # the last stage connects to none
        """Connect to these workers of the next stage, before the first request needs them."""

    def counted(self, load: Load) -> Load:
        """`load` plus this handler's counters."""
        return load

    async def close(self) -> None:  # noqa: B027  # some hold nothing
        """No more legs will come: close what this handler has opened."""
