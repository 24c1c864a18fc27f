"""Ranks that a group goes on without, and how they come back. Of groups whose experts are spread over data replicas, so
that a rank has requests and KV of its own, and of whose experts others have replicas.

    talk ends ─> lost ─without─> survivors compute the step once more     its requests go on elsewhere
    a new process joins ─setup─> loads ─ready─> rejoin ─> it takes part from the next step on

What survivors are told carries a number of attempt that grows, and goes to all in the same order: it is told under one
lock. Threads: one takes ranks out, one waits for those that come back.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tercet.distributed.line import Line, Rendezvous
from tercet.distributed.spread import Spread
from tercet.distributed.talk import Talk
from tercet.engine.group import GroupExecutor
from tercet.errors import PeerMismatch, TercetError, TransferError, WorkerLost

WAIT_S = 1.0  # between two looks at who is out
STOP_S = 5.0  # for the threads to end
log = logging.getLogger(__name__)


class Owner(Protocol):
    """The group."""

    talks: dict[int, Talk]  # rank -> of those that take part

    def welcome(self, line: Line) -> tuple[Talk, str]:
        """Set up a rank that comes back. -> and where its exchange listens. Raises WorkerLost."""

    def until_ready(self, rank: int, timeout_s: float) -> str:
        """-> the fingerprint of what it has loaded. Raises WorkerLost."""


@dataclass(frozen=True)
class Hooks:
    """What else has to know; called on a thread of `Losses`."""

    out: Callable[[int, WorkerLost], None]
    back: Callable[[Talk], None]


class Losses:
    def __init__(
        self, owner: Owner, executor: GroupExecutor, spread: Spread, rendezvous: Rendezvous, load_s: float
    ) -> None:
        """load_s: within which a rank that comes back has to have loaded its share."""
        self._owner, self._executor, self._spread = owner, executor, spread
        self._rendezvous, self._load_s = rendezvous, load_s
        self.out: dict[int, WorkerLost] = {}  # rank -> why
        self._attempt = 0
        self._telling = threading.Lock()
        self._over = threading.Event()
        self._lost: queue.SimpleQueue[tuple[int, WorkerLost] | None] = queue.SimpleQueue()

    def start(self, hooks: Hooks, fingerprint: str) -> None:
        self._hooks, self._fingerprint = hooks, fingerprint
        works = ((self._take_out_all, "lost"), (self._take_back_all, "rejoin"))
        self._threads = [threading.Thread(target=work, name=f"ranks-{name}", daemon=True) for work, name in works]
        for thread in self._threads:
            thread.start()

    def lose(self, rank: int, error: WorkerLost) -> bool:
        """Whether the others go on without it; they will be told. Any thread."""
        with self._telling:
            if not self._spread.survives({*self.out, rank}):
                return False
            self.out[rank] = error
        self._lost.put((rank, error))
        return True

    def close(self) -> None:
        """No hook is called after this. Once the owner wakes who waits in `until_ready`."""
        self._over.set()
        self._lost.put(None)
        for thread in self._threads:
            thread.join(STOP_S)

    # ---- out

    def _take_out_all(self) -> None:
        while (lost := self._lost.get()) is not None:
            rank, error = lost
            log.warning("goes on without rank %d: %s", rank, error)
            with self._telling:
                self._owner.talks.pop(rank).close()
                self._attempt += 1
                self._tell("without", rank, self._attempt)
                self._executor.lose(rank, self._attempt)
            if not self._over.is_set():
                self._hooks.out(rank, error)

    def _tell(self, *message: object) -> None:
        for talk in list(self._owner.talks.values()):
            kind, *fields = message
            talk.tell(str(kind), *fields)

    # ---- back

    def _take_back_all(self) -> None:
        while not self._over.wait(WAIT_S):
            out = sorted(self.out.keys() - self._owner.talks.keys())
            if out:
                try:
                    self._take_back(out[0])
                except (TercetError, OSError) as error:
                    if not self._over.is_set():
                        log.warning("rank %d did not come back: %s", out[0], error)

    def _take_back(self, rank: int) -> None:
        """Raises WorkerLost, PeerMismatch, TransferError."""
        lines = self._rendezvous.joined([rank], time.monotonic() + self._load_s, self._over.is_set)
        talk, endpoint = self._owner.welcome(lines[rank])
        try:
            if self._owner.until_ready(rank, self._load_s) != self._fingerprint:
                raise PeerMismatch(f"rank {rank} has come back with other weights")
            self._executor.rejoin(talk, lambda drain: self._tell_all(rank, talk, endpoint, drain))
        except (TercetError, TransferError):
            talk.close()
            raise
        log.warning("rank %d is back", rank)
        if not self._over.is_set():
            self._hooks.back(talk)

    def _tell_all(self, rank: int, talk: Talk, endpoint: str, drain: Callable[[], None]) -> tuple[str, int]:
        with self._telling:
            drain()  # what rank 0 has not heard yet has a lower number
            self._attempt += 1
            self._tell("rejoin", rank, endpoint, self._attempt)
            talk.tell("join", [0, *self._owner.talks], self._attempt)
            self._owner.talks[rank] = talk
            self.out.pop(rank, None)
            return endpoint, self._attempt
