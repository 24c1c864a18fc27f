"""Make embeddings of images for workers that compute prompts, and push them there: an offer for each image at once, the
embeddings when they are made and there is room for them at both ends.

begin ─open─> offered ─Granted─┐
  └──> encoder ─── embeddings ─┴─> region ─push, finish─> written ─Released─> finished, with the leg's last image
                 └──── Failed ─────> failed, and the leg with it                OpDone: the source blocks are free
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

from opentelemetry.trace import Span
from torch import Tensor

from tercet import logs, tracing
from tercet.core import Done, FinishReason, Load, PromptImage, Ticket
from tercet.engine.blocks import Hold
from tercet.engine.report import StepReport
from tercet.errors import EngineFault, ImageForgotten, Overloaded, TercetError
from tercet.roles.embedding_region import EmbeddingRegion, image_ticket
from tercet.roles.encoder import Encoder
from tercet.roles.legs import ActiveLeg, Handler, Legs
from tercet.roles.peers import Peers
from tercet.transfer.mover.sender import KvSender
from tercet.transfer.protocol.facts import Granted, OpDone, Released, SendEvent, SendFailed

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Outgoing:
    active: ActiveLeg
    image: PromptImage
    ticket: Ticket
    future: Future[Tensor]
    granted: bool = False
    embeddings: Tensor | None = None
    blocks: list[int] = field(default_factory=list)  # of the region, once there was room
    copying: bool = False  # into them
    ended: bool = False  # meanwhile: nothing of it is under way
    given_up: TercetError | None = None
    encoding: Span = tracing.UNTRACED
    transfer: Span = tracing.UNTRACED  # from when it is in the region


class Encode(Handler):
    sender: KvSender
    peers: Peers

    def __init__(self, legs: Legs, encoder: Encoder, region: EmbeddingRegion, max_legs: int) -> None:
        super().__init__(legs)
        self.encoder, self._region, self._max_legs = encoder, region, max_legs
        self._outgoing: dict[Ticket, _Outgoing] = {}  # an image's ticket; until OpDone
        self._of_leg: dict[Ticket, list[_Outgoing]] = {}  # a leg's ticket; until the last one's OpDone
        self._ready: deque[_Outgoing] = deque()  # for whose embeddings there is no room yet
        self._copies = ThreadPoolExecutor(1, thread_name_prefix="embeddings")  # large ones take long

    def send_by(self, sender: KvSender) -> None:
        self.sender, self.peers = sender, Peers(self.legs.loop, sender)

    def meet(self, endpoints: Iterable[str]) -> None:
        self.peers.meet(endpoints)

    def counted(self, load: Load) -> Load:
        return replace(
            self.encoder.counted(self._region.counted(load)),
            running=len(self._of_leg),
            transfer_dropped=load.transfer_dropped + self.sender.dropped().total(),
            pairs=self.peers.states(),
        )

    async def close(self) -> None:
        await self.peers.close()
        await self.legs.loop.run_in_executor(None, self.encoder.close)
        await self.legs.loop.run_in_executor(None, self._copies.shutdown)
        self._region.close()

    # ---- legs

    def begin(self, active: ActiveLeg) -> None:
        leg = active.leg
        if len(self._of_leg) >= self._max_legs:
            raise Overloaded(f"the images of {len(self._of_leg)} requests are waiting or being encoded already")
        each = self._of_leg[active.ticket] = self._asked(active)
        deadline = time.monotonic() + leg.timeout_s
        for outgoing in each:
            self._outgoing[outgoing.ticket] = outgoing
            wanted = partial(_is_wanted, outgoing)
            opened = partial(self._opened, outgoing)
            self.peers.open(outgoing.ticket, leg.peer, outgoing.image.tokens, deadline, wanted, opened)
            ended = asyncio.wrap_future(outgoing.future, loop=self.legs.loop)
            ended.add_done_callback(partial(self._encoded, outgoing))
            told = {"tercet.tokens": outgoing.image.tokens}
            outgoing.encoding = self.legs.spans.child(active.span, "encode.image", told)

    def give_up(self, active: ActiveLeg, error: TercetError) -> None:
        for outgoing in self._of_leg.get(active.ticket, ()):
            if outgoing.given_up is None:
                outgoing.given_up = error
                self.encoder.leave(outgoing.image, outgoing.future)
                self.sender.cancel(outgoing.ticket, error)

    def settling(self, ticket: Ticket) -> bool:
        return ticket in self._of_leg

    def on_step(self, report: StepReport) -> None:
        raise AssertionError("no engine computes images")

    def _asked(self, active: ActiveLeg) -> list[_Outgoing]:
        """Raises ImageForgotten."""
        each: list[_Outgoing] = []
        try:
            for image in active.leg.images:
                ticket = image_ticket(active.ticket, image, active.ticket.epoch)
                each.append(_Outgoing(active, image, ticket, self.encoder.encode(image)))
        except ImageForgotten:
            for outgoing in each:
                self.encoder.leave(outgoing.image, outgoing.future)
            raise
        return each

    def _fail(self, outgoing: _Outgoing, error: TercetError) -> None:
        self.legs.fail(outgoing.active, error)
        self.give_up(outgoing.active, error)

    def _opened(self, outgoing: _Outgoing, told: str | TercetError) -> None:
        if isinstance(told, TercetError):
            self._fail(outgoing, told)
            self._forget(outgoing)
        elif outgoing.given_up is not None:
            self.sender.cancel(outgoing.ticket, outgoing.given_up)

    def _encoded(self, outgoing: _Outgoing, ended: asyncio.Future[Tensor]) -> None:
        if ended.cancelled():
            return
        error = ended.exception()
        tracing.end(outgoing.encoding, error if isinstance(error, TercetError) else None)
        if outgoing.given_up is not None:
            return
        if error is None:
            outgoing.embeddings = ended.result()
            self._write_if_ready(outgoing)
        elif isinstance(error, TercetError):
            self._fail(outgoing, error)
        else:
            self._unexpected(outgoing, error)

    def _unexpected(self, outgoing: _Outgoing, error: BaseException) -> None:
        told = logs.about(outgoing.active.ticket.asked, outgoing.active.span)
        log.error("an image could not be encoded", exc_info=error, extra=told)
        where = f"an image of {outgoing.active.ticket}"
        self._fail(outgoing, EngineFault(f"{where}: unexpected {type(error).__name__}: {error}"))

    # ---- their way out

    def _write_if_ready(self, outgoing: _Outgoing) -> None:
        if outgoing.granted and outgoing.embeddings is not None and outgoing.given_up is None:
            self._ready.append(outgoing)
            self._write()

    def _write(self) -> None:
        while self._ready:
            outgoing = self._ready[0]
            if outgoing.given_up is None:
                try:
                    outgoing.blocks = self._region.allocate(outgoing.image.tokens, Hold.IN_FLIGHT)
                except Overloaded:
                    return
            self._ready.popleft()
            if outgoing.given_up is None and outgoing.embeddings is not None:
                outgoing.copying = True
                what = outgoing.blocks, outgoing.embeddings
                copied = self.legs.loop.run_in_executor(self._copies, self._region.write, *what)
                copied.add_done_callback(partial(self._copied, outgoing))

    def _copied(self, outgoing: _Outgoing, copied: asyncio.Future[None]) -> None:
        outgoing.copying, outgoing.embeddings, error = False, None, copied.exception()
        if outgoing.ended:
            self._forget(outgoing)
        elif error is not None:
            self._unexpected(outgoing, error)
        elif outgoing.given_up is None:
            outgoing.transfer = self.legs.spans.child(outgoing.active.span, "embedding.transfer")
            for level in range(self._region.levels):
                self.sender.push(outgoing.ticket, level, 0, outgoing.blocks)
            self.sender.finish(outgoing.ticket, b"")

    def on_event(self, event: SendEvent) -> None:
        """Called on a mover thread."""
        self.legs.loop.call_soon_threadsafe(self._on_event, event)

    def _on_event(self, event: SendEvent) -> None:
        outgoing = self._outgoing.get(event.ticket)
        if outgoing is None:
            return
        match event:
            case Granted():
                outgoing.granted = True
                self._write_if_ready(outgoing)
            case SendFailed(_, error):
                tracing.end(outgoing.transfer, error)
                self._fail(outgoing, error)
            case Released(_, num_bytes):
                tracing.end(outgoing.transfer, None, {"tercet.embedding.bytes": num_bytes})
            case OpDone() if outgoing.copying:  # its blocks are not free yet
                outgoing.ended = True
            case OpDone():
                self._forget(outgoing)

    def _forget(self, outgoing: _Outgoing) -> None:
        """Nothing of it is under way any more; with the last image of a leg, the leg has ended."""
        del self._outgoing[outgoing.ticket]
        tracing.end(outgoing.encoding, outgoing.given_up)
        tracing.end(outgoing.transfer, outgoing.given_up)
        if outgoing.blocks:
            self._region.pool.release(outgoing.blocks, Hold.IN_FLIGHT)
        active = outgoing.active
        left = self._of_leg[active.ticket]
        left.remove(outgoing)
        if not left:
            del self._of_leg[active.ticket]
            if self.legs.forget(active):
                active.stream.finished(active.leg, Done(FinishReason.LENGTH))
        self._write()


def _is_wanted(outgoing: _Outgoing) -> bool:
    return outgoing.given_up is None
