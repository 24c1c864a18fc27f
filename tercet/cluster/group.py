"""A worker of several ranks as one member: its actors start, serve and end together, under one epoch.

controller --> GroupActor --start/health/drain/stop--> rank 0, a WorkerActor, which alone serves legs
                          --start/stop---------------> rank 1, 2 ..., RankActors

start   rank 0 listens; then it starts, the other ranks join it, and all load their parts of the model, at once
health  of rank 0, which hears of the others all the time. The end of any rank's process is the end of the member,
        unless rank 0 goes on without that rank; then another process takes its place
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from tercet.cluster.members import Running
from tercet.cluster.race import every, first
from tercet.errors import TercetError, WorkerLost

AGAIN_S = 2.0  # before another try
SOON_S = 1.0
ANSWER_S = 10.0
LOOK_S = 0.1  # between two looks whether a rank is back
log = logging.getLogger(__name__)


class GroupActor:
    """A running worker of several ranks (`members.Running`). A call raises the error of the first rank that fails."""

    def __init__(self, worker_id: str, ranks: Sequence[Running], new: Callable[[int], Awaitable[Running]]) -> None:
        """ranks: their actors, in the order of their numbers; each says in its errors which one it is. new: makes
        another actor for a rank."""
        self.others: list[Mapping[str, Any]] = []
        self._worker_id, self._new = worker_id, new
        self._first, self._rest = ranks[0], [*ranks[1:]]
        self._ends: list[asyncio.Task[Any]] = []  # of ranks 1, 2 ...: each fails with its process
        self._coming: dict[int, asyncio.Task[None]] = {}  # rank -> how it comes back
        self._came: dict[int, float] = {}  # rank -> time.monotonic() at which it had

    async def call(self, method: str, *args: object, timeout_s: float) -> Any:
        match method:
            case "start":
                return await self._start(timeout_s)
            case "health":
                return await self._health(timeout_s)
            case "stop":
                return await self._stop(timeout_s)
            case "switch":
                raise WorkerLost(f"{self._worker_id} has several ranks, which serve again as new processes only")
            case _:
                return await self._first.call(method, *args, timeout_s=timeout_s)

    async def kill(self) -> None:
        watching = [*self._ends, *self._coming.values()]
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
        await asyncio.gather(*(rank.kill() for rank in (self._first, *self._rest)))

    async def _start(self, timeout_s: float) -> Any:
        """-> rank 0's info. From now on the ends of the others are watched."""
        deadline = time.monotonic() + timeout_s
        self._endpoint, self._start_s = await self._first.call("listen", timeout_s=timeout_s), timeout_s
        left_s = max(deadline - time.monotonic(), 0.0)
        starts = [rank.call("start", self._endpoint, timeout_s=left_s) for rank in self._rest]
        self._ends = [_until_end(rank) for rank in self._rest]
        up = every(self._first.call("start", timeout_s=left_s), *starts)
        info, *places = await first(up, *map(_shielded, self._ends))
        self.others = [{"rank": rank} | place for rank, place in enumerate(places, 1)]
        return info

    async def _health(self, timeout_s: float) -> Any:
        ended = [rank for rank, end in enumerate(self._ends, 1) if end.done()]
        asked = time.monotonic()
        load, lost = await self._answer(timeout_s)
        for rank in ended:
            if rank not in lost and rank not in self._coming:
                self._ends[rank - 1].result()
        for rank in lost:
            if rank not in self._coming and self._came.get(rank, asked) <= asked:  # else the answer is older
                self.others[rank - 1] = {"rank": rank, "pid": 0, "node": "", "lost": True}
                self._coming[rank] = asyncio.create_task(self._bring_back(rank))
        return load

    async def _until_back(self, rank: int, deadline: float) -> None:
        """Until it takes part: rank 0 takes it back between two steps."""
        while rank in await self._first.call("lost_ranks", timeout_s=ANSWER_S):
            if self._ends[rank - 1].done() or time.monotonic() > deadline:
                raise WorkerLost(f"rank {rank} has loaded, but was not taken back")
            await asyncio.sleep(LOOK_S)

    async def _answer(self, timeout_s: float) -> Any:
        """Rank 0's health, and which ranks are lost. If another one ends meanwhile, rank 0 must answer soon: they end
        themselves if it is stopped."""
        questions = (self._first.call(what, timeout_s=timeout_s) for what in ("health", "lost_ranks"))
        answer, ends = asyncio.create_task(every(*questions)), [end for end in self._ends if not end.done()]
        try:
            await asyncio.wait([answer, *ends], return_when=asyncio.FIRST_COMPLETED)
            async with asyncio.timeout(SOON_S):
                return await answer
        except TimeoutError as error:
            raise WorkerLost(f"{self._worker_id}: a rank has ended, and rank 0 does not answer") from error
        finally:
            answer.cancel()

    async def _bring_back(self, rank: int) -> None:
        """By another process. What fails is tried again with a later health."""
        try:
            await self._rest[rank - 1].kill()  # it may only be stopped
            self._ends[rank - 1].cancel()
            self._rest[rank - 1] = await self._new(rank)
            self._ends[rank - 1] = _until_end(self._rest[rank - 1])
            start = self._rest[rank - 1].call("start", self._endpoint, timeout_s=self._start_s)
            place = await start
            await self._until_back(rank, time.monotonic() + self._start_s)
            self.others[rank - 1], self._came[rank] = {"rank": rank} | place, time.monotonic()
        except TercetError as error:
            log.warning("%s rank %d did not come back: %s", self._worker_id, rank, error)
            await asyncio.sleep(AGAIN_S)
        finally:
            del self._coming[rank]

    async def _stop(self, timeout_s: float) -> None:
        """Rank 0 first, so that the end of the others is none of its faults. Asks all that have not ended, also if one
        does not answer."""
        for coming in self._coming.values():
            coming.cancel()
        watched = zip(self._rest, self._ends, strict=False)  # none before the start
        ended = [rank for rank, end in watched if end.done()]
        there = [rank for rank in self._rest if rank not in ended]
        rank_0, *rest = (rank.call("stop", timeout_s=timeout_s) for rank in (self._first, *there))
        outcomes = [
            *await asyncio.gather(rank_0, return_exceptions=True),
            *await asyncio.gather(*rest, return_exceptions=True),
        ]
        for failed in (outcome for outcome in outcomes if isinstance(outcome, BaseException)):
            raise failed


def _until_end(rank: Running) -> asyncio.Task[Any]:
    return asyncio.create_task(rank.call("until_end", timeout_s=math.inf))


async def _shielded(task: asyncio.Task[Any]) -> Any:
    return await asyncio.shield(task)
