"""What is made of files that change while we run: keys and certificates, which are renewed without a restart."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")

LOOK_EVERY_S = 1.0
TRY_AGAIN_S = 10.0  # what failed and has not changed since

log = logging.getLogger(__name__)


class Watched(Generic[T]):
    """Any thread. Made anew when a file has changed; if that fails it is logged, and the last good one stays."""

    def __init__(self, paths: Sequence[str], make: Callable[[], T]) -> None:
        """make: raises SpecError, also here."""
        self._paths, self._make = paths, make
        self._lock = threading.Lock()
        self._stamp, self._failed = _stamp(paths), ""
        self._tried, self._again = self._stamp, 0.0
        self._value = make()
        self._looked = time.monotonic()

    @property
    def value(self) -> T:
        with self._lock:
            if time.monotonic() - self._looked >= LOOK_EVERY_S:
                self._looked = time.monotonic()
                self._look()
            return self._value

    def _look(self) -> None:
        """A set of files is not replaced at once, so what failed is tried again: at its next change, or later."""
        stamp, now = _stamp(self._paths), time.monotonic()
        if stamp == self._stamp or (stamp == self._tried and now < self._again):
            return
        self._tried, self._again = stamp, now + TRY_AGAIN_S
        try:
            self._value, self._stamp, self._failed = self._make(), stamp, ""
        except Exception as error:  # noqa: BLE001  # whatever stands in the files, those who are let in stay so
            if str(error) != self._failed:
                self._failed = str(error)
                log.error("%s; what was read before stays in force", error)


def _stamp(paths: Sequence[str]) -> list[tuple[int, int, int] | None]:
    """Changes when a file is replaced, also behind a symbolic link, as Kubernetes does."""
    return [_stamp_of(path) for path in paths]


def _stamp_of(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
