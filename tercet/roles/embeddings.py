"""Where a worker that computes prompts gets the embeddings of their images: from an encoder beside its engine, or from
encode workers. Event loop only."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

from torch import Tensor

from tercet.core import Load, PromptImage, Ticket
from tercet.engine.blocks import Hold
from tercet.errors import Cancelled, Overloaded, TransferError
from tercet.roles.embedding_region import EmbeddingRegion, image_ticket
from tercet.roles.encoder import Encoder
from tercet.transfer.mover.receiver import KvReceiver
from tercet.transfer.protocol.facts import Complete, Quiesced, ReceiveEvent, ReceiveFailed


class Embedded(NamedTuple):
    values: Tensor  # [levels, tokens, hidden size]
    transfer_s: float = 0.0  # since they were written, at another worker


Then = Callable[[Embedded | BaseException], None]
Leave = Callable[[], None]


class EmbeddingSource(ABC):
    takes_files: bool  # whether images come to this worker with their files
    endpoint: str = ""  # where encode workers send embeddings

    @property
    @abstractmethod
    def progress(self) -> int:
        """It grows as long as embeddings get on. Any thread."""

    @abstractmethod
    def want(self, ticket: Ticket, image: PromptImage, then: Then) -> Leave:
        """`then` is called, later and once, with the embeddings or with why there are none; not after the call of what
        this returns, which says that they are no longer wanted."""

    @abstractmethod
    def counted(self, load: Load) -> Load:
        """`load` plus its counters."""

    @abstractmethod
    async def close(self) -> None: ...


class OwnEncoder(EmbeddingSource):
    takes_files = True

    def __init__(self, loop: asyncio.AbstractEventLoop, encoder: Encoder) -> None:
        self._loop, self.encoder = loop, encoder

    def want(self, ticket: Ticket, image: PromptImage, then: Then) -> Leave:
        future, wanted = self.encoder.encode(image), [True]

        def leave() -> None:
            wanted.clear()  # it may have ended already, and be about to be told
            self.encoder.leave(image, future)

        def tell(ended: asyncio.Future[Tensor]) -> None:
            what = None if ended.cancelled() else ended.exception() or Embedded(ended.result())
            if wanted and what is not None:
                then(what)

        asyncio.wrap_future(future, loop=self._loop).add_done_callback(tell)
        return leave

    @property
    def progress(self) -> int:
        return self.encoder.progress

    def counted(self, load: Load) -> Load:
        return self.encoder.counted(load)

    async def close(self) -> None:
        await self._loop.run_in_executor(None, self.encoder.close)


@dataclass(eq=False)
class _Arriving:
    ticket: Ticket
    image: PromptImage
    then: Then | None  # None: no longer wanted
    blocks: list[int] = field(default_factory=list)  # leased, or in quarantine


class EncodeWorkers(EmbeddingSource):
    """Each image is a ticket of the mover. Its blocks are leased only until it has landed and been copied to where the
    engine reads it, so an image that has landed never waits for another that has no room: no two can block each
    other."""

    takes_files = False
    receiver: KvReceiver

    def __init__(
        self, loop: asyncio.AbstractEventLoop, region: EmbeddingRegion, epoch: int, most_quarantined: int
    ) -> None:
        """most_quarantined: blocks; more, and no image is admitted."""
        self._loop, self._region, self._epoch = loop, region, epoch
        self._most_quarantined = most_quarantined
        self._waiting: deque[_Arriving] = deque()  # for room, in their order
        self._admitted: dict[Ticket, _Arriving] = {}  # until complete or quiet
        self._bytes = 0
        self._copies = ThreadPoolExecutor(1, thread_name_prefix="embeddings")  # large ones take long

    @property
    def progress(self) -> int:
        return self.receiver.progress()

    def want(self, ticket: Ticket, image: PromptImage, then: Then) -> Leave:
        arriving = _Arriving(image_ticket(ticket, image, self._epoch), image, then)
        self._waiting.append(arriving)
        self.receiver.expect(arriving.ticket)
        self._admit()
        return partial(self._leave, arriving)

    def counted(self, load: Load) -> Load:
        receiver = self.receiver
        return replace(
            self._region.counted(load),
            transfer_dropped=load.transfer_dropped + receiver.dropped().total(),
            transfer_refused=load.transfer_refused + receiver.refused().total(),
            transfer_corrupt=load.transfer_corrupt + receiver.corrupt(),
            embedding_bytes=self._bytes,
        )

    async def close(self) -> None:
        await self._loop.run_in_executor(None, self.receiver.stop)
        await self._loop.run_in_executor(None, self._copies.shutdown)
        self._region.close()

    def _admit(self) -> None:
        while self._waiting:
            if self._region.pool.counts()[Hold.QUARANTINED] >= self._most_quarantined:
                return
            arriving = self._waiting[0]
            try:
                arriving.blocks = self._region.allocate(arriving.image.tokens, Hold.LEASED)
            except Overloaded:
                return
            self._waiting.popleft()
            self._admitted[arriving.ticket] = arriving
            self.receiver.admit(arriving.ticket, 0, arriving.blocks)

    def _leave(self, arriving: _Arriving) -> None:
        arriving.then, gone = None, Cancelled("the embeddings are no longer wanted")
        if arriving in self._waiting:
            self._waiting.remove(arriving)
            self.receiver.dismiss(arriving.ticket, gone)
            self._admit()  # who stood behind it
        else:
            self.receiver.cancel(arriving.ticket, gone)  # too late is harmless

    # ---- events of the mover

    def on_event(self, event: ReceiveEvent) -> None:
        """Called on a mover thread."""
        self._loop.call_soon_threadsafe(self._on_event, event)

    def _on_event(self, event: ReceiveEvent) -> None:
        arriving, pool = self._admitted[event.ticket], self._region.pool
        match event:
            case Complete(_, num_bytes, transfer_s):
                del self._admitted[event.ticket]
                self._bytes += num_bytes
                what = arriving.blocks, arriving.image.tokens
                read = self._loop.run_in_executor(self._copies, self._region.read, *what)
                read.add_done_callback(partial(self._read, arriving, transfer_s))
            case ReceiveFailed(_, error):
                pool.move(arriving.blocks, Hold.LEASED, Hold.QUARANTINED)
                if isinstance(error, TransferError):
                    where = f"the embeddings of the image at token {arriving.image.start}"
                    error = type(error)(f"{where} did not come: {error}")
                self._tell(arriving, error)
            case Quiesced():
                del self._admitted[event.ticket]
                pool.release(arriving.blocks, Hold.QUARANTINED)
        self._admit()

    def _read(self, arriving: _Arriving, transfer_s: float, read: asyncio.Future[Tensor]) -> None:
        self._region.pool.release(arriving.blocks, Hold.LEASED)
        self._tell(arriving, read.exception() or Embedded(read.result(), transfer_s))
        self._admit()

    def _tell(self, arriving: _Arriving, what: Embedded | BaseException) -> None:
        then, arriving.then = arriving.then, None
        if then is not None:
            then(what)
