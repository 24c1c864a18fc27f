"""Runs work that would block the event loop in threads: the longer the work, the fewer at a time; clients take turns.

A thread helps only if the work releases the GIL (tokenising does) or is short (parsing JSON).
"""

from __future__ import annotations

import asyncio
import ctypes
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

INLINE = 8192  # characters that are worked on at once, in the loop: some milliseconds
TRIM_S = 0.5  # after the last long work
LONG = 64 * 1024  # characters; work this long has a queue of its own, so that shorter work never waits for it


class OffLoop:
    """Event loop only."""

    def __init__(self) -> None:
        self._brief, self._long, self._writing = Lane("brief"), Lane("long"), Lane("writing")
        self._trim: asyncio.TimerHandle | None = None  # runs while long work ends and for a moment after

    async def run(self, client: str, size: int, work: Callable[[], T]) -> T:
        """work(), for a text of `size` characters."""
        if size <= INLINE:
            return work()
        if size <= LONG:
            return await self._brief.run(client, work)
        try:
            return await self._long.run(client, work)
        finally:
            self._trim_later()

    async def parse(self, client: str, size: int, work: Callable[[], T]) -> T:
        """work(), which reads a body of `size` bytes: some eight times faster than text is tokenised."""
        return await self.run(client, size // 8, work)

    async def render(self, client: str, work: Callable[[], T]) -> T:
        """work(), which writes an answer; no request waits behind it."""
        try:
            return await self._writing.run(client, work)
        finally:
            self._trim_later()

    def close(self) -> None:
        if self._trim is not None:
            self._trim.cancel()
        self._brief.close()
        self._long.close()
        self._writing.close()

    def _trim_later(self) -> None:
        """Call `trim` once the results of the work are likely freed."""
        loop = asyncio.get_running_loop()
        if self._trim is not None:
            self._trim.cancel()
        self._trim = loop.call_later(TRIM_S, loop.run_in_executor, None, trim)


class Lane:
    """One piece of work at a time; the clients who wait take turns, in the order in which they came."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"gateway-{name}")
        self._busy = False
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # client -> its work; the first client is next

    async def run(self, client: str, work: Callable[[], T]) -> T:
        """A caller that is cancelled leaves its work behind if that has begun; the next still waits for it."""
        await self._turn(client)
        running = asyncio.get_running_loop().run_in_executor(self._executor, work)
        running.add_done_callback(self._next)
        try:
            return await asyncio.shield(running)
        finally:
            del running  # else an error and its traceback's frames would keep each other alive

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _turn(self, client: str) -> None:
        if not self._busy:
            self._busy = True
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._next()
            raise

    def _next(self, done: asyncio.Future[T] | None = None) -> None:
        """Let the next client have its turn, and go to the end of the line if it has more work."""
        if done is not None and not done.cancelled():
            done.exception()  # mark it as retrieved, even if the caller was cancelled
        while self._waiting:
            client, line = next(iter(self._waiting.items()))
            turn = line.popleft()
            del self._waiting[client]
            if line:
                self._waiting[client] = line
            if not turn.done():
                turn.set_result(None)
                return
        self._busy = False


def trim() -> None:
    """Give freed memory back to the system. Tokenising 4 MB takes 0.3 GB or more for a moment, in small pieces, which
    the C library would otherwise not return."""
    if _malloc_trim is not None:
        _malloc_trim(0)


_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc; other C libraries have none
