"""Limits on request bodies: size, time and rate of each, and the size of all together.

body = await bodies.receive(read)     read() -> the next bytes, b"" at the end
... parse, tokenise ...
body.release()                        until then its bytes count
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tercet.errors import BodyTooLarge, Overloaded, RequestTimeout, TercetError


@dataclass(frozen=True)
class BodyLimits:
    max_bytes: int  # of one body
    max_held_bytes: int  # of all that are not released
    grace_s: float  # a body may take so long, and a second more for each `min_rate` bytes that came
    min_rate: float  # bytes per second
    max_unfinished: int  # bodies that are being received at once; one more cuts the oldest


class Body:
    """The bytes of one body, counted until `release`."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._chunks: list[bytes] = []
        self.size = 0
        self.deadline: asyncio.Timeout | None = None  # while it is being received
        self.fault: TercetError | None = None  # why it was cut

    @property
    def data(self) -> bytes:
        """All of it, joined once."""
        if len(self._chunks) > 1:
            self._chunks = [b"".join(self._chunks)]
        return self._chunks[0] if self._chunks else b""

    def add(self, chunk: bytes) -> None:
        self._chunks.append(chunk)
        self.size += len(chunk)

    def release(self) -> None:
        """Stop counting the body, once it is parsed and tokenised. Idempotent."""
        self._bodies.forget(self)
        self._chunks.clear()


class Bodies:
    """Event loop only."""

    def __init__(self, limits: BodyLimits) -> None:
        self.limits = limits
        self._unfinished: dict[Body, None] = {}  # oldest first
        self._held: set[Body] = set()
        self._held_bytes = 0

    async def receive(self, read: Callable[[], Awaitable[bytes]], max_bytes: int | None = None) -> Body:
        """Raises BodyTooLarge, RequestTimeout, Overloaded when all bodies together are too large and this is the oldest
        that has not come whole."""
        body = Body(self)
        if len(self._unfinished) >= self.limits.max_unfinished:
            self._cut(next(iter(self._unfinished)))
        self._unfinished[body] = None
        self._held.add(body)
        try:
            await self._fill(body, read, self.limits.max_bytes if max_bytes is None else max_bytes)
        except BaseException:
            body.release()
            raise
        self._unfinished.pop(body, None)
        body.deadline = None
        return body

    async def _fill(self, body: Body, read: Callable[[], Awaitable[bytes]], max_bytes: int) -> None:
        limits, began = self.limits, asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(began + limits.grace_s) as body.deadline:
                while chunk := await read():
                    self._take(body, chunk, max_bytes)
                    body.deadline.reschedule(began + limits.grace_s + body.size / limits.min_rate)
        except TimeoutError as error:
            if body.fault is not None:
                raise body.fault from error
            raise RequestTimeout(
                f"the request's body came too slowly: {body.size} bytes within {limits.grace_s:g} s and a second more "
                f"for each {limits.min_rate:g} (limits.body_grace_s, limits.min_body_rate)"
            ) from error

    def _take(self, body: Body, chunk: bytes, max_bytes: int) -> None:
        if body.fault is not None:
            raise body.fault
        if body.size + len(chunk) > max_bytes:
            raise too_large(max_bytes)
        body.add(chunk)
        self._held_bytes += len(chunk)
        while self._held_bytes > self.limits.max_held_bytes and self._unfinished:
            oldest = next(iter(self._unfinished))
            fault = self._cut(oldest)
            if oldest is body:
                raise fault

    def _cut(self, body: Body) -> Overloaded:
        """Abort an incomplete body and stop counting it at once."""
        body.fault = fault = Overloaded("too many requests wait for the rest of their bodies; send this one again")
        if body.deadline is not None and not body.deadline.expired():
            body.deadline.reschedule(0)
        body.release()
        return fault

    def forget(self, body: Body) -> None:
        self._unfinished.pop(body, None)
        if body in self._held:
            self._held.discard(body)
            self._held_bytes -= body.size


def too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than {max_bytes} bytes (limits.max_body_bytes)")
