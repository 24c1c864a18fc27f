"""Thin Ray actors around the roles' objects. Imported where no torch must be: a role is imported in its own actor.

    controller --start/health/drain/stop--> WorkerActor  --> tercet.roles.worker.Worker
    controller --set_workers/status/...---> GatewayActor --> tercet.roles.gateway.gateway.Gateway

No token and no KV byte passes through these calls. A TercetError crosses them as itself (see `launcher.Actor.call`).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import ray

from tercet.core import Load, Role, WorkerInfo
from tercet.errors import Overloaded
from tercet.spec import ClusterSpec

if TYPE_CHECKING:
    from tercet.roles.gateway.gateway import GatewayInfo


LOOK_EVERY_S = 0.1  # for the raylet; Ray's own look, which ends a process without a word, comes every second
LAST_WORD_S = 2.0
STOP_TIMEOUT_S = 5.0
MOST_ASKED = 16  # questions for another number of workers that wait for the controller
LAST_ANSWER_S = 0.5  # between the end of `stop` and that of the process, for saying so


def node_address() -> str:
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


async def end_with_raylet(last_word: Callable[[], Awaitable[None]] | None = None) -> None:
    """Ray may leave an async actor running when its raylet is killed; it would hold its ports and memory for ever."""
    parent = os.getppid()
    while os.getppid() == parent:
        await asyncio.sleep(LOOK_EVERY_S)
    if last_word is not None:
        asyncio.get_running_loop().call_later(LAST_WORD_S, os._exit, 1)
        await last_word()
    os._exit(1)


async def stop_and_end(stop: Coroutine[Any, Any, None]) -> None:
    """Stop, answer, and end this process, whatever comes of that: without its GCS Ray cannot end it."""
    loop = asyncio.get_running_loop()
    loop.call_later(STOP_TIMEOUT_S, os._exit, 1)
    await stop
    loop.call_later(LAST_ANSWER_S, os._exit, 0)


class WorkerActor:
    """One replica of a role. The role's object is made in `start`, where an error of its own can cross as itself."""

    def __init__(self, worker_id: str, role: Role, epoch: int, spec: ClusterSpec, cluster_token: str) -> None:
        self._identity = (worker_id, role, epoch, spec)
        self._token = cluster_token
        self._loopback = spec.network.host == "loopback"

    async def start(self) -> WorkerInfo:
        from tercet.roles.worker import Worker

        self._watch = asyncio.create_task(end_with_raylet())
        host = "127.0.0.1" if self._loopback else node_address()
        self._worker = Worker(*self._identity, host, self._token)
        return await self._worker.start()

    async def health(self) -> Load:
        return await self._worker.health()

    async def drain(self, timeout_s: float) -> None:
        await self._worker.drain(timeout_s)

    async def stop(self) -> None:
        await stop_and_end(self._worker.stop())


class GatewayActor:
    """The cluster's front door; also where `tercet down`, `tercet scale` and `tercet status` knock."""

    def __init__(self, spec: ClusterSpec, cluster_token: str) -> None:
        self._spec = spec
        self._token = cluster_token
        self._stop_requested = False
        self._overview: dict[str, Any] = {"target": {}, "members": {}, "answers": {}}  # as the controller last told
        self._asked: list[dict[str, Any]] = []  # what it has not answered

    async def start(self) -> GatewayInfo:
        from tercet.roles.gateway.gateway import Gateway

        self._gateway = Gateway(self._spec, self._token)
        self._watch = asyncio.create_task(end_with_raylet(self._gateway.stop))
        self._info = await self._gateway.start()
        return self._info

    async def set_workers(self, workers: Sequence[WorkerInfo]) -> None:
        await self._gateway.set_workers(workers)

    async def health(self) -> dict[str, Any]:
        """The gateway's status, where it is reached, the controller's overview, and what is asked of the controller."""
        place = {"pid": os.getpid(), "node": node_address()}
        asked = {"stop_requested": self._stop_requested, "asked": self._asked}
        return self._gateway.status() | asdict(self._info) | place | self._overview | asked

    async def note(self, overview: dict[str, Any]) -> None:
        """Keep what the controller says of its target and its members (`members.overview`)."""
        self._overview = overview
        self._asked = [asked for asked in self._asked if asked["id"] not in overview["answers"]]

    async def request_scale(self, ask_id: str, role: str, replicas: int) -> None:
        """The controller sees it at its next look. Harmless if it is asked again. Raises Overloaded."""
        if ask_id in self._overview["answers"] or any(asked["id"] == ask_id for asked in self._asked):
            return
        if len(self._asked) >= MOST_ASKED:
            raise Overloaded(f"{MOST_ASKED} questions wait for the controller already")
        self._asked.append({"id": ask_id, "role": role, "replicas": replicas})

    async def request_stop(self) -> None:
        """The controller sees it at its next look and drains the cluster."""
        self._stop_requested = True

    async def drain(self, timeout_s: float, reason: str = "draining") -> None:
        await self._gateway.drain(timeout_s, reason)

    async def stop(self) -> None:
        await stop_and_end(self._gateway.stop())
