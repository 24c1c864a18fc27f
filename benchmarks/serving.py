"""Latency, throughput and goodput of any OpenAI endpoint; keys of the JSON are those of `vllm bench serve`.

    python -m benchmarks.serving --base-url http://127.0.0.1:8000 --max-concurrency 16          closed loop
    python -m benchmarks.serving --request-rate 4 --goodput ttft:500 --goodput tpot:100         open loop
    python -m benchmarks.serving --trace conversation_trace.jsonl.gz --num-prompts 200          as they arrived

TTFT is send to first token, ITL the gap between two chunks, TPOT (E2E - TTFT) / (output tokens - 1).
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import progress
from benchmarks.workload import Request, paced, random_requests, trace_requests

METRICS = ("ttft", "tpot", "itl", "e2el")
PERCENTILES = (50, 90, 99)


@dataclass
class Outcome:
    """What one request came to. Seconds."""

    input_len: int
    sent: float = 0.0
    ttft: float = 0.0
    e2el: float = 0.0
    itl: list[float] = field(default_factory=list)
    output_len: int = 0
    error: str = ""

    @property
    def tpot(self) -> float:
        return (self.e2el - self.ttft) / (self.output_len - 1) if self.output_len > 1 else 0.0


@dataclass(frozen=True)
class Target:
    url: str  # of /v1/completions
    model: str
    ignore_eos: bool


async def send(session: aiohttp.ClientSession, target: Target, request: Request) -> Outcome:
    """One streamed request; a failure is in `error`, never raised."""
    body = {
        "model": target.model,
        "prompt": request.prompt,
        "max_tokens": request.output_len,
        "temperature": 0,
        "ignore_eos": target.ignore_eos,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    outcome = Outcome(len(request.prompt), sent=time.perf_counter())
    try:
        async with session.post(target.url, json=body) as response:
            if response.status != 200:
                outcome.error = f"HTTP {response.status}: {await response.text()}"
            else:
                await _follow(response, outcome)
    except (aiohttp.ClientError, TimeoutError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    return outcome


async def _follow(response: aiohttp.ClientResponse, outcome: Outcome) -> None:
    last = 0.0
    done = False
    async for line in response.content:
        data = line.strip().removeprefix(b"data: ")
        now = time.perf_counter()
        if not data:
            continue
        if data == b"[DONE]":
            done = True
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            outcome.error = str(chunk["error"]["message"])
            return
        if chunk.get("usage"):
            outcome.output_len = chunk["usage"]["completion_tokens"]
        if not any(_is_token(choice) for choice in chunk["choices"]):
            continue
        if last:
            outcome.itl.append(now - last)
        else:
            outcome.ttft = now - outcome.sent
        last = now
    outcome.e2el = last - outcome.sent
    if not (done and last):
        outcome.error = "the stream ended before the answer did"


def _is_token(choice: Mapping[str, Any]) -> bool:
    """A chunk that only says why the choice is over brings no token."""
    return bool(choice["text"]) or choice["finish_reason"] is None


async def run(
    target: Target, requests: Sequence[Request], max_concurrency: int | None, timeout_s: float
) -> list[Outcome]:
    """Send each request at its time, at most `max_concurrency` at once."""
    slots = asyncio.Semaphore(max_concurrency) if max_concurrency else nullcontext()
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        start = time.perf_counter()

        async def one(request: Request, ended: Callable[[], None]) -> Outcome:
            await asyncio.sleep(start + request.at - time.perf_counter())
            async with slots:
                outcome = await send(session, target, request)
            ended()
            return outcome

        with progress.bar("requests", len(requests)) as ended:
            return await asyncio.gather(*(one(request, ended) for request in requests))


def report(outcomes: Sequence[Outcome], goodput: Mapping[str, float]) -> dict[str, Any]:
    """goodput: metric -> the most milliseconds that a good request may take."""
    good = [o for o in outcomes if not o.error]
    begin = min((o.sent for o in outcomes), default=0.0)
    duration = max((o.sent + o.e2el for o in good), default=begin) - begin
    total_in, total_out = sum(o.input_len for o in good), sum(o.output_len for o in good)
    met = sum(all(1e3 * getattr(o, name) <= limit for name, limit in goodput.items()) for o in good)

    def per_s(count: float) -> float:
        return count / duration if duration else 0.0

    result: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "total_input_tokens": total_in,
        "total_output_tokens": total_out,
        "request_throughput": per_s(len(good)),
        "request_goodput": per_s(met) if goodput else None,
        "output_throughput": per_s(total_out),
        "total_token_throughput": per_s(total_in + total_out),
    }
    samples = {
        "ttft": [o.ttft for o in good],
        "tpot": [o.tpot for o in good if o.output_len > 1],
        "itl": [gap for o in good for gap in o.itl],
        "e2el": [o.e2el for o in good],
    }
    for name in METRICS:
        result |= _statistics(name, samples[name])
    return result | {
        "input_lens": [o.input_len for o in outcomes],
        "output_lens": [o.output_len for o in outcomes],
        "ttfts": [o.ttft for o in outcomes],
        "itls": [o.itl for o in outcomes],
        "errors": [o.error for o in outcomes],
    }


def _statistics(name: str, seconds: Sequence[float]) -> dict[str, float]:
    ms = 1e3 * np.array(seconds or [0.0])
    values = {f"mean_{name}_ms": float(ms.mean()), f"median_{name}_ms": float(np.median(ms))}
    values[f"std_{name}_ms"] = float(ms.std())
    return values | {f"p{p}_{name}_ms": float(np.percentile(ms, p)) for p in PERCENTILES}


def tables(result: Mapping[str, Any]) -> tuple[Table, Table]:
    latency = Table(title="latency, ms")
    for column in ("", "mean", "p50", "p90", "p99"):
        latency.add_column(column, justify="right" if column else "left")
    for name, label in zip(METRICS, ("TTFT", "TPOT", "ITL", "E2E"), strict=True):
        row = [result[f"{kind}_{name}_ms"] for kind in ("mean", "p50", "p90", "p99")]
        latency.add_row(label, *(f"{value:,.2f}" for value in row))
    rates = Table(title=f"{result['completed']} completed, {result['failed']} failed, {result['duration']:.2f} s")
    rates.add_column("throughput")
    rates.add_column("per second", justify="right")
    for key in ("request_throughput", "request_goodput", "output_throughput", "total_token_throughput"):
        if result[key] is not None:
            rates.add_row(key.replace("_", " "), f"{result[key]:,.2f}")
    return latency, rates


def parse_goodput(pairs: Sequence[str]) -> dict[str, float]:
    """['ttft:500', 'tpot:100'] -> {'ttft': 500.0, 'tpot': 100.0}, milliseconds."""
    limits = {}
    for pair in pairs:
        name, _, value = pair.partition(":")
        try:
            limits[name] = float(value)
        except ValueError as error:
            raise typer.BadParameter(f"{pair!r}: must look like ttft:500 (milliseconds)") from error
        if name not in ("ttft", "tpot", "e2el"):
            raise typer.BadParameter(f"{pair!r}: the metric must be ttft, tpot or e2el")
    return limits


async def first_model(base_url: str) -> str:
    """Ends the program with a line if there is no such server."""
    try:
        async with aiohttp.ClientSession() as session, session.get(f"{base_url}/v1/models") as response:
            return str((await response.json())["data"][0]["id"])
    except (aiohttp.ClientError, ValueError, LookupError, TypeError) as error:
        raise SystemExit(
            f"{base_url} names no model ({type(error).__name__}: {error}); is a server running?"
        ) from error


def main(
    base_url: Annotated[str, typer.Option(help="of the server, without /v1")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="default: the first that the server names")] = None,
    num_prompts: int = 100,
    input_len: int = 128,
    output_len: int = 64,
    range_ratio: Annotated[float, typer.Option(min=0, max=1, help="spread of both lengths")] = 0.0,
    prefix_len: Annotated[int, typer.Option(help="tokens that all prompts share, besides input-len")] = 0,
    vocab_size: Annotated[int, typer.Option(help="token ids are drawn below this")] = 10_000,
    trace: Annotated[Path | None, typer.Option(help=".jsonl or .csv, .gz or not; replaces the random lengths")] = None,
    max_input_len: Annotated[int, typer.Option(help="prompts of a trace are cut to this")] = 1024,
    request_rate: Annotated[float, typer.Option(help="requests per second; inf: all at once, or as traced")] = math.inf,
    burstiness: Annotated[float, typer.Option(help="1: Poisson; below: burstier")] = 1.0,
    max_concurrency: Annotated[int | None, typer.Option(min=1, help="closed loop of so many clients")] = None,
    goodput: Annotated[list[str] | None, typer.Option(help="metric:milliseconds, may be repeated")] = None,
    warmup: Annotated[int, typer.Option(help="requests before the clock starts")] = 1,
    ignore_eos: bool = True,
    timeout_s: float = 600.0,
    seed: int = 0,
    result: Annotated[Path | None, typer.Option(help="where the JSON goes")] = None,
) -> None:
    """Exit code 1 if any request failed."""
    limits = parse_goodput(goodput or [])
    if trace is None:
        requests = random_requests(num_prompts, (input_len, output_len), range_ratio, prefix_len, vocab_size, seed)
    else:
        requests = trace_requests(trace, num_prompts, max_input_len, vocab_size, seed)
    requests = paced(requests, request_rate, burstiness, seed)
    target = Target(f"{base_url}/v1/completions", model or asyncio.run(first_model(base_url)), ignore_eos)
    warmups = random_requests(warmup, (input_len, output_len), 0.0, 0, vocab_size, seed + 1)  # other prompts
    asyncio.run(run(target, warmups, 1, timeout_s))
    measured = report(asyncio.run(run(target, requests, max_concurrency, timeout_s)), limits)
    setting: dict[str, Any] = {"model_id": target.model, "num_prompts": len(requests), "burstiness": burstiness}
    measured = setting | {"request_rate": str(request_rate), "max_concurrency": max_concurrency} | measured
    Console().print(*tables(measured))
    if result is not None:
        result.write_text(json.dumps(measured))
    if measured["failed"]:
        Console(stderr=True).print(next(error for error in measured["errors"] if error), markup=False)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
