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

from tercet.distributed.expert_map import ExpertMap
from tercet.distributed.line import Line, Rendezvous
from tercet.distributed.spread import Spread
from tercet.distributed.talk import Talk
from tercet.engine.group import GroupExecutor
from tercet.errors import ClusterError, PeerMismatch, TercetError, WorkerLost

WAIT_S = 1.0  # between two looks at who is out
STOP_S = 5.0  # for the threads to end
log = logging.getLogger(__name__)


class Owner(Protocol):
    """The group."""

    talks: dict[int, Talk]  # rank -> of those that take part
    placing: threading.Lock  # held while experts move, or a rank comes back

    def welcome(self, line: Line) -> tuple[Talk, str]:
        """Set up a rank that comes back. -> and where its exchange listens. Raises WorkerLost."""

    def until_ready(self, rank: int, timeout_s: float) -> str:
        """-> what it has loaded (`placed.agreed`). Raises WorkerLost."""

    def fail(self, error: WorkerLost) -> None:
        """The group is broken."""


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
        self._telling = threading.Lock()  # numbers attempts, and tells them
        self._changing = threading.Lock()  # who is out; a leaf: nothing is sent under it
        self._over = threading.Event()
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def start(self, hooks: Hooks, agreed: Callable[[], str]) -> None:
        """agreed: what a rank that comes back must have loaded (`placed.agreed`)."""
        self._hooks, self._agreed = hooks, agreed
        works = ((self._do_all, "lost"), (self._take_back_all, "rejoin"))
        self._threads = [threading.Thread(target=work, name=f"ranks-{name}", daemon=True) for work, name in works]
        for thread in self._threads:
            thread.start()

    def lose(self, rank: int, error: WorkerLost) -> bool:
        """Whether the others go on without it; they will be told. Any thread; it sends nothing."""
        with self._changing:
            if rank in self.out:
                return True
            if not self._spread.survives({*self.out, rank}):
                return False
            self.out[rank] = error
        self._work.put(lambda: self._take_out(rank, error))
        return True

    def while_none_is_lost(self, experts: ExpertMap, work: Callable[[], None]) -> None:
        """Do it while nobody is taken out, if the ranks that are left can serve by this map. Raises ClusterError."""
        with self._changing:
            if not experts.survives(self.out):
                raise ClusterError(f"ranks {sorted(self.out)} are lost, and the others would not have every expert")
            work()

    def close(self) -> None:
        """No hook is called after this. Once the owner wakes who waits in `until_ready`."""
        self._over.set()
        self._work.put(None)
        for thread in self._threads:
            thread.join(STOP_S)

    # ---- out, and what others have to know, in the order in which it happens

    def _do_all(self) -> None:
        while (work := self._work.get()) is not None:
            if not self._over.is_set():
                self._try(work)

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # without this thread nobody would hear of a loss
            log.error("ranks that are lost can no longer be taken out", exc_info=error)
            self._owner.fail(WorkerLost(f"a lost rank could not be taken out: {error!r}"))

    def _take_out(self, rank: int, error: WorkerLost) -> None:
        log.warning("goes on without rank %d: %s", rank, error)
        with self._telling:
            self._owner.talks.pop(rank).close()
            self._attempt += 1
            self._tell("without", rank, self._attempt)
            self._executor.lose(rank, self._attempt)
            self._hooks.out(rank, error)  # before it can come back

    def _tell(self, kind: str, *fields: object) -> None:
        for talk in list(self._owner.talks.values()):
            talk.tell(kind, *fields)

    # ---- back

    def _take_back_all(self) -> None:
        while not self._over.wait(WAIT_S):
            if self._absent():
                self._try(self._take_one_back)

    def _absent(self) -> set[int]:
        return self.out.keys() - self._owner.talks.keys()

    def _take_one_back(self) -> None:
        try:
            line = self._rendezvous.one_of(self._absent, time.monotonic() + self._load_s, self._over.is_set)
            with self._owner.placing:  # it loads what is its own by the placement of now
                self._take_in(line)
        except (TercetError, OSError) as error:
            if not self._over.is_set():
                log.warning("no rank came back: %s", error)

    def _take_in(self, line: Line) -> None:
        talk, endpoint = self._owner.welcome(line)
        try:
            self._take_back(talk, endpoint)
        except TercetError:
            talk.close()
            raise

    def _take_back(self, talk: Talk, endpoint: str) -> None:
        """Raises WorkerLost, PeerMismatch, TransferError."""
        if self._owner.until_ready(talk.rank, self._load_s) != self._agreed():
            raise PeerMismatch(f"rank {talk.rank} has come back with other weights, or another placement of experts")
        try:
            self._executor.rejoin(talk, lambda drain: self._tell_all(talk, endpoint, drain))
        except TercetError as error:
            if talk.rank in self._owner.talks:  # the others know of it
                self.lose(talk.rank, WorkerLost(str(error)))
            raise
        if talk.over:  # it may have ended when it was not yet one of those that can be lost
            self.lose(talk.rank, WorkerLost(f"rank {talk.rank} of the group is gone"))
        log.warning("rank %d is back", talk.rank)

    def _tell_all(self, talk: Talk, endpoint: str, drain: Callable[[], None]) -> tuple[str, int]:
        """Raises WorkerLost."""
        with self._telling:
            drain()  # what rank 0 has not heard yet has a lower number
            if talk.over:
                raise WorkerLost(f"rank {talk.rank} of the group is gone again")
            self._attempt += 1
            self._tell("rejoin", talk.rank, endpoint, self._attempt)
            talk.tell("join", [0, *self._owner.talks], self._attempt)
            self._owner.talks[talk.rank] = talk
            self._work.put(lambda: self._hooks.back(talk))  # before it can be lost again
            with self._changing:
                del self.out[talk.rank]
            return endpoint, self._attempt
