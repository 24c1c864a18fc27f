"""The pairs of a worker's sender with the workers of the next stage: connected before a request needs them, and looked
after; others are dialled on a thread, since that may block for some seconds. Event loop only."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol

from tercet.core import PairState, Ticket
from tercet.errors import PeerUnreachable, TercetError, TransferError, as_named
from tercet.transfer.transports.group_endpoint import GroupEndpoint

MEET_AGAIN_S = 1.0
DIALERS = 16  # a first contact may block for some seconds


class Sender(Protocol):
    """A `KvSender`, or those of the ranks of a group as one (joint.py)."""

    def open(self, ticket: Ticket, endpoint: str, num_tokens: int, deadline: float, dial: bool = True) -> str: ...
    def push(self, ticket: Ticket, layer: int, first: int, blocks: Sequence[int]) -> None: ...
    def finish(self, ticket: Ticket, note: bytes) -> None: ...
    def cancel(self, ticket: Ticket, error: TercetError) -> None: ...
    def connect(self, endpoint: str) -> None: ...
    def connected(self, endpoint: str) -> bool: ...
    def attested(self) -> list[PairState]: ...
    def dropped(self) -> Counter[str]: ...
    def stop(self) -> None: ...


class Peers:
    def __init__(self, loop: asyncio.AbstractEventLoop, sender: Sender) -> None:
        self._loop, self._sender = loop, sender
        self._wanted: set[str] = set()  # endpoints of the live workers
        self._faults: dict[str, PairState] = {}  # endpoint -> why it is not connected
        self._met: set[str] = set()  # endpoints that `_look_after` keeps connected
        self._dialers = ThreadPoolExecutor(DIALERS, thread_name_prefix="kv-dial")
        self._meeters = ThreadPoolExecutor(DIALERS, thread_name_prefix="kv-meet")  # separate: no request waits for it

    def meet(self, endpoints: Iterable[str]) -> None:
        """Keep these connected, and no others."""
        self._wanted = set(endpoints)
        for endpoint in self._wanted - self._met:
            self._met.add(endpoint)
            self._look_after(endpoint)

    def states(self) -> tuple[PairState, ...]:
        return (*self._sender.attested(), *list(self._faults.values()))

    def open(
        self,
        ticket: Ticket,
        endpoint: str,
        num_tokens: int,
        deadline: float,
        wanted: Callable[[], bool],
        then: Callable[[str | TercetError], None],
    ) -> None:
        """Offer a ticket to the worker at `endpoint`. then: called once, with the transport's name, or with why it
        was not opened, which is a fault of the pair. wanted: whether it is still to be dialled for."""
        if self._sender.connected(endpoint):
            self._loop.call_soon(then, self._open(ticket, endpoint, num_tokens, deadline, None))
            return

        def dial() -> None:
            told = self._open(ticket, endpoint, num_tokens, deadline, wanted)
            self._loop.call_soon_threadsafe(then, told)

        self._loop.run_in_executor(self._dialers, dial)

    async def close(self) -> None:
        """Ends the sender, too."""
        self.meet(())  # or it would connect again
        await self._loop.run_in_executor(None, self._sender.stop)
        for pool in (self._dialers, self._meeters):
            pool.shutdown(wait=False, cancel_futures=True)

    def _open(
        self, ticket: Ticket, endpoint: str, num_tokens: int, deadline: float, wanted: Callable[[], bool] | None
    ) -> str | TercetError:
        """wanted: on a pool thread, where it may dial."""
        if wanted is not None and not wanted():
            return TercetError("given up before it was connected")
        try:
            return self._sender.open(ticket, endpoint, num_tokens, deadline, dial=wanted is not None)
        except (TransferError, OSError) as error:
            return PeerUnreachable(f"the worker of the next stage was not reached: {error}")
        except Exception as error:  # noqa: BLE001  # whatever it is, who asked must hear; it is logged
            return as_named(error, ticket.request_id)

    def _look_after(self, endpoint: str) -> None:
        """Keep a wanted worker connected: check every MEET_AGAIN_S, dial if need be."""
        if endpoint not in self._wanted:
            self._met.discard(endpoint)
            self._faults.pop(endpoint, None)
        elif self._sender.connected(endpoint):
            self._loop.call_later(MEET_AGAIN_S, self._look_after, endpoint)
        else:
            self._loop.run_in_executor(self._meeters, self._meet, endpoint)

    def _meet(self, endpoint: str) -> None:
        """On a pool thread."""
        try:
            self._sender.connect(endpoint)
            self._faults.pop(endpoint, None)
        except (TercetError, OSError) as error:
            self._faults[endpoint] = PairState(GroupEndpoint.decode(endpoint).worker_id, fault=str(error))
        again = partial(self._loop.call_later, MEET_AGAIN_S, self._look_after, endpoint)
        self._loop.call_soon_threadsafe(again)
