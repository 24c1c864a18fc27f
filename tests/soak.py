"""Minutes of random arrivals, lengths, parameters, aborts, kills and restarts against a served cluster.

    python -m tests.soak --minutes 20        half of it over shm, half over tcp

The cluster is a real one: `tercet serve`, two prefill and two decode workers with a small random model, each in a
process of its own, that are killed, stopped and replaced while requests run. Every answer is compared with what one
engine says alone; where two tokens all but tie, either is right, and counted. It fails on a request that hangs or gives
another token, on a failure that nothing explains, on blocks that are not free at the end, and on memory that grows.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import torch
import yaml

from tercet.core import SamplingParams, Ticket
from tercet.engine.inputs import Arrays, BatchInputs
from tercet.engine.plan import Draw, Piece, StepPlan
from tercet.engine.runner import Runner
from tercet.engine.sampler import sample
from tercet.transfer.memory.region import Region
from tests.engines import SIZE, Running, load_tiny
from tests.tiny import VOCAB, tiny_model

TIMEOUT_S = 60.0  # of a request; nothing here takes as long unless it hangs
GRACE_S = 10.0  # behind its deadline
CLIENTS = 24
WORKERS = 4
WARM_S = 60  # until then a new worker grows: its cache is touched for the first time, its kernels are made
GROWTH_MB = 32  # of a process that is warm
ROUNDING, ROUNDINGS = 1e-5, 200  # of a logit, relative to the largest, in float32; draws that are tried with it
EXPLAINED = {"worker_lost", "no_workers", "overloaded"}  # what kills may do to a request


def spec_of(transport: str, folder: Path, port: int) -> Path:
    role = {"replicas": 2, "pool": "cpu", "cpus": 0.25, "kv": {"blocks": 320}, "scheduler": {"token_budget": 128}}
    spec = {
        "name": f"soak-{transport}",
        "model": {"source": tiny_model(), "dtype": "float32", "served_name": "tiny", "max_context": 2048},
        "topology": "pd",
        "pools": {"cpu": {"accelerator": "cpu"}},
        "roles": {"prefill": role, "decode": role},
        "transfer": {"transport": transport, "lease_s": 4.0, "heartbeat_s": 0.5},
        "gateway": {"http": {"port": port}, "grpc": {"port": 0}},
        "ray": {"address": "local"},
    }
    path = folder / f"{transport}.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


class Served:
    """`tercet serve` in a process group of its own."""

    def __init__(self, transport: str, folder: Path, port: int) -> None:
        self.name, self.url = f"soak-{transport}", f"http://127.0.0.1:{port}"
        self._ready = folder / f"{transport}.ready"
        self.log = folder / f"{transport}.log"
        command = [str(Path(sys.executable).with_name("tercet")), "serve", str(spec_of(transport, folder, port))]
        self.process = subprocess.Popen(
            [*command, "--ready-file", str(self._ready)], stderr=self.log.open("wb"), start_new_session=True
        )

    async def until_ready(self) -> None:
        for _ in range(600):
            if self._ready.exists():
                return
            if self.process.poll() is not None:
                break
            await asyncio.sleep(0.2)
        raise AssertionError(f"the cluster did not come up:\n{self.log.read_text()[-3000:]}")

    def workers(self) -> list[int]:
        return descendants(self.process.pid, "ray::WorkerActor")

    def gateways(self) -> list[int]:
        return descendants(self.process.pid, "ray::GatewayActor")

    def end(self) -> None:
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(60) == 0, self.log.read_text()[-3000:]


@dataclass
class Tally:
    outcomes: Counter[str] = field(default_factory=Counter)
    strikes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # process -> (seconds, MB)

    def grown(self) -> dict[str, float]:
        """MB that a process has grown by since it was warm, if it has lived for as long again."""
        grown = {}
        for process, samples in self.memory.items():
            born, died = samples[0][0], samples[-1][0]
            if died - born >= 2 * WARM_S:
                warm = [mb for at, mb in samples if WARM_S <= at - born < 1.5 * WARM_S]
                late = [mb for at, mb in samples if died - at < 0.5 * WARM_S]
                grown[process] = max(late) - max(warm, default=0.0)
        return grown


class Reference:
    """What one engine says, asked in a thread."""

    def __init__(self) -> None:
        self._loaded = load_tiny()
        self._running = Running(self._loaded, budget=2048, max_running=1)
        self._number = 0
        self._one = asyncio.Lock()

    async def fault(self, prompt: list[int], params: SamplingParams, told: list[int], whole: bool) -> tuple[str, int]:
        """-> (what is wrong with the tokens, or nothing; how often two all but tied and the other one was taken)."""
        if whole and len(told) != params.max_tokens:
            return f"{len(told)} tokens instead of {params.max_tokens}", 0
        at = ties = 0
        while at < len(told):
            expected = await self._tokens(prompt + told[:at], len(prompt), params)
            pairs = zip(told[at:], expected, strict=False)
            other = next((k for k, (got, wanted) in enumerate(pairs) if got != wanted), None)
            if other is None:
                break
            at += other
            if not await asyncio.to_thread(self._ties, prompt, told, at, params):
                return f"token {at} of {told} is not that of {expected}", ties
            at, ties = at + 1, ties + 1
        return "", ties

    async def _tokens(self, ids: list[int], num_prompt: int, params: SamplingParams) -> list[int]:
        async with self._one:
            self._number += 1
            sequence = self._running.add(self._number, ids, params, num_prompt)
            over, tokens = await asyncio.to_thread(self._running.done.get, timeout=60)
            assert over is sequence
            assert isinstance(tokens, list), tokens
            self._running.outputs.clear()
            return tokens

    def _ties(self, prompt: list[int], told: list[int], at: int, params: SamplingParams) -> bool:
        """Whether rounding, as another batch or another cut of the prompt brings it, may give the token told[at]."""
        tokens, draw = prompt + told[:at], Draw(params, at, prompt, told[:at])
        blocks = list(range(-(-len(tokens) // SIZE)))
        runner = Runner(self._loaded.model, Region(self._loaded.model.kv_layout(len(blocks), SIZE)))
        plan, arrays = StepPlan(chunks=[Piece(Ticket("tie", 0, 1), tokens, 0, blocks, draw)]), Arrays()
        inputs = BatchInputs(arrays, plan, SIZE)
        logits = self._loaded.model.forward(inputs.batch(arrays.views(arrays.packed())), runner.kv_cache)
        noise = torch.randn(ROUNDINGS, logits.shape[1], generator=torch.Generator().manual_seed(at))
        rows = logits + ROUNDING * logits.abs().max() * noise
        return told[at] in {event.token_id for event in sample(rows, [draw] * ROUNDINGS)}  # type: ignore[union-attr]


class Soak:
    def __init__(self, served: Served, seconds: float, seed: int, reference: Reference) -> None:
        self.served, self.rng, self.reference = served, random.Random(seed), reference
        self.tally = Tally()
        self._until = time.monotonic() + seconds
        self._http: aiohttp.ClientSession

    async def run(self) -> Tally:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as self._http:
            clients = [asyncio.create_task(self._client()) for _ in range(CLIENTS)]
            others = [asyncio.create_task(self._strike()), asyncio.create_task(self._watch())]
            await asyncio.gather(*clients)
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await self._all_free()
        return self.tally

    # ---- requests

    async def _client(self) -> None:
        while time.monotonic() < self._until:
            await asyncio.sleep(self.rng.expovariate(4.0))
            prompt, params = self._prompt(), self._params()
            if self.rng.random() < 0.2:
                await self._aborted(prompt, params)
            else:
                await self._answered(prompt, params)

    def _prompt(self) -> list[int]:
        length = self.rng.choice([self.rng.randrange(1, 40), self.rng.randrange(1, 300), self.rng.randrange(1, 1500)])
        shared = random.Random(self.rng.randrange(6))  # so that prompts begin alike
        ids = [shared.randrange(VOCAB) for _ in range(length)]
        cut = self.rng.randrange(length)
        return ids[:cut] + [self.rng.randrange(VOCAB) for _ in range(length - cut)]

    def _params(self) -> SamplingParams:
        rng = self.rng
        kinds: list[dict[str, Any]] = [
            {"temperature": 0.0},
            {"temperature": 0.8, "top_p": 0.9},
            {"temperature": 1.2, "top_k": 20, "min_p": 0.02},
            {"temperature": 0.7, "repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.1},
        ]
        return SamplingParams(
            max_tokens=rng.choice([1, 2, 8, 40, 120]), seed=rng.randrange(1000), ignore_eos=True, **rng.choice(kinds)
        )

    def _body(self, prompt: list[int], params: SamplingParams) -> dict[str, Any]:
        names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty")
        fields = {name: getattr(params, name) for name in (*names, "frequency_penalty", "seed", "ignore_eos")}
        return {"prompt": prompt, "stream": True, "return_token_ids": True, "timeout": TIMEOUT_S} | fields

    async def _answered(self, prompt: list[int], params: SamplingParams) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_S + GRACE_S):
                tokens, error = await self._ask(prompt, params)
        except TimeoutError:
            self.tally.wrong.append(f"hangs: {len(prompt)} tokens, {params}")
            return
        self.tally.outcomes[error or "answered"] += 1
        if error is not None and error not in EXPLAINED:
            self.tally.wrong.append(f"{error}: {len(prompt)} tokens, {params}")
        wrong, ties = await self.reference.fault(prompt, params, tokens, whole=error is None)
        self.tally.outcomes["ties"] += ties
        if wrong:
            self.tally.wrong.append(f"other tokens: {wrong}; {len(prompt)} tokens, {params}")

    async def _ask(self, prompt: list[int], params: SamplingParams) -> tuple[list[int], str | None]:
        """-> tokens, and the error's code if it ended in one."""
        tokens: list[int] = []
        try:
            async with self._http.post(
                f"{self.served.url}/v1/completions", json=self._body(prompt, params)
            ) as response:
                if response.status != 200:
                    return [], (await response.json())["error"]["code"]
                async for line in response.content:
                    data = line.strip().removeprefix(b"data: ")
                    if data == b"[DONE]":
                        return tokens, None
                    if data:
                        chunk = json.loads(data)
                        if "error" in chunk:
                            return tokens, chunk["error"]["code"]
                        tokens += [i for choice in chunk["choices"] for i in choice.get("token_ids", ())]
        except aiohttp.ClientError as error:
            return tokens, f"cut: {error!r}"
        return tokens, "cut: the stream ended early"

    async def _aborted(self, prompt: list[int], params: SamplingParams) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.rng.choice([0.01, 0.1, 0.5, 2.0]) * self.rng.random()):
                await self._ask(prompt, params)
        self.tally.outcomes["aborted"] += 1

    # ---- faults

    async def _strike(self) -> None:
        """Kill a worker, or stop it for some seconds; never two at once, since one of each role must be left."""
        while True:
            await asyncio.sleep(self.rng.uniform(4, 16))
            pids = self.served.workers()
            if len(await self._blocks()) < WORKERS or len(pids) < WORKERS:
                continue
            pid, kind = self.rng.choice(pids), self.rng.choice(["kill", "kill", "stop", "long stop"])
            self.tally.strikes[kind] += 1
            with contextlib.suppress(ProcessLookupError):
                if kind == "kill":
                    os.kill(pid, signal.SIGKILL)
                else:
                    os.kill(pid, signal.SIGSTOP)
                    await asyncio.sleep(self.rng.uniform(0.2, 3) if kind == "stop" else 8.0)
                    os.kill(pid, signal.SIGCONT)

    # ---- what is left behind

    async def _watch(self) -> None:
        """Memory of each process; shared memory counts, as the caches are bounded and soon touched."""
        while True:
            named = {pid: f"worker {pid}" for pid in self.served.workers()}
            named |= {pid: f"gateway {pid}" for pid in self.served.gateways()}
            for pid, name in named.items():
                with contextlib.suppress(OSError, StopIteration):
                    self.tally.memory.setdefault(name, []).append((time.monotonic(), rss_mb(pid)))
            await asyncio.sleep(2.0)

    async def _blocks(self) -> dict[str, dict[str, float]]:
        """worker -> state -> KV blocks, of the workers that live."""
        async with self._http.get(f"{self.served.url}/metrics") as response:
            text = await response.text()
        found: dict[str, dict[str, float]] = {}
        for state, worker, count in re.findall(r'tercet_kv_blocks{state="(\w+)",worker="([\w-]+)"} ([\d.]+)', text):
            found.setdefault(worker, {})[state] = float(count)
        return found

    async def _all_free(self) -> None:
        """Every worker lives and reports all its blocks free."""
        found: dict[str, dict[str, float]] = {}
        for _ in range(120):
            found = await self._blocks()
            if len(found) == WORKERS and all(states["free"] == sum(states.values()) for states in found.values()):
                return
            await asyncio.sleep(0.5)
        self.tally.wrong.append(f"not free at the end: {found}")


