"""Admission control: a limit on concurrent choices, shared fairly between clients.

    places = admission.enter(client)     one place, or Overloaded
    await places.take()                  one more, when it is this client's turn
    places.give()  places.close()

A request counts as one, however many choices it has: its first choice runs at once, each further one takes a place
when fewer run than the limit. So a request of many prompts starves nobody. One client alone may have as many
requests as the limit; beyond the limit a client is let in only if it has fewer than its share (the limit divided by
the number of clients with requests, at least one). There are never more than twice as many requests as the limit, and
further choices never take a place beyond it.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable

from tercet.errors import Overloaded


class Admission:
    """Event loop only."""

    def __init__(self, limit: int, on_change: Callable[[int], None]) -> None:
        """on_change(places in use)"""
        self._limit = limit
        self._on_change = on_change
        self._requests: Counter[str] = Counter()  # client -> requests
        self._held: Counter[str] = Counter()  # client -> places
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # client -> those who want one more
        self.in_use = 0
        self.idle = asyncio.Event()  # no request is open
        self.idle.set()

    def enter(self, client: str) -> Places:
        """Raises Overloaded."""
        requests = self._requests.total()
        if requests >= 2 * self._limit or (requests >= self._limit and not self._has_share(client)):
            raise Overloaded(
                f"{requests} requests are in flight, {self._requests[client]} of them this client's "
                f"(limits.max_inflight_requests: {self._limit})"
            )
        self.idle.clear()
        self._requests[client] += 1
        self._count(client, 1)
        return Places(self, client)

    async def wait(self, client: str) -> None:
        """One more place, when it is this client's turn."""
        if self.in_use < self._limit:
            self._count(client, 1)
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.free(client)
            elif turn in self._waiting.get(client, ()):  # `free` may have skipped it already
                self._leave_line(client, turn)
            raise

    def free(self, client: str) -> None:
        """Give a place back; of the waiting clients the one with the fewest places gets it."""
        self._count(client, -1)
        while self._waiting and self.in_use < self._limit:
            first = min(self._waiting, key=self._held.__getitem__)
            turn = self._waiting[first][0]
            self._leave_line(first, turn)
            if not turn.done():
                turn.set_result(None)
                self._count(first, 1)

    def leave(self, client: str) -> None:
        """A request is over."""
        self._requests[client] -= 1
        if not self._requests[client]:
            del self._requests[client]
        if not self._requests:
            self.idle.set()

    def _has_share(self, client: str) -> bool:
        return self._requests[client] < max(1, self._limit // len(self._requests.keys() | {client}))

    def _leave_line(self, client: str, turn: asyncio.Future[None]) -> None:
        line = self._waiting[client]
        line.remove(turn)
        if not line:
            del self._waiting[client]

    def _count(self, client: str, change: int) -> None:
        self.in_use += change
        self._held[client] += change
        if not self._held[client]:
            del self._held[client]
        self._on_change(self.in_use)


class Places:
    """The places of one request. Made by Admission.enter, with one place."""

    def __init__(self, admission: Admission, client: str) -> None:
        self._admission = admission
        self._client = client
        self._count = 1

    async def take(self) -> None:
        await self._admission.wait(self._client)
        self._count += 1

    def give(self) -> None:
        self._count -= 1
        self._admission.free(self._client)

    def close(self) -> None:
        """Give back whatever is held; the request is over."""
        while self._count:
            self.give()
        self._admission.leave(self._client)
