"""Experts that move while a cluster serves, in one run: policies `none`, `eplb` and `ilp`, and `shares`, which is ilp
with shares of replicas in place of turns, on two ranks, a core each.

    python -m benchmarks.placement_live --rounds 5 --result placement_live.json
    python -m benchmarks.placement_live --at-once 8 --inputs 4 --outputs 64         small batches, decode all but alone

Starts four clusters (`tercet serve`) of a mixture with random weights whose routing is skewed, and differs between two
kinds of text. Each policy first adapts to one kind, then all are measured in turn, round by round, so that noise hits
them alike; an idle cluster takes no core. Then the text changes. Every answer is compared with the first one to its
prompt, from whatever cluster, before, while and after experts moved.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import aiohttp
import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from benchmarks import progress
from benchmarks.groups_models import qwen3_moe
from benchmarks.machine import facts
from benchmarks.topologies import serve_command
from examples.make_tiny_model import save_byte_tokenizer

INTERVALS = {"window_size": 30, "step_interval": 90}
PLACEMENTS: dict[str, dict[str, Any]] = {
    **{policy: {"policy": policy, **INTERVALS} for policy in ("none", "eplb", "ilp")},
    "shares": {"policy": "ilp", "dispatch_interval": 60, **INTERVALS},
}
POLICIES = tuple(PLACEMENTS)
PORTS = {policy: 18500 + 10 * number for number, policy in enumerate(POLICIES)}
TOPICS = {"first": range(400, 4200), "second": range(4300, 8100)}  # ids of tokens
PULL, SPREAD = 0.05, 1.4  # of a topic's tokens in one direction; of what routers make of it
RANKS, PROMPTS = range(2), 24
START_S, CALM_S = 180.0, 15.0  # calm: since something was solved or moved
Figures = dict[str, float]
Longs = NDArray[np.int64]


def save_model(directory: Path) -> None:
    """Tokens of a topic share a direction, which each router answers to: the busiest of 32 experts gets several times
    its share, as published of trained mixtures (benchmarks/placement_load.py), and others on another topic."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(qwen3_moe())
    directions = torch.linalg.qr(torch.randn(model.config.hidden_size, len(TOPICS)))[0].T
    with torch.no_grad():
        for direction, ids in zip(directions, TOPICS.values(), strict=True):
            model.model.embed_tokens.weight[ids.start : ids.stop] += PULL * direction * len(direction) ** 0.5
            for layer in model.model.layers:
                layer.mlp.gate.weight += SPREAD * torch.randn(len(layer.mlp.gate.weight), 1) * direction
    model.bfloat16().save_pretrained(directory)
    save_byte_tokenizer(directory)


def serve(policy: str, model: Path, spec: Path) -> subprocess.Popen[bytes]:
    wanted: dict[str, Any] = {
        "model": {"source": str(model), "dtype": "bfloat16", "max_context": 1024},
        "topology": "aggregated",
        "pools": {"cpu": {"accelerator": "cpu"}},
        "roles": {
            "aggregated": {
                "pool": "cpu",
                "cpus": 0.25,
                "cpu_affinity": [0, 1],
                "parallelism": {"data": 2, "expert": 2, "expert_redundancy": 4},
                "expert_placement": PLACEMENTS[policy],
            }
        },
    }
    spec.write_text(json.dumps(wanted))
    return subprocess.Popen(serve_command(policy, PORTS[policy], str(spec), []))


