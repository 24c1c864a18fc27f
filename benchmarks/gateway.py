"""What gateway and router cost by themselves: a real gateway process before a worker that only says tokens.

    python -m benchmarks.gateway --rounds 5 --result gateway.json

The worker is a process of its own behind the real worker service; every `step_ms` it says one token for each of its
requests in one message, as an engine step does. So the gateway's process does what it does in a cluster, and nothing
else: HTTP, JSON, tokenizer, router, gRPC. Two figures, from its /metrics and from /proc: how long a token is in it
(off the worker's stream until its bytes are written), and how much CPU it takes for one, idle time taken off.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import re
import statistics
import time
import urllib.request
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import progress
from benchmarks.serving import Target, run
from benchmarks.workload import random_requests
from tercet.core import Done, FinishReason, Leg, Load, Role, Ticket, TokenEvent, WorkerInfo
from tercet.models.sources import served_name
from tercet.roles.gateway.gateway import Gateway
from tercet.spec import ClusterSpec
from tercet.wire.worker_server import ReportStream, WorkerServer

TOKEN = "benchmark"  # noqa: S105  # both sides run here
SPEC = ClusterSpec.model_validate(
    {
        "topology": "aggregated",
        "roles": {Role.AGGREGATED: {"scheduler": {"max_running": 256}}},
        "gateway": {"http": {"port": 0}, "grpc": {"port": 0}},
    }
)
IDLE_S = 5.0


class SayingWorker:
    """A LegHandler that says a token for each of its legs at each step."""

    def __init__(self) -> None:
        self._legs: dict[Ticket, tuple[Leg, ReportStream, int]] = {}  # its leg, its stream, tokens said

    def start(self, leg: Leg, stream: ReportStream) -> None:
        self._legs[leg.ticket] = (leg, stream, 0)

    def abort(self, ticket: Ticket) -> None:
        self._legs.pop(ticket, None)

    def disconnected(self, stream: ReportStream) -> None:
        self._legs.clear()

    def step(self) -> None:
        for ticket, (leg, stream, said) in list(self._legs.items()):
            last = said + 1 == leg.params.max_tokens
            stream.token(leg, TokenEvent(1000 + said, finish=FinishReason.LENGTH if last else None))
            self._legs[ticket] = (leg, stream, said + 1)
            if last:
                del self._legs[ticket]
                stream.finished(leg, Done(FinishReason.LENGTH))


def worker_process(pipe: Connection, step_s: float) -> None:
    async def work() -> None:
        handler = SayingWorker()
        server = WorkerServer(handler, Load, TOKEN)
        pipe.send(await server.start("127.0.0.1"))
        while True:
            await asyncio.sleep(step_s)
            handler.step()

    asyncio.run(work())


def gateway_process(pipe: Connection, worker_address: str) -> None:
    async def work() -> None:
        gateway = Gateway(SPEC, TOKEN)
        info = await gateway.start()
        await gateway.set_workers([WorkerInfo("saying-0", Role.AGGREGATED, 1, worker_address, "", "", 0, "")])
        pipe.send(info.http_url)
        await asyncio.Event().wait()

    asyncio.run(work())


@dataclass
class Side:
    """A gateway and its worker, as two processes."""

    url: str
    processes: list[multiprocessing.process.BaseProcess]
    idle_share: float = 0.0  # of a core, without a request

    @property
    def cpu_s(self) -> float:
        stat = Path(f"/proc/{self.processes[-1].pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")

    def histogram(self, metric: str) -> dict[float, float]:
        """Bucket edge -> observations up to it."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as reply:  # noqa: S310  # our own server
            found = re.findall(rf'^{metric}_bucket{{le="(\S+)"}} (\S+)', reply.read().decode(), re.MULTILINE)
        return {float(edge): float(count) for edge, count in found}

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def begin(step_ms: float) -> Side:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    worker = context.Process(target=worker_process, args=(theirs, step_ms / 1e3), daemon=True)
    worker.start()
    gateway = context.Process(target=gateway_process, args=(theirs, ours.recv()), daemon=True)
    gateway.start()
    side = Side(ours.recv(), [worker, gateway])
    while not is_ready(side):
        time.sleep(0.1)
    measure(side, 1, 16)  # warm
    cpu_s = side.cpu_s
    time.sleep(IDLE_S)
    side.idle_share = (side.cpu_s - cpu_s) / IDLE_S
    return side


def is_ready(side: Side) -> bool:
    try:
        with urllib.request.urlopen(f"{side.url}/ready", timeout=10):  # noqa: S310  # our own server
            return True
    except OSError:
        return False


def measure(side: Side, clients: int, tokens: int) -> dict[str, float]:
    """`clients` streams at once, each of `tokens` tokens."""
    metrics = ("tercet_gateway_token_seconds", "tercet_gateway_request_seconds")
    before = {metric: side.histogram(metric) for metric in metrics}
    cpu_s, began = side.cpu_s, time.monotonic()
    target = Target(f"{side.url}/v1/completions", served_name(SPEC.model), True)
    outcomes = asyncio.run(run(target, random_requests(clients, (128, tokens), 0.0, 0, 10_000, 0), None, 600.0))
    wall_s, cpu_s = time.monotonic() - began, side.cpu_s - cpu_s
    if errors := [outcome.error for outcome in outcomes if outcome.error]:
        raise SystemExit(f"{len(errors)} requests failed: {errors[0]}")
    token, request = (median_of(before[metric], side.histogram(metric)) for metric in metrics)
    return {
        "token_us": token * 1e6,
        "request_ms": request * 1e3,
        "cpu_us_per_token": (cpu_s - side.idle_share * wall_s) / (clients * tokens) * 1e6,
        "tokens_per_s": clients * tokens / wall_s,
        "idle_cpu_percent": side.idle_share * 100,
    }


def median_of(before: dict[float, float], after: dict[float, float]) -> float:
    """The median of what came between two readings of a histogram, linear within its bucket, seconds."""
    counts = {edge: count - before[edge] for edge, count in after.items()}
    half = max(counts.values()) / 2
    low, below = 0.0, 0.0
    for edge, count in sorted(counts.items()):
        if count >= half:
            return low + (edge - low) * (half - below) / (count - below)
        low, below = edge, count
    raise AssertionError("the last bucket holds everything")


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    tokens: Annotated[int, typer.Option(min=2, help="of each stream")] = 256,
    step_ms: Annotated[float, typer.Option(help="between two tokens of a stream")] = 25.0,
    result: Annotated[Path | None, typer.Option(help="where the JSON goes")] = None,
) -> None:
    loads = (1, 4, 16, 64)
    side = begin(step_ms)
    try:
        turns = progress.rounds([clients for clients in loads for _ in range(rounds)])
        raw: dict[int, list[dict[str, float]]] = {clients: [] for clients in loads}
        for clients in turns:
            raw[clients].append(measure(side, clients, tokens))
    finally:
        side.stop()
    table = Table("streams", *raw[1][0], title="medians of the rounds")
    for clients, found in raw.items():
        table.add_row(str(clients), *(f"{statistics.median(r[key] for r in found):,.2f}" for key in found[0]))
    Console().print(table)
    if result is not None:
        result.write_text(json.dumps({"cores": os.cpu_count(), "step_ms": step_ms, "streams": raw}))


if __name__ == "__main__":
    typer.run(main)
