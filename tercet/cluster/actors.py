"""Thin Ray actors around the roles' objects. Each role is imported inside its actor, so that this imports no torch.

    controller --start/health/drain/switch/stop--> WorkerActor  --> tercet.roles.worker.Worker
    controller --start/health/stop---------------> RankActor    --> tercet.roles.rank.Rank, of a worker of several
    controller --set_workers/health/note/...-----> GatewayActor --> tercet.roles.gateway.gateway.Gateway

No token and no KV byte passes through these calls. A TercetError crosses them as itself (see `launcher.Actor.call`).
"""

from __future__ import annotations

import asyncio
import functools
import os
import socket
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import ray

from tercet import logs
from tercet.core import ExpertRows, Load, Loading, Moves, Role, WorkerInfo
from tercet.errors import Overloaded
from tercet.spec import ClusterSpec

if TYPE_CHECKING:
    from tercet.distributed.routed import Routed
    from tercet.roles.gateway.gateway import GatewayInfo
    from tercet.roles.worker import Worker


LOOK_EVERY_S = 0.1  # whether the raylet lives; Ray itself checks every second, and ends the process without a message
LAST_WORD_S = 2.0
STOP_TIMEOUT_S = 5.0
MOST_ASKED = 16  # requests for changes that the controller has not answered yet
LAST_ANSWER_S = 0.5  # between the end of `stop` and the end of the process, to send the reply


def node_address() -> str:
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


async def end_with_raylet(last_word: Callable[[], Awaitable[None]] | None = None) -> None:
    """End this process with its raylet: Ray may leave an async actor running, with its ports and memory, for ever."""
    parent = os.getppid()
    while os.getppid() == parent:
        await asyncio.sleep(LOOK_EVERY_S)
    if last_word is not None:
        asyncio.get_running_loop().call_later(LAST_WORD_S, os._exit, 1)
        await last_word()
    os._exit(1)


async def stop_and_end(stop: Coroutine[Any, Any, None]) -> None:
    """Stop, reply, and end this process, even if that fails: without its GCS Ray cannot end it."""
    loop = asyncio.get_running_loop()
    loop.call_later(STOP_TIMEOUT_S, os._exit, 1)
    await stop
    loop.call_later(LAST_ANSWER_S, os._exit, 0)


def worker_host(spec: ClusterSpec) -> str:
    """Where a worker on this node listens."""
    return "127.0.0.1" if spec.network.host == "loopback" else node_address()


class WorkerActor:
    """One worker, or rank 0 of one. Its object is made in the first call, whose errors reach the caller as they are."""

    def __init__(
        self, worker_id: str, role: Role, epoch: int, spec: ClusterSpec, cores: Sequence[int], cluster_token: str
    ) -> None:
        self._identity = (worker_id, role, epoch, spec)
        self._cores, self._token = cores, cluster_token

    @functools.cached_property
    def _worker(self) -> Worker:
        from tercet.roles.worker import Worker

        self._log()
        self._watch = asyncio.create_task(end_with_raylet())
        return Worker(*self._identity, worker_host(self._identity[-1]), self._token, cores=self._cores)

    async def listen(self) -> str:
        """-> the endpoint that the other ranks join, before `start`, which returns when they have."""
        return await self._worker.listen()

    async def start(self) -> WorkerInfo:
        return await self._worker.start()

    async def loading(self) -> Loading | None:
        """How far `start` is with the model."""
        return self._worker.loading

    async def health(self) -> Load:
        return await self._worker.health()

    async def lost_ranks(self) -> list[int]:
        """Those that the others go on without."""
        return self._worker.lost_ranks()

    async def routed(self, pairs: bool = False) -> Routed:  # Ray calls go by position here
        """For `tercet experts`."""
        return await self._worker.routed(pairs=pairs)

    async def move_experts(
        self,
        rows: Sequence[Sequence[int]],
        shares: Sequence[Sequence[Sequence[int]]] | None = None,
        shares_only: bool = False,
    ) -> tuple[int, int]:
        """Begin to place the experts of its ranks anew. -> how many layers change, and the number of the move."""
        return await self._worker.move_experts(rows, shares, shares_only=shares_only)

    async def drain(self, timeout_s: float) -> None:
        await self._worker.drain(timeout_s)

    def _log(self) -> None:
        worker_id, role, epoch, spec = self._identity
        logs.configure(spec.logging, worker=worker_id, role=role.value, epoch=epoch)

    async def switch(self, role: Role, epoch: int, cores: Sequence[int]) -> WorkerInfo:
        self._identity = (self._identity[0], role, epoch, self._identity[-1])
        self._log()
        return await self._worker.switch(role, epoch, cores)

    async def stop(self) -> None:
        await stop_and_end(self._worker.stop())


