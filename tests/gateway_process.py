"""A gateway in a process of its own over a fake router, with the real tokenizer, so that its stalls and memory show."""

from __future__ import annotations

import asyncio
import dataclasses
import multiprocessing
import resource
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tercet.roles.gateway.gateway import Gateway, load_served_model
from tercet.spec import ModelSpec
from tests.fakes.gateway import spec
from tests.fakes.router import FakeRouter


@dataclass
class GatewayProcess:
    http_url: str
    grpc_address: str
    pid: int

    @property
    def rss(self) -> int:
        """Bytes."""
        status = Path(f"/proc/{self.pid}/statm").read_text().split()
        return int(status[1]) * 4096

    @property
    def host_port(self) -> tuple[str, int]:
        host, port = self.http_url.removeprefix("http://").rsplit(":", 1)
        return host, int(port)


@contextmanager
def gateway_process(
    max_context: int = 2048, delay_s: float = 0.01, files: int | None = None, **limits: Any
) -> Iterator[GatewayProcess]:
    """`delay_s`: between two tokens of the router; `files`: the most that the process may open."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, max_context, delay_s, files, limits), daemon=True)
    process.start()
    try:
        assert process.pid is not None
        yield GatewayProcess(*ours.recv(), process.pid)
    finally:
        process.kill()
        process.join()


def _serve(pipe: Connection, max_context: int, delay_s: float, files: int | None, limits: dict[str, Any]) -> None:
    if files is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    async def work() -> None:
        model = dataclasses.replace(load_served_model(ModelSpec()), max_context=max_context)
        router = FakeRouter(delay_s=delay_s)
        router.requests = deque(maxlen=0)  # it would keep every prompt
        gateway = Gateway(spec(**limits), "token", router, model)
        info = await gateway.start()
        pipe.send((info.http_url, info.grpc_address))
        await asyncio.Event().wait()

    asyncio.run(work())
