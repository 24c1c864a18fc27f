"""Debian's Prometheus, run beside a test: its tool, and a server that scrapes one gateway."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from tests.machine import ROOT, free_port

DEPLOY = ROOT / "deploy" / "prometheus"
PATIENCE_S = 60.0


def program(name: str) -> str:
    """prometheus or promtool, from the PATH or where `make tools` puts them."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:{ROOT / 'build/tools/usr/bin'}")
    assert found is not None, f"{name} is not here: run make tools"
    return found


def promtool(*arguments: str | Path, stdin: bytes = b"") -> str:
    """-> what it says; it must find no fault."""
    done = subprocess.run([program("promtool"), *arguments], input=stdin, capture_output=True, check=False, timeout=60)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    return said


@asynccontextmanager
async def scraping(folder: Path, address: str) -> AsyncIterator[Prometheus]:
    """A server with the rules of deploy/, which scrapes the gateway at host:port four times a second."""
    config = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "250ms", "evaluation_interval": "250ms"}
    config["rule_files"] = [str(DEPLOY / name) for name in config["rule_files"]]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [address]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    own = f"127.0.0.1:{free_port()}"
    arguments = [
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={own}",
    ]
    log = folder / "log"
    with log.open("wb") as out:
        server = await asyncio.create_subprocess_exec(program("prometheus"), *arguments, stdout=out, stderr=out)
    try:
        async with aiohttp.ClientSession(f"http://{own}") as http:
            prometheus = Prometheus(http, server, log)
            await prometheus.started()
            yield prometheus
    finally:
        with suppress(ProcessLookupError):
            server.terminate()
        async with asyncio.timeout(PATIENCE_S):
            await server.wait()


class Prometheus:
    def __init__(self, http: aiohttp.ClientSession, server: Process, log: Path) -> None:
        self._http, self._server, self._log = http, server, log

    async def query(self, expression: str) -> list[dict[str, Any]]:
        """-> the samples of an instant query, which must be understood."""
        async with self._http.get("/api/v1/query", params={"query": expression}) as answer:
            told = await answer.json()
        assert told["status"] == "success", f"{expression}: {told}"
        return list(told["data"]["result"])

    async def started(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not await self._is_ready():
                assert self._server.returncode is None, self._log.read_text()
                await asyncio.sleep(0.05)

    async def _is_ready(self) -> bool:
        try:
            async with self._http.get("/-/ready") as answer:
                return answer.status == 200
        except aiohttp.ClientConnectionError:
            return False

    async def until(self, expression: str) -> None:
        """Wait until a query has a result."""
        async with asyncio.timeout(PATIENCE_S):
            while not await self.query(expression):
                await asyncio.sleep(0.1)