class RankActor:
    """Rank 1, 2 ... of a worker, a process that only its rank 0 talks to."""

    def __init__(
        self,
        worker_id: str,
        rank: int,
        role: Role,
        epoch: int,
        spec: ClusterSpec,
        cores: Sequence[int],
        cluster_token: str,
    ) -> None:
        self._identity = (worker_id, rank, role, epoch, spec)
        self._cores, self._token = cores, cluster_token

    async def start(self, endpoint: str) -> dict[str, Any]:
        """Join rank 0 at its endpoint. -> this process's pid and node."""
        from tercet.roles.rank import Rank

        worker_id, rank, role, epoch, spec = self._identity
        logs.configure(spec.logging, worker=worker_id, rank=rank, role=role.value, epoch=epoch)
        self._watch = asyncio.create_task(end_with_raylet())
        host = worker_host(self._identity[-1])
        self._rank = Rank(*self._identity, host, self._token, self._cores, lambda _: os._exit(1))
        await self._rank.start(endpoint)
        return {"pid": os.getpid(), "node": socket.gethostname()}

    async def until_end(self) -> None:
        """Never returns: the call fails with the end of this process."""
        await asyncio.Event().wait()

    async def stop(self) -> None:
        await stop_and_end(self._rank.stop())


class GatewayActor:
    """The gateway; also answers `tercet scale`, `role set`, `status` and `down --address`."""

    def __init__(self, spec: ClusterSpec, cluster_token: str) -> None:
        self._spec = spec
        self._token = cluster_token
        self._stop_requested = False
        # As last told by the controller.
        self._overview: dict[str, Any] = {"target": {}, "members": {}, "answers": {}, "switches": {}}
        self._is_told = False
        self._asked: list[dict[str, Any]] = []  # requests that the controller has not answered

    async def start(self) -> GatewayInfo:
        from tercet.roles.gateway.gateway import Gateway

        logs.configure(self._spec.logging, hears_clients=True, role="gateway")
        self._gateway = Gateway(self._spec, self._token)
        self._watch = asyncio.create_task(end_with_raylet(self._gateway.stop))
        self._info = await self._gateway.start()
        return self._info

    async def set_workers(self, workers: Sequence[WorkerInfo]) -> None:
        await self._gateway.set_workers(workers)

    async def health(self) -> dict[str, Any]:
        """The gateway's status and addresses, the controller's overview, and the requests to the controller."""
        place = {"pid": os.getpid(), "node": node_address()}
        asked = {"stop_requested": self._stop_requested, "asked": self._asked}
        return self._gateway.status() | asdict(self._info) | place | self._overview | asked

    async def note(self, overview: dict[str, Any]) -> None:
        """Keep what the controller tells (`members.overview`, `Changes.overview`)."""
        before = self._overview if self._is_told else overview  # else an earlier gateway has counted what is in it
        self._overview, self._is_told = overview, True
        self._gateway.members_told(overview["target"], overview["members"])
        told = {worker: member["experts"] for worker, member in overview["members"].items() if "experts" in member}
        self._gateway.experts_told({worker: [ExpertRows(**rank) for rank in told[worker]] for worker in told})
        members = {worker: member for worker, member in overview["members"].items() if "moves" in member}
        self._gateway.placement_told(
            {worker: Moves(**member["moves"]) for worker, member in members.items()},
            {worker: member["placing"] for worker, member in members.items() if member["placing"]},
        )
        self._asked = [asked for asked in self._asked if asked["id"] not in overview["answers"]]
        for ask_id in overview["switches"].keys() - before["switches"].keys():
            switch = overview["switches"][ask_id]
            self._gateway.role_switched(switch["how"], switch["seconds"])

    async def request_change(self, ask_id: str, change: Mapping[str, Any]) -> None:
        """Leave a request for the controller, which reads it with the next health (`Changes`). Idempotent. Raises
        Overloaded."""
        if ask_id in self._overview["answers"] or any(asked["id"] == ask_id for asked in self._asked):
            return
        if len(self._asked) >= MOST_ASKED:
            raise Overloaded(f"{MOST_ASKED} questions wait for the controller already")
        self._asked.append({"id": ask_id, **change})

    async def request_stop(self) -> None:
        """Leave a request for the controller to drain the cluster, which it reads with the next health."""
        self._stop_requested = True

    async def drain(self, timeout_s: float, reason: str = "draining") -> None:
        await self._gateway.drain(timeout_s, reason)

    async def stop(self) -> None:
        await stop_and_end(self._gateway.stop())
