"""One answer for all who ask for the same: rendered off the loop, never twice at once, and good for a moment."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from tercet.roles.gateway.offloop import OffLoop

T = TypeVar("T")

FRESH_S = 0.5  # of a rendering, from its end; however many ask, they cost two a second


class Shared(Generic[T]):
    """Event loop only."""

    def __init__(self, offloop: OffLoop, take: Callable[[], Callable[[], T]]) -> None:
        """take: on the loop; what it gives is then called on another thread."""
        self._offloop = offloop
        self._take = take
        self._rendering: asyncio.Task[T] | None = None  # the last one
        self._until = 0.0  # time.monotonic()

    async def get(self) -> T:
        """Not older than FRESH_S and the time that a rendering takes."""
        last = self._rendering
        if last is None or (last.done() and time.monotonic() >= self._until):
            last = self._rendering = asyncio.create_task(self._render())
        return await asyncio.shield(last)  # who leaves does not end it for others

    async def _render(self) -> T:
        rendered = await self._offloop.render("", self._take())
        self._until = time.monotonic() + FRESH_S
        return rendered