def descendants(ancestor: int, title: str) -> list[int]:
    """Processes below `ancestor` whose command line begins with `title`."""
    parents, titles = {}, {}
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            pid = int(entry)
            parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            titles[pid] = Path(f"/proc/{pid}/cmdline").read_text()
    found = []
    for pid in (pid for pid, line in titles.items() if line.startswith(title)):
        at = pid
        while at in parents and at != ancestor:
            at = parents[at]
        found += [pid] if at == ancestor else []
    return sorted(found)


def rss_mb(pid: int) -> float:
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS:"))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextlib.contextmanager
def serving(transport: str, folder: Path) -> Iterator[Served]:
    served = Served(transport, folder, free_port())
    try:
        yield served
        served.end()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(served.process.pid, signal.SIGKILL)


async def soak(transport: str, seconds: float, seed: int, folder: Path) -> bool:
    with serving(transport, folder) as served:
        await served.until_ready()
        tally = await Soak(served, seconds, seed, Reference()).run()
    print(f"\n{transport}, {seconds:.0f} s, seed {seed}")
    print(f"  requests  {dict(tally.outcomes)}")
    print(f"  strikes   {dict(tally.strikes)}")
    grown = tally.grown()
    print(f"  memory    grown by MB: {sorted(round(mb, 1) for mb in grown.values())}")
    too_much = [f"{name} has grown by {mb:.0f} MB" for name, mb in grown.items() if mb > GROWTH_MB]
    for line in (*tally.wrong[:20], *too_much):
        print(f"  WRONG     {line[:400]}")
    return not tally.wrong and not too_much and tally.outcomes["answered"] > 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--transports", default="shm,tcp")
    asked = parser.parse_args()
    transports = asked.transports.split(",")
    with tempfile.TemporaryDirectory(prefix="tercet-soak-") as folder:
        share = 60 * asked.minutes / len(transports)
        good = [asyncio.run(soak(name, share, asked.seed + n, Path(folder))) for n, name in enumerate(transports)]
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
