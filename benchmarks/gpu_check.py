"""Whether this machine's GPU gives the right tokens, and how long its steps take; in under five minutes.

    python -m benchmarks.gpu_check --result gpu.json

Prefill and decode workers, each a process of its own, on every combination of GPU and CPU, over TCP and shared memory;
their greedy tokens are compared with those of transformers on the CPU. The model is small, random and in float32, so
that both must choose the same tokens. Then the steps of a larger random model are timed on the GPU, in bfloat16. All
of it with torch's kernels, and again with Triton's where those can be used.

Needs no Ray and no network. `make gpu-wheels` fetches what is missing on a machine with Python 3.12, torch and
transformers; `make gpu-check`, there, installs it beside this repository and runs this.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tercet.core import GenerateRequest, Role, SamplingParams, Ticket, TokenEvent, WorkerInfo
from tercet.devices import DEVICES
from tercet.engine.plan import Draw, Piece, StepPlan
from tercet.engine.runner import Runner
from tercet.errors import UnsupportedSpec
from tercet.kernels.kinds import Kernels
from tercet.kernels.triton import trial
from tercet.models.sources import load_model
from tercet.roles.router.router import Router
from tercet.roles.worker import Worker
from tercet.spec import ClusterSpec, ModelSpec
from tercet.transfer.memory.region import Region

Kind = Literal["cpu", "gpu"]
OnGpu = Literal["torch", "triton"]  # kernels

SECRET = "gpu-check"  # noqa: S105  # all sides run here
VOCAB, OUTPUTS, START_S, ANSWER_S = 512, 16, 240.0, 180.0  # the first of each kind compiles its kernels
LENGTHS = (1, 15, 16, 17, 63, 64, 65, 200, 333, 512, 513, 700)
ROUNDS = 7  # of each timed step, behind two that warm up
BLOCK, BLOCKS = 16, 1024
GREEDY = SamplingParams(max_tokens=OUTPUTS, temperature=0.0, ignore_eos=True)


def save_model(directory: Path, hidden: int, layers: int, vocab: int) -> str:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 192),
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.2 if vocab == VOCAB else 0.02,  # so that no two tokens all but tie where they are compared
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return str(directory)


# ---- tokens


def spec_of(source: str, prefill: Kind, decode: Kind, transport: str, kernels: OnGpu) -> ClusterSpec:
    def role(kind: Kind) -> dict[str, object]:
        on_gpu = kind == "gpu"
        role = {"pool": kind, "gpus": int(on_gpu), "kernels": kernels if on_gpu else "auto"}
        return role | {"kv": {"blocks": 512}, "scheduler": {"token_budget": 256}}

    return ClusterSpec.model_validate(
        {
            "model": {"source": source, "dtype": "float32", "max_context": 1024},
            "pools": {"cpu": {}, "gpu": {"accelerator": "gpu", "gpus": 2}},
            "roles": {Role.PREFILL: role(prefill), Role.DECODE: role(decode)},
            "transfer": {"transport": transport},
        }
    )


async def serve_worker(role: Role) -> None:
    """A worker's process: the spec comes on stdin, its info goes out on stdout; it ends with stdin."""
    loop = asyncio.get_running_loop()
    spec = ClusterSpec.model_validate_json(sys.stdin.readline(), strict=False)
    worker = Worker(f"{role}-0", role, 1, spec, "127.0.0.1", SECRET)
    print("info", json.dumps(asdict(await worker.start())), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    await worker.stop()


class WorkerProcess:
    def __init__(self, role: Role, spec: ClusterSpec) -> None:
        self._role, self._spec = role, spec

    async def __aenter__(self) -> WorkerInfo:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", __spec__.name, "--worker", self._role, stdin=-1, stdout=-1
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(self._spec.model_dump_json().encode() + b"\n")
        async with asyncio.timeout(START_S):
            async for line in self._process.stdout:
                if line.startswith(b"info "):
                    info = json.loads(line.removeprefix(b"info "))
                    return WorkerInfo(**info | {"role": self._role})
        raise RuntimeError(f"the {self._role} worker ended before it was up; see its words above")

    async def __aexit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(20.0):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


async def tokens_of(router: Router, prompt: list[int]) -> list[int]:
    request = GenerateRequest(f"r{len(prompt)}", tuple(prompt), GREEDY, time.monotonic() + ANSWER_S)
    return [event.token_id async for event in router.generate(request) if isinstance(event, TokenEvent)]


async def cluster_tokens(spec: ClusterSpec, prompts: list[list[int]]) -> list[list[int]]:
    """All at once, then again from what the prefix caches hold."""
    async with AsyncExitStack() as stack:
        # Prefill last: who sends ends first.
        started = [stack.enter_async_context(WorkerProcess(role, spec)) for role in reversed(spec.roles)]
        router = Router(spec, SECRET)
        await router.set_workers([await worker for worker in started])
        stack.push_async_callback(router.close)
        first = await asyncio.gather(*(tokens_of(router, prompt) for prompt in prompts))
        again = await asyncio.gather(*(tokens_of(router, prompt) for prompt in prompts))
    assert first == again, "cached prefixes change the tokens"
    return first


def reference_tokens(source: str, prompts: list[list[int]]) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    made = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=OUTPUTS, do_sample=False, pad_token_id=0
        )
        made.append(out[0, len(prompt) :].tolist())
    return made


