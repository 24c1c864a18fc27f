"""A worker of several ranks as one member: its actors start, serve and end together, under one epoch.

controller --> GroupActor --start/health/drain/stop--> rank 0, a WorkerActor, which alone serves legs
                          --start/stop---------------> rank 1, 2 ..., RankActors

start   rank 0 listens; then it starts, the other ranks join it, and all load their parts of the model, at once
health  of rank 0, which hears of the others all the time. The end of any rank's process is the end of the member
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tercet.cluster.members import Running
from tercet.cluster.race import every, first
from tercet.errors import WorkerLost


class GroupActor:
    """A running worker of several ranks (`members.Running`). A call raises the error of the first rank that fails."""

    def __init__(self, worker_id: str, ranks: Sequence[Running]) -> None:
        """ranks: their actors, in the order of their numbers; each says in its errors which one it is."""
        self.others: Sequence[Mapping[str, Any]] = ()
        self._worker_id = worker_id
        self._first, self._rest = ranks[0], ranks[1:]
        self._ends: list[asyncio.Task[Any]] = []  # of ranks 1, 2 ...: each fails with its process

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
        for end in self._ends:
            end.cancel()
        await asyncio.gather(*self._ends, return_exceptions=True)
        await asyncio.gather(*(rank.kill() for rank in (self._first, *self._rest)))

    async def _start(self, timeout_s: float) -> Any:
        """-> rank 0's info. From now on the ends of the others are watched."""
        deadline = time.monotonic() + timeout_s
        endpoint = await self._first.call("listen", timeout_s=timeout_s)
        left_s = max(deadline - time.monotonic(), 0.0)
        starts = [rank.call("start", endpoint, timeout_s=left_s) for rank in self._rest]
        self._ends = [asyncio.create_task(rank.call("until_end", timeout_s=math.inf)) for rank in self._rest]
        up = every(self._first.call("start", timeout_s=left_s), *starts)
        info, *self.others = await first(up, *map(_shielded, self._ends))
        return info

    async def _health(self, timeout_s: float) -> Any:
        for end in self._ends:
            if end.done():
                end.result()
        return await self._first.call("health", timeout_s=timeout_s)

    async def _stop(self, timeout_s: float) -> None:
        """Rank 0 first, so that the end of the others is none of its faults. Asks all, also if one does not answer."""
        rank_0, *rest = self._calls("stop", timeout_s)
        outcomes = [
            *await asyncio.gather(rank_0, return_exceptions=True),
            *await asyncio.gather(*rest, return_exceptions=True),
        ]
        for failed in (outcome for outcome in outcomes if isinstance(outcome, BaseException)):
            raise failed

    def _calls(self, method: str, timeout_s: float) -> list[Any]:
        return [rank.call(method, timeout_s=timeout_s) for rank in (self._first, *self._rest)]


async def _shielded(task: asyncio.Task[Any]) -> Any:
    return await asyncio.shield(task)
