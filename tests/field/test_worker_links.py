"""The gateway's links to its workers, where the network between them is not what it should be."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from tercet.core import Load, Role, WorkerInfo
from tercet.wire.worker_client import WorkerLink
from tercet.wire.worker_server import WorkerServer

TOKEN = "secret"
PROXIES = [name for kind in ("http", "https", "grpc", "all") for name in (f"{kind}_proxy", f"{kind.upper()}_PROXY")]


class Idle:
    """A role that has nothing to do."""

    def disconnected(self, stream: object) -> None:
        pass


class Path:
    """Forwards to a port. `drop` lets every connection that stands fall silent, as packets that are lost do."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._passes = asyncio.Event()
        self._passes.set()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def drop(self) -> None:
        self._passes.clear()
        self._passes = asyncio.Event()
        self._passes.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream = await asyncio.open_connection("127.0.0.1", self._port)
        ways = ((reader, upstream[1]), (upstream[0], writer))
        self._tasks += [asyncio.create_task(self._forward(*way, self._passes)) for way in ways]

    async def _forward(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, passes: asyncio.Event) -> None:
        try:
            while data := await source.read(65536):
                await passes.wait()
                target.write(data)
        except ConnectionError:
            pass
        finally:
            target.close()

    async def stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)  # the transports close in the next turn


@contextlib.asynccontextmanager
async def linked(address: str) -> AsyncIterator[asyncio.Queue[bool]]:
    changes: asyncio.Queue[bool] = asyncio.Queue()
    info = WorkerInfo("decode-0", Role.DECODE, 1, address, "", "")
    link = WorkerLink(info, TOKEN, lambda *_: None, id, lambda fault: changes.put_nowait(fault is None))
    yield changes
    await link.close()


@pytest.fixture
async def worker() -> AsyncIterator[str]:
    server = WorkerServer(Idle(), Load, TOKEN)
    yield await server.start("127.0.0.1")
    await server.stop()


async def next_of(changes: asyncio.Queue[bool], seconds: float) -> bool:
    return await asyncio.wait_for(changes.get(), seconds)


@pytest.mark.parametrize("variable", PROXIES)
async def test_no_proxy_stands_between_our_own_processes(worker, monkeypatch, variable):
    monkeypatch.setenv(variable, "http://127.0.0.1:1")
    async with linked(worker) as changes:
        assert await next_of(changes, 10)


async def test_a_path_that_falls_silent_is_left_for_a_new_connection(worker):
    path = Path(int(worker.rpartition(":")[2]))
    async with linked(await path.start()) as changes:
        assert await next_of(changes, 10)
        path.drop()
        assert not await next_of(changes, 20)
        assert await next_of(changes, 30)
    await path.stop()
