"""Signal handling of a serving process, from its start to its end.

    until `attach`     KeyboardInterrupt: nothing has been started, there is nothing to end
    then               the first one sets `stop`, a later one `kill`
    after the loop     nothing: everything has ended, or is ending by its deadlines

A signal within a second of the first counts as the same request, delivered twice: to the process group and to the
process, or by a terminal and by a parent. SIGHUP counts too, since a closed terminal must not leave a cluster
behind, unless it is ignored (`nohup`).
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable

SAME_WORD_S = 1.0


class Signals:
    """`install` early, `attach` once inside an event loop of the main thread."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self.stop = asyncio.Event()
        self.kill = asyncio.Event()
        self._report = report
        self._loop: asyncio.AbstractEventLoop | None = None
        self._first = 0.0

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def attach(self) -> None:
        self._loop = asyncio.get_running_loop()

    def _handle(self, number: int, frame: object) -> None:
        if self._loop is None:
            raise KeyboardInterrupt
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._told)

    def _told(self) -> None:
        now = time.monotonic()
        if not self.stop.is_set():
            self._first = now
            self.stop.set()
        elif now - self._first >= SAME_WORD_S and not self.kill.is_set():
            self.kill.set()  # before the report, which may fail or block
            self._report("ending at once")
