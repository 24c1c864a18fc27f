"""What is made of files that change while we run: keys and certificates, which are renewed without a restart."""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from tercet.errors import SpecError

T = TypeVar("T")

LOOK_EVERY_S = 1.0
TRY_AGAIN_S = 10.0  # what failed and has not changed since
WAIT_S = 0.2  # for a look; files that take longer are in force when they have been read

log = logging.getLogger(__name__)


class Watched(Generic[T]):
    """Any thread. Made anew when a file has changed; if that fails it is logged, and the last good one stays."""

    def __init__(self, paths: Sequence[str], make: Callable[[], T]) -> None:
        """make: raises SpecError, also here; called on a thread of its own later."""
        self._paths, self._make = paths, make
        self._lock = threading.Lock()
        self._stamp, self._failed = _stamp(paths), ""
        self._tried, self._again = self._stamp, 0.0
        self._value = self._made()
        self._begun = self._looked = time.monotonic()
        self._look = threading.Event()  # set once the last look is over
        self._look.set()

    @property
    def value(self) -> T:
        """As the files say now, or did a moment ago: an event loop asks, and a disk may be slow."""
        with self._lock:
            if self._look.is_set() and time.monotonic() - self._looked >= LOOK_EVERY_S:
                self._look, self._begun = threading.Event(), time.monotonic()
                threading.Thread(target=self._look_at_files, args=(self._look,), name="watched", daemon=True).start()
            look, until = self._look, self._begun + WAIT_S
        look.wait(max(0.0, until - time.monotonic()))
        return self._value

    def _look_at_files(self, done: threading.Event) -> None:
        """A set of files is not replaced at once, so what failed is tried again: at its next change, or later."""
        try:
            stamp, now = _stamp(self._paths), time.monotonic()
            if stamp == self._stamp or (stamp == self._tried and now < self._again):
                return
            self._tried, self._again = stamp, now + TRY_AGAIN_S
            self._value, self._stamp, self._failed = self._made(), stamp, ""
        except Exception as error:  # noqa: BLE001  # whatever stands in the files, those who are let in stay so
            if str(error) != self._failed:
                self._failed = str(error)
                log.error("%s; what was read before stays in force", error)
        finally:
            self._looked = time.monotonic()
            done.set()

    def _made(self) -> T:
        for path in self._paths:
            if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe may take for ever
                raise SpecError(f"{path}: is no regular file")
        return self._make()


def _stamp(paths: Sequence[str]) -> list[tuple[int, int, int] | None]:
    """Changes when a file is replaced, also behind a symbolic link, as Kubernetes does."""
    return [_stamp_of(path) for path in paths]


def _stamp_of(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