def combinations(device: Kind, kernels: list[OnGpu]) -> list[tuple[Kind, Kind, str, OnGpu]]:
    """Prefill, decode, transport, the GPU's kernels. What a transport carries does not depend on the kernels, so only
    torch's go over both."""
    if device == "cpu":
        return [("cpu", "cpu", "tcp", "torch")]
    kinds: tuple[Kind, ...] = ("cpu", "gpu")
    pairs = [(prefill, decode) for prefill in kinds for decode in kinds]
    by_torch = [(*pair, transport, kernels[0]) for pair in pairs for transport in ("tcp", "shm")]
    return by_torch + [(*pair, "tcp", kind) for kind in kernels[1:] for pair in pairs if "gpu" in pair]


def compare(device: Kind, kernels: list[OnGpu], console: Console) -> list[dict[str, object]]:
    rng = random.Random(5)
    prompts = [[rng.randrange(VOCAB) for _ in range(n)] for n in LENGTHS]
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        source = save_model(Path(directory), 192, 4, VOCAB)
        expected = reference_tokens(source, prompts)
        for prefill, decode, transport, kind in combinations(device, kernels):
            got = asyncio.run(cluster_tokens(spec_of(source, prefill, decode, transport, kind), prompts))
            wrong = [len(p) for p, ours, theirs in zip(prompts, got, expected, strict=True) if ours != theirs]
            where = {"prefill": prefill, "decode": decode, "transport": transport}
            if "gpu" in (prefill, decode):
                where["kernels"] = kind
            rows.append({**where, "wrong": wrong})
            said = f"[red]other tokens at the lengths {wrong}" if wrong else "the tokens of transformers"
            console.print(f"{', '.join(f'{name} {value}' for name, value in where.items())}: {said}")
    return rows


# ---- times


def piece(number: int, start: int, length: int) -> Piece:
    """`length` tokens behind `start` others, whose KV may hold anything."""
    per = -(-(start + length) // BLOCK)
    blocks = range(number * per, (number + 1) * per)
    return Piece(Ticket(str(number), 0, 1), [7] * length, start, tuple(blocks), Draw(GREEDY, 0))


STEPS = {
    "decode, batch 1, 512 in the cache": StepPlan(decodes=(piece(0, 512, 1),)),
    "decode, batch 16, 512 in the cache": StepPlan(decodes=tuple(piece(n, 512, 1) for n in range(16))),
    "prefill of 512": StepPlan(chunks=(piece(0, 0, 512),)),
}


def median_s(step: Callable[[], object]) -> float:
    times = []
    for _ in range(2 + ROUNDS):
        start = time.perf_counter()
        step()  # tokens are drawn on the host, so it ends with the device's work
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def time_steps(device: Kind, kernels: list[OnGpu], hidden: int, layers: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each step with each kind of kernels, medians."""
    times = {}
    with tempfile.TemporaryDirectory() as directory:
        source = save_model(Path(directory), hidden, layers, 32000)
        for kind in kernels:
            chosen = Kernels(kind, DEVICES[device].torch_device())
            model = load_model(ModelSpec(source=source, dtype="bfloat16"), chosen).model
            runner = Runner(model, Region(model.kv_layout(BLOCKS, BLOCK)))
            times[kind] = {
                name: 1e3 * median_s(lambda plan=plan, run=runner.run: run(plan))  # type: ignore[misc]  # bound early
                for name, plan in STEPS.items()
            }
    return times


def kernels_of(device: Kind, console: Console) -> list[OnGpu]:
    """What is compared: torch's first, then Triton's, if they can be used here."""
    if device == "cpu":
        return ["torch"]
    reason = trial.missing(DEVICES[device].torch_device())
    if reason is not None:
        console.print(f"[red]no Triton kernels: {reason}")
        return ["torch"]
    return ["torch", "triton"]


def told(times: dict[str, dict[str, float]], title: str) -> Table:
    table = Table("step", *(f"{kind}, ms" for kind in times), title=title)
    for name in STEPS:
        table.add_row(name, *(f"{of_kind[name]:.2f}" for of_kind in times.values()))
    return table


def machine(device: Kind) -> dict[str, Any]:
    name = torch.cuda.get_device_name(0) if device == "gpu" else platform.processor() or platform.machine()
    return {"device": name, "torch": torch.__version__, "python": platform.python_version(), "cores": os.cpu_count()}


def main(
    device: Annotated[str, typer.Option(help="gpu, or cpu to try the script itself.")] = "gpu",
    hidden: Annotated[int, typer.Option(help="Hidden size of the model that is timed; a multiple of 64.")] = 2048,
    layers: int = 16,
    result: Annotated[Path | None, typer.Option(help="Write everything here, as JSON.")] = None,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    if worker is not None:
        asyncio.run(serve_worker(Role(worker)))
        return
    kind: Kind = "cpu" if device == "cpu" else "gpu"
    console = Console()
    try:
        DEVICES[kind].torch_device()
    except UnsupportedSpec as error:
        console.print(f"[red]{error}")
        raise typer.Exit(2) from error
    began = time.monotonic()
    where = machine(kind)
    console.print(", ".join(f"{name} {value}" for name, value in where.items()))
    kernels = kernels_of(kind, console)
    rows = compare(kind, kernels, console)
    times = time_steps(kind, kernels, hidden, layers)
    console.print(told(times, f"{layers} layers of {hidden}, bfloat16, medians of {ROUNDS}"))
    console.print(f"{time.monotonic() - began:.0f} s in all")
    if result is not None:
        result.write_text(json.dumps({"machine": where, "tokens": rows, "step_ms": times}, indent=1))
    if any(row["wrong"] for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
