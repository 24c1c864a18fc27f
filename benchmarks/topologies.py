"""Aggregated against disaggregated on equal cores, in one run: two workers each, one thread a worker.

    python -m benchmarks.topologies --rounds 5 --result topologies.json

Starts both clusters (`tercet serve`), then measures them in turn, round by round, so that noise hits both; an idle
cluster takes no core. Each figure is the median of the rounds. Also says what the gateway itself cost.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import progress
from benchmarks.serving import Target, first_model, report, run
from benchmarks.workload import paced, random_requests

ROOT = Path(__file__).resolve().parent.parent
CLUSTERS = {
    "aggregated": ("configs/aggregated.yaml", []),
    "pd": ("configs/local.yaml", ["roles.decode.replicas=1"]),
}
KEYS = ("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_itl_ms", "median_e2el_ms", "output_throughput")
PORTS = {"aggregated": 18300, "pd": 18310}
START_S = 120.0


def start(name: str) -> subprocess.Popen[bytes]:
    """Serve one cluster, on ports of its own."""
    spec, settings = CLUSTERS[name]
    return subprocess.Popen(serve_command(name, PORTS[name], spec, settings), cwd=ROOT, stdout=subprocess.DEVNULL)


def serve_command(name: str, port: int, spec: str, settings: Sequence[str]) -> list[str]:
    """settings: KEY.PATH=VALUE. HTTP on `port`, gRPC on the next; in a Ray of its own."""
    own = [f"name=bench-{name}", "ray.address=local", f"gateway.http.port={port}", f"gateway.grpc.port={port + 1}"]
    command = [str(Path(sys.executable).parent / "tercet"), "serve", str(ROOT / spec)]
    for setting in (*own, *settings):
        command += ["--set", setting]
    return command


def wait_until_ready(name: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url(name)}/ready", timeout=5):  # noqa: S310  # our own server
                return
        except OSError:
            time.sleep(0.3)
    raise SystemExit(f"cluster {name} did not become ready")


def url(name: str) -> str:
    return f"http://127.0.0.1:{PORTS[name]}"


def measure(name: str, prompts: int, concurrency: int | None, rate: float, seed: int) -> dict[str, float]:
    """One closed loop (or open, at `rate`) of 128 tokens in, 64 out."""
    requests = paced(random_requests(prompts, (128, 64), 0.0, 0, 10_000, seed), rate, 1.0, seed)
    model = asyncio.run(first_model(url(name)))
    outcomes = asyncio.run(run(Target(f"{url(name)}/v1/completions", model, True), requests, concurrency, 600.0))
    result = report(outcomes, {})
    if result["failed"]:
        raise SystemExit(f"{name}: {result['failed']} requests failed: {result['errors']}")
    return {key: float(result[key]) for key in KEYS}


def gateway_cpu_s(name: str) -> float:
    """CPU seconds of the gateway's process so far: HTTP, gRPC, router, tokenizer, everything."""
    tercet = str(Path(sys.executable).parent / "tercet")
    reply = subprocess.run([tercet, "status", "--json", "--name", f"bench-{name}"], capture_output=True, check=True)
    stat = Path(f"/proc/{json.loads(reply.stdout)['pid']}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


def gateway_cost(name: str, cpu_s: float) -> dict[str, float]:
    """What the gateway cost: its own medians from /metrics, and `cpu_s` CPU seconds by token, router and all."""
    with urllib.request.urlopen(f"{url(name)}/metrics", timeout=5) as reply:  # noqa: S310  # our own server
        text = reply.read().decode()
    tokens = float(re.findall(r"^tercet_generation_tokens_total (\S+)", text, re.MULTILINE)[0])
    return {
        "token_us_at_most": _median_bucket(text, "tercet_gateway_token_seconds") * 1e6,
        "request_ms_at_most": _median_bucket(text, "tercet_gateway_request_seconds") * 1e3,
        "process_cpu_us_per_token": cpu_s / tokens * 1e6,
    }


def _median_bucket(text: str, metric: str) -> float:
    """Upper edge of the histogram bucket that holds the median, seconds."""
    buckets = [
        (float(e), float(n)) for e, n in re.findall(rf'^{metric}_bucket{{le="(\S+)"}} (\S+)', text, re.MULTILINE)
    ]
    return next(edge for edge, count in buckets if count * 2 >= buckets[-1][1])


def medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}


def show(title: str, found: dict[str, dict[str, float]]) -> None:
    table = Table("", *found, "aggregated / pd", title=title)
    for key in KEYS:
        ratio = found["aggregated"][key] / found["pd"][key]
        table.add_row(key, *(f"{found[name][key]:,.1f}" for name in found), f"{ratio:.2f}")
    Console().print(table)


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    prompts: Annotated[int, typer.Option(min=1, help="of each round and loop")] = 16,
    concurrency: Annotated[int, typer.Option(min=1, help="clients of the closed loop")] = 8,
    rate: Annotated[float, typer.Option(help="requests per second of the open loop")] = 0.7,
    result: Annotated[Path | None, typer.Option(help="where the JSON goes")] = None,
) -> None:
    processes = []
    everything: dict[str, Any] = {}
    try:
        for name in CLUSTERS:
            processes.append(start(name))  # noqa: PERF401  # one that is started must be ended, whatever the next does
        for name, process in zip(CLUSTERS, processes, strict=True):
            wait_until_ready(name, process)
        started = {name: gateway_cpu_s(name) for name in CLUSTERS}
        loops = {
            f"closed loop, {concurrency} clients": (concurrency, float("inf")),
            f"open loop, {rate}/s": (None, rate),
        }
        for loop, (title, (clients, pace)) in enumerate(loops.items()):
            raw: dict[str, list[dict[str, float]]] = {name: [] for name in CLUSTERS}
            for number in progress.rounds(range(rounds), title):
                for name, found in raw.items():
                    # Other prompts each time, or the prefix caches would answer.
                    found.append(measure(name, prompts, clients, pace, seed=loop * rounds + number))
            everything[title] = raw
            show(title, {name: medians(found) for name, found in raw.items()})
        cpu_s = {name: gateway_cpu_s(name) - before for name, before in started.items()}
        everything["gateway"] = {name: gateway_cost(name, seconds) for name, seconds in cpu_s.items()}
        Console().print(everything["gateway"])
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait(60)
    if result is not None:
        result.write_text(json.dumps({"cores": os.cpu_count(), **everything}))


if __name__ == "__main__":
    typer.run(main)
