"""What is made of files that change while we run: keys and certificates, which are renewed without a restart."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from tercet.errors import SpecError

T = TypeVar("T")

LOOK_EVERY_S = 1.0

log = logging.getLogger(__name__)


class Watched(Generic[T]):
    """Any thread. Made anew when a file has changed; if that fails it is logged, and the last good one stays."""

    def __init__(self, paths: Sequence[str], make: Callable[[], T]) -> None:
        """make: raises SpecError, also here."""
        self._paths, self._make = paths, make
        self._lock = threading.Lock()
        self._stamp, self._failed = _stamp(paths), ""
        self._value = make()
        self._looked = time.monotonic()

    @property
    def value(self) -> T:
        with self._lock:
            if time.monotonic() - self._looked >= LOOK_EVERY_S:
                self._look()
                self._looked = time.monotonic()
            return self._value

    def _look(self) -> None:
        """A set of files is not replaced at once, so what failed is tried again."""
        stamp = _stamp(self._paths)
        if stamp == self._stamp:
            return
        try:
            self._value, self._stamp, self._failed = self._make(), stamp, ""
        except SpecError as error:
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