def metrics(policy: str) -> Figures:
    """Series of the expert placement, and tokens; those of ranks and experts under their labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{PORTS[policy]}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = re.findall(r"^tercet_(\w+?)(?:_total)?(?:\{([^}]*)\})? (\S+)$", text, re.MULTILINE)
    keys = {"rank": r'rank="(\d+)"', "expert": r'expert="(\d+)"', "outcome": r'outcome="(\w+)"'}
    made: Figures = {}
    for name, labels, value in found:
        label = "".join(f" {m[1]}" for pattern in keys.values() if (m := re.search(pattern, labels)))
        made[f"{name}{label}"] = float(value)
    return made


class Work(NamedTuple):
    at_once: int  # requests, over both ranks
    inputs: int  # tokens of the longest prompt; the shortest has a quarter
    outputs: int


class Load:
    """Closed loops of streamed requests with prompts of one topic, of which there are a few, asked again and again."""

    def __init__(self, policy: str, topic: str, work: Work, answers: dict[str, list[int]]) -> None:
        """answers: prompt -> the first answer to it from anywhere."""
        self._url, self._work, self._answers = f"http://127.0.0.1:{PORTS[policy]}", work, answers
        rng, ids = np.random.default_rng([*TOPICS].index(topic)), TOPICS[topic]
        lengths = rng.integers(work.inputs // 4, work.inputs + 1, PROMPTS)
        self._prompts = [rng.integers(ids.start, ids.stop, length).tolist() for length in lengths]
        self.gaps: list[tuple[float, float]] = []  # between tokens of a request: time.monotonic(), seconds
        self.ttfts: list[float] = []
        self.tokens = self.requests = self.others = 0  # others: answers that were not the first one again

    async def run(self, until: asyncio.Event) -> None:
        async with aiohttp.ClientSession(self._url, timeout=aiohttp.ClientTimeout(120)) as session:
            await asyncio.gather(*(self._client(session, number, until) for number in range(self._work.at_once)))

    async def _client(self, session: aiohttp.ClientSession, number: int, until: asyncio.Event) -> None:
        while not until.is_set():
            await self._ask(session, self._prompts[number % PROMPTS])
            number += 7

    async def _ask(self, session: aiohttp.ClientSession, prompt: list[int]) -> None:
        sampling = {"max_tokens": self._work.outputs, "temperature": 0, "ignore_eos": True}
        body = {"prompt": prompt, "stream": True, "return_token_ids": True, **sampling}
        sent, last, answer = time.monotonic(), 0.0, list[int]()
        async with session.post("/v1/completions", json=body) as response:
            if response.status != 200:
                raise SystemExit(f"HTTP {response.status}: {await response.text()}")
            async for line in response.content:
                data = line.strip().removeprefix(b"data: ")
                if not data or data == b"[DONE]":
                    continue
                chunk, now = json.loads(data), time.monotonic()
                if "error" in chunk:
                    raise SystemExit(f"a request failed: {chunk['error']['message']}")
                if not (tokens := chunk["choices"][0]["token_ids"]):
                    continue
                if last:
                    self.gaps.append((now, now - last))
                else:
                    self.ttfts.append(now - sent)
                last = now
                answer += tokens
        if len(answer) != self._work.outputs:
            raise SystemExit(f"an answer has {len(answer)} tokens of {self._work.outputs}")
        self.tokens, self.requests = self.tokens + len(answer), self.requests + 1
        self.others += self._answers.setdefault(str(prompt), answer) != answer


async def segment(policy: str, topic: str, work: Work, answers: dict[str, list[int]], seconds: float) -> Figures:
    """One turn of a policy, which has adapted. Milliseconds; rows and bytes of all ranks."""
    load, before, computed = Load(policy, topic, work, answers), metrics(policy), rows_of(policy)
    over, began = asyncio.Event(), time.monotonic()
    asyncio.get_running_loop().call_later(seconds, over.set)
    await load.run(over)
    took, after = time.monotonic() - began, await settled(policy)
    rows = rows_of(policy) - computed
    sent = sum(after[f"expert_sent_bytes {rank}"] - before[f"expert_sent_bytes {rank}"] for rank in RANKS)
    experts = [after[f"expert_rows {expert}"] - before[f"expert_rows {expert}"] for expert in range(32)]
    gaps = [1e3 * gap for _, gap in load.gaps]
    return {
        "tokens_s": load.tokens / took,
        "ttft_ms": 1e3 * statistics.median(load.ttfts),
        "itl_ms": statistics.median(gaps),
        "itl_p99_ms": float(np.percentile(gaps, 99)),
        "busiest_over_mean": rows.max(axis=1).sum() / rows.mean(axis=1).sum(),
        "bytes_row": sent / rows.sum(),
        "top_expert": max(experts) / statistics.mean(experts),
        "requests": load.requests,
        "other_answers": load.others,
        "epochs": after["expert_placement_epoch"] - before["expert_placement_epoch"],
    }


def rows_of(policy: str) -> Longs:
    """-> [layers, ranks] so far."""
    tercet = serve_command(policy, PORTS[policy], "", [])[0]
    command = [tercet, "experts", "show", "--json", "--name", f"bench-{policy}"]
    (found,) = json.loads(subprocess.run(command, capture_output=True, check=True).stdout).values()
    return np.array(found["rows"])


async def settled(policy: str) -> Figures:
    """What ranks tell once a second has come."""
    await asyncio.sleep(2.5)
    return metrics(policy)


async def adapt(policy: str, topic: str, work: Work, answers: dict[str, list[int]], limit_s: float) -> Figures:
    """Load it until its placement suits the topic, or the limit. -> what that was like."""
    load, before, over, began = Load(policy, topic, work, answers), metrics(policy), asyncio.Event(), time.monotonic()
    moved: list[float] = []  # when an epoch was seen to have grown

    async def watch() -> None:
        epoch, changed, solves = before["expert_placement_epoch"], began, sum_of(before, "expert_solves")
        while time.monotonic() - began < limit_s and (changed == began or time.monotonic() - changed < CALM_S):
            await asyncio.sleep(0.25)
            now = metrics(policy)
            if now["expert_placement_epoch"] > epoch:
                epoch, changed = now["expert_placement_epoch"], time.monotonic()
                moved.append(changed)
            if sum_of(now, "expert_solves") > solves:
                solves, changed = sum_of(now, "expert_solves"), time.monotonic()
        over.set()

    await asyncio.gather(load.run(over), watch())
    after = metrics(policy)
    near = [1e3 * gap for at, gap in load.gaps if any(abs(at - move) < 1.0 for move in moved)]
    else_ = [1e3 * gap for at, gap in load.gaps if all(abs(at - move) >= 1.0 for move in moved)]
    return {
        "seconds": time.monotonic() - began,
        "requests": load.requests,
        "other_answers": load.others,
        "moves": sum_of(after, "expert_moves") - sum_of(before, "expert_moves"),
        "failed": after["expert_moves failed"],
        "epochs": after["expert_placement_epoch"] - before["expert_placement_epoch"],
        "moved_bytes": after["expert_moved_bytes"] - before["expert_moved_bytes"],
        "solve_s": after.get("expert_solve_seconds", 0.0),
        "gain_foretold": after.get("expert_placement_gain", 0.0),
        "pause_ms": 1e3 * after["expert_move_pause_seconds"],
        "itl_near_moves_ms": statistics.median(near) if near else 0.0,
        "itl_else_ms": statistics.median(else_),
        "itl_max_near_moves_ms": max(near, default=0.0),
        "itl_max_else_ms": max(else_),
    }


def sum_of(found: Mapping[str, float], name: str) -> float:
    return sum(value for key, value in found.items() if key.split()[0] == name)


async def measure(policies: Sequence[str], rounds: int, work: Work, seconds: float, adapt_s: float) -> dict[str, Any]:
    answers: dict[str, list[int]] = {}
    found: dict[str, Any] = {}
    for topic in TOPICS:
        adapted = {
            policy: await adapt(policy, topic, work, answers, adapt_s) for policy in policies if policy != "none"
        }
        turns: dict[str, list[Figures]] = {policy: [] for policy in policies}
        for number in progress.rounds(range(rounds + 1), f"rounds of the topic {topic}"):
            for policy in policies:
                figures = await segment(policy, topic, work, answers, seconds)
                if number:  # round 0 warms up
                    turns[policy].append(figures)
        found[topic] = {"adapting": adapted, "rounds": turns}
    return found


def show(found: Mapping[str, Any]) -> None:
    for topic, its in found.items():
        first, *others = its["rounds"]
        table = Table("", first, *others, *(f"{policy} / {first}" for policy in others), title=f"{topic} topic")
        for key in its["rounds"][first][0]:
            values = {policy: statistics.median(turn[key] for turn in turns) for policy, turns in its["rounds"].items()}
            ratios = [f"{values[policy] / values[first]:.3f}" if values[first] else "" for policy in others]
            table.add_row(key, *(f"{value:,.3f}" for value in values.values()), *ratios)
        for key in next(iter(its["adapting"].values()), {}):
            adapted = (its["adapting"].get(policy, {}).get(key) for policy in its["rounds"])
            table.add_row(f"adapting: {key}", *("" if value is None else f"{value:,.3f}" for value in adapted))
        Console(width=110).print(table)


def wait_until_ready(policy: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORTS[policy]}/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.3)
    raise SystemExit(f"the cluster of policy {policy} did not become ready")


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Of which medians are taken.")] = 5,
    at_once: Annotated[int, typer.Option(min=1, help="Requests at once, over both ranks.")] = 16,
    inputs: Annotated[int, typer.Option(min=4, help="Tokens of the longest prompt; the shortest has a quarter.")] = 256,
    outputs: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 32,
    seconds: Annotated[float, typer.Option(min=0.5, help="Of a turn.")] = 6.0,
    policies: Annotated[
        str, typer.Option(help="Some of none, eplb, ilp and shares; the others are compared with the first.")
    ] = ",".join(POLICIES),
    adapt_s: Annotated[float, typer.Option(min=0.5, help="For a policy to adapt to a topic, at most.")] = 60.0,
    result: Annotated[Path | None, typer.Option(help="Write all figures as JSON here.")] = None,
) -> None:
    work, chosen = Work(at_once, inputs, outputs), policies.split(",")
    if unknown := {*chosen} - {*POLICIES}:
        raise SystemExit(f"--policies: {sorted(unknown)} are none of {', '.join(POLICIES)}")
    with tempfile.TemporaryDirectory(prefix="tercet-placement-") as folder:
        save_model(Path(folder) / "model")
        served: dict[str, subprocess.Popen[bytes]] = {}
        try:
            for policy in chosen:
                served[policy] = serve(policy, Path(folder) / "model", Path(folder) / f"{policy}.yaml")
                wait_until_ready(policy, served[policy])
            found = asyncio.run(measure(chosen, rounds, work, seconds, adapt_s))
        finally:
            for process in served.values():
                process.send_signal(signal.SIGINT)
            for process in served.values():
                process.wait(60)
    show(found)
    told = {"machine": facts(), "work": work._asdict(), "seconds": seconds, "topics": found}
    if result is not None:
        result.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    typer.run(main)
