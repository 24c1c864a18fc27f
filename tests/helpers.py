"""Pieces that several tests use: a cluster of real workers in this process, without Ray."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from tercet.core import Done, GenerateRequest, Role, SamplingParams, TokenEvent, WorkerInfo
from tercet.roles.router.attempt import RequestEvent
from tercet.roles.router.router import Router
from tercet.roles.worker import Worker
from tercet.spec import ClusterSpec

TOKEN = "secret"


async def next_token(stream: AsyncIterator[RequestEvent]) -> int:
    """Of a request of the router."""
    while not isinstance(event := await anext(stream), TokenEvent):
        pass
    return event.token_id


def spec_of(
    topology: str = "pd",
    decoders: int = 2,
    prefills: int = 1,
    source: str | None = None,
    encoders: int = 1,
    images: dict[str, int] | None = None,
    **changes: object,
) -> ClusterSpec:
    """A small float32 cluster; `changes` are dotted keys: transfer__transport="tcp", kv__blocks=64, ..."""
    kv = {k.removeprefix("kv__"): v for k, v in changes.items() if k.startswith("kv__")}
    scheduler = {k.removeprefix("scheduler__"): v for k, v in changes.items() if k.startswith("scheduler__")}
    role = {"threads": 1, "kv": {"blocks": 256} | kv, "scheduler": scheduler}
    roles = {
        "pd": {Role.PREFILL: role | {"replicas": prefills}, Role.DECODE: role | {"replicas": decoders}},
        "aggregated": {Role.AGGREGATED: role | {"replicas": decoders}},
    }
    roles["ep-d"] = roles["pd"]
    encode = {"threads": 1, "replicas": encoders, "images": images or {}}
    for apart, other in (("epd", "pd"), ("e-pd", "aggregated")):
        roles[apart] = {
            Role.ENCODE: encode,
            **{n: its if n is Role.DECODE else its | {"images": images or {}} for n, its in roles[other].items()},
        }
    roles = roles[topology]
    transfer = {k.removeprefix("transfer__"): v for k, v in changes.items() if k.startswith("transfer__")}
    limits = {k.removeprefix("limits__"): v for k, v in changes.items() if k.startswith("limits__")}
    return ClusterSpec(
        topology=topology,
        model={"dtype": "float32", "max_context": min(2048, 16 * role["kv"]["blocks"])}
        | ({"source": source} if source else {}),
        roles=roles,
        transfer=transfer,
        limits=limits,
    )


class LocalCluster:
    """Workers on this process's event loop and a router; every wire between them is real."""

    def __init__(self, spec: ClusterSpec) -> None:
        self.spec = spec
        self.workers: dict[str, Worker] = {}
        self.infos: dict[str, WorkerInfo] = {}
        self.router = Router(spec, TOKEN)
        self.ranks: dict[tuple[str, int], subprocess.Popen[str]] = {}  # (worker, rank) -> its process, from rank 1 on

    async def start(self) -> None:
        for role, role_spec in self.spec.roles.items():
            for number in range(role_spec.replicas):
                name = f"{role.value}-{number}"
                worker = self.workers[name] = Worker(name, role, 1, self.spec, "127.0.0.1", TOKEN)
                if role_spec.parallelism.ranks > 1:
                    endpoint = await worker.listen()
                    for rank in range(1, role_spec.parallelism.ranks):
                        self._start_rank(name, rank, role, endpoint)
                self.infos[name] = await worker.start()
        await self._publish()

    def _start_rank(self, name: str, rank: int, role: Role, endpoint: str) -> None:
        self.ranks[name, rank] = start_rank(name, rank, role, 1, self.spec, endpoint)

    async def switch(self, name: str, role: Role, drain_s: float = 5.0) -> WorkerInfo:
        """Give a worker another role, as the controller does."""
        worker, before = self.workers[name], self.infos.pop(name)
        await self.router.set_workers(list(self.infos.values()))
        await worker.drain(drain_s)
        self.infos[name] = await worker.switch(role, before.epoch + 1)
        await self._publish()
        return self.infos[name]

    async def announce(self, name: str) -> None:
        """Tell the router where a worker's ranks are reached now, as the controller does."""
        endpoint = (await self.workers[name].health()).transfer_endpoint
        self.infos[name] = replace(self.infos[name], transfer_endpoint=endpoint)
        await self._publish()

    async def _publish(self) -> None:
        await self.router.set_workers(list(self.infos.values()))
        while self.router.missing_roles() or len(self.router.loads()) < len(self.infos):
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        await self.router.close()
        for worker in self.workers.values():
            await worker.stop()
        for process in self.ranks.values():
            assert process.stdin is not None
            process.stdin.close()
            process.wait(20)

    async def generate(self, token_ids: Sequence[int], **params: object) -> tuple[list[TokenEvent], Done]:
        events = [e async for e in self.router.generate(request_of(token_ids, **params))]
        assert isinstance(events[-1], Done)
        return [e for e in events[:-1] if isinstance(e, TokenEvent)], events[-1]

    async def settled(self, timeout_s: float = 5.0) -> None:
        """The leak oracle: every block is accounted for, and idle workers hold none."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and any(
            load.blocks_free < load.blocks_total
            or load.embedding_blocks_free < load.embedding_blocks_total
            or load.running
            or load.waiting
            or load.encoder_waiting
            for load in (w.legs.load() for w in self.workers.values())
        ):
            await asyncio.sleep(0.02)
        for name, worker in self.workers.items():
            if worker.legs.engine is not None:
                worker.engine.check_integrity()
            load = worker.legs.load()
            assert load.blocks_free == load.blocks_total, f"{name} leaks: {load}"
            assert load.embedding_blocks_free == load.embedding_blocks_total, f"{name} leaks: {load}"
            assert load.running == load.waiting == load.encoder_waiting == 0, f"{name}: {load}"


def start_rank(name: str, rank: int, role: Role, epoch: int, spec: ClusterSpec, endpoint: str) -> subprocess.Popen[str]:
    """A rank in a process of its own, which joins rank 0 at the endpoint."""
    process = subprocess.Popen([sys.executable, "-m", "tests.rank_process"], stdin=subprocess.PIPE, text=True)
    assert process.stdin is not None
    process.stdin.write(json.dumps([name, rank, role.value, epoch, spec.model_dump_json(), TOKEN, endpoint]) + "\n")
    process.stdin.flush()
    return process


def request_of(token_ids: Sequence[int], timeout_s: float = 60.0, **params: object) -> GenerateRequest:
    sampling = SamplingParams(**({"temperature": 0.0, "max_tokens": 8} | params))
    return GenerateRequest(uuid.uuid4().hex, tuple(token_ids), sampling, time.monotonic() + timeout_s)


@contextlib.asynccontextmanager
async def cluster(spec: ClusterSpec) -> AsyncIterator[LocalCluster]:
    made = LocalCluster(spec)
    await made.start()
    try:
        yield made
        await made.settled()
    finally:
        await made.stop()
