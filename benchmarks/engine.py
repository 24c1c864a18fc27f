"""The engine alone, in this process, against `transformers` and the machine: decode, a batch, prefill.

    python -m benchmarks.engine --threads 1 --json result.json

Every round runs each measure once with our engine, once with transformers (same weights, threads and prompts of random
ids, greedy, eos ignored), and once reads memory and multiplies matrices, so that noise hits all of them. A figure is
the median over rounds; a ratio is the median of the rounds' ratios, above 1 where our engine is the faster.
"""

from __future__ import annotations

import gc
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from transformers.generation.streamers import BaseStreamer

from tercet.core import SamplingParams
from tercet.engine.engine import Engine, Sampled
from tercet.engine.runner import Runner, kv_layout
from tercet.engine.sequence import Sequence as EngineSequence
from tercet.errors import WorkerLost
from tercet.models.config import ModelConfig
from tercet.models.sources import load_model, locate
from tercet.spec import ModelSpec, RoleSpec
from tercet.transfer.messages import Ticket
from tercet.transfer.region import Region

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
READ_BYTES = 5 << 28  # 1.25 GiB, far more than any cache holds
GEMM_SIZE = 2048

Dtype = Literal["bfloat16", "float32"]
Prompts = Sequence[Sequence[int]]
Samples = dict[str, list[float]]  # one value a round


@dataclass(frozen=True)
class Workload:
    batch: int  # requests at once
    inputs: int  # tokens of each prompt
    outputs: int  # tokens that each gets

    def prompts(self, vocab: int, seed: int) -> list[list[int]]:
        rng = random.Random(seed)
        return [[rng.randrange(vocab) for _ in range(self.inputs)] for _ in range(self.batch)]

    def shrunk(self, by: int) -> Workload:
        return Workload(self.batch, max(1, self.inputs // by), max(2, self.outputs // by))


DECODE, BATCH, PREFILL = "decode", "batch", "prefill"
WORKLOADS = {DECODE: Workload(1, 32, 64), BATCH: Workload(16, 128, 64), PREFILL: Workload(1, 1024, 2)}


@dataclass(frozen=True)
class Outcome:
    first_s: float  # start until the first token
    total_s: float  # start until the last token
    tokens: list[list[int]]  # of each request

    def speed(self, measure: str) -> float:
        """Per second: decoded tokens after the first; output tokens of the whole batch; prompts prefilled."""
        if measure == DECODE:
            return (len(self.tokens[0]) - 1) / (self.total_s - self.first_s)
        return sum(map(len, self.tokens)) / self.total_s if measure == BATCH else 1 / self.first_s


Generate = Callable[[Prompts, int], Outcome]  # all prompts at once, so many tokens for each


class Tercet:
    """Engine and runner as a worker has them, on their own thread, without the wires around them."""

    def __init__(self, spec: ModelSpec, threads: int) -> None:
        loaded, role = load_model(spec), RoleSpec(threads=threads)
        self.config = loaded.config
        region = Region(kv_layout(loaded.model, role.kv.blocks, role.kv.block_size, spec.dtype))
        runner = Runner(loaded.model, region)
        self._engine = Engine(runner, role, self.config.max_context, self.config.eos_token_ids, 1, self._on_sampled)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def generate(self, prompts: Prompts, outputs: int) -> Outcome:
        """Raises WorkerLost if the engine dies of it."""
        params = SamplingParams(max_tokens=outputs, temperature=0.0, ignore_eos=True)
        sequences = [EngineSequence(Ticket(str(i), 0, 0), [*ids], len(ids), params) for i, ids in enumerate(prompts)]
        self._stamps: list[float] = []
        self._left, self._idle = len(sequences), threading.Event()
        start = time.perf_counter()
        for sequence in sequences:
            self._engine.add(sequence)
        self._idle.wait()
        if self._engine.failure is not None:
            raise WorkerLost(f"the engine died: {self._engine.failure!r}") from self._engine.failure
        tokens = [s.token_ids[s.num_prompt :] for s in sequences]
        return Outcome(self._stamps[0] - start, self._stamps[-1] - start, tokens)

    def stop(self) -> None:
        self._engine.stop()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._engine.run()
        finally:
            self._idle.set()

    def _on_sampled(self, sampled: list[Sampled]) -> None:
        if sampled:
            self._stamps.append(time.perf_counter())
            self._left -= sum(item.token.finish is not None for item in sampled)
        if not self._left:
            self._idle.set()


class _Stamps(BaseStreamer):
    """When `generate` took its prompt, and when it had each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


class Transformers:
    """`generate` with a static batch; prompts are of one length, so nothing is padded."""

    def __init__(self, spec: ModelSpec) -> None:
        load: Any = transformers.AutoModelForCausalLM.from_pretrained
        path, whole = locate(spec), transformers.GgufConfig(dequantize=True)
        self._model = load(path.parent, gguf_file=path.name, quantization_config=whole, dtype=spec.dtype).eval()

    def generate(self, prompts: Prompts, outputs: int) -> Outcome:
        ids, stamps = torch.tensor(prompts), _Stamps()
        start = time.perf_counter()
        settings = {"do_sample": False, "max_new_tokens": outputs, "eos_token_id": None, "pad_token_id": 0}
        out = self._model.generate(ids, attention_mask=torch.ones_like(ids), streamer=stamps, **settings)
        tokens = out[:, ids.shape[1] :].tolist()
        return Outcome(stamps.times[1] - start, stamps.times[-1] - start, tokens)


class Limits:
    """What the machine can do: read memory, and multiply square matrices, a bᵀ, as a linear layer does."""

    def __init__(self, shrink: int) -> None:
        self._wide = torch.ones(READ_BYTES // 4 // shrink)
        rows = READ_BYTES // 2 // shrink // 4096
        self._matrix, self._vector = torch.ones(rows, 4096, dtype=torch.bfloat16), torch.ones(4096).bfloat16()
        n = GEMM_SIZE // shrink
        self._flops = 2 * n**3
        self._squares = {kind: torch.rand(n, n).to(getattr(torch, kind)) for kind in get_args(Dtype)}

    def measure(self) -> dict[str, float]:
        """Bytes or FLOPs per second."""
        rates = {
            "read_sum_float32": self._wide.nbytes / _seconds(self._wide.sum),
            "read_matvec_bfloat16": self._matrix.nbytes / _seconds(lambda: self._matrix @ self._vector),
        }
        for kind, square in self._squares.items():
            rates[f"gemm_{kind}"] = self._flops / _seconds(partial(torch.mm, square, square.t()))
        return rates


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Cost:
    """What must be read and computed at least. KV and norms are left out: below 2 % here."""

    decode_bytes: int  # weights read for one token
    prefill_flops: int  # of the prefill workload

    @classmethod
    def of(cls, config: ModelConfig, itemsize: int, prompt: int) -> Cost:
        heads = config.num_heads * config.head_dim
        attention = config.hidden_size * (2 * heads + 2 * config.num_kv_heads * config.head_dim)
        body = config.num_layers * (attention + 3 * config.hidden_size * config.intermediate_size)
        head = config.vocab_size * config.hidden_size
        scores = config.num_layers * 2 * heads * prompt * (prompt + 1) // 2  # causal, q kᵀ and p v
        return cls(itemsize * (body + head), 2 * (body * prompt + scores + head))


def run_rounds(
    ours: Generate, theirs: Generate, workloads: Mapping[str, Workload], limits: Limits, repeats: int, vocab: int
) -> Samples:
    """A sample per round of `MEASURE.tercet`, `MEASURE.transformers` (per second), `MEASURE.same_tokens` and the
    machine's rates. Round 0 warms caches and threads with small workloads and is not kept."""
    samples: Samples = {}
    for number in range(repeats + 1):
        start = time.perf_counter()
        figures = limits.measure()
        for measure, full in workloads.items():
            workload = full if number else full.shrunk(8)
            prompts = workload.prompts(vocab, seed=number)
            figures |= compare(measure, ours(prompts, workload.outputs), theirs(prompts, workload.outputs))
        print(f"round {number} of {repeats}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        for name, value in figures.items() if number else ():
            samples.setdefault(name, []).append(value)
    return samples


def compare(measure: str, ours: Outcome, theirs: Outcome) -> dict[str, float]:
    pairs = [pair for a, b in zip(ours.tokens, theirs.tokens, strict=True) for pair in zip(a, b, strict=True)]
    return {
        f"{measure}.tercet": ours.speed(measure),
        f"{measure}.transformers": theirs.speed(measure),
        f"{measure}.same_tokens": sum(a == b for a, b in pairs) / len(pairs),
    }


def summarise(samples: Samples, cost: Cost) -> dict[str, float]:
    """Medians, ratios, and the shares of the machine's limits that our engine reaches."""
    result = {name: statistics.median(values) for name, values in samples.items()}
    for measure in WORKLOADS:
        pairs = zip(samples[f"{measure}.tercet"], samples[f"{measure}.transformers"], strict=True)
        result[f"{measure}.ratio"] = statistics.median(ours / theirs for ours, theirs in pairs)
    read = max(result["read_sum_float32"], result["read_matvec_bfloat16"])
    gemm = max(result[f"gemm_{kind}"] for kind in get_args(Dtype))
    for measure, limit in (DECODE, read / cost.decode_bytes), (PREFILL, gemm / cost.prefill_flops):
        result[f"{measure}.limit"] = limit
        result[f"{measure}.share_of_limit"] = result[f"{measure}.tercet"] / limit
    return result


def table(result: Mapping[str, float], workloads: Mapping[str, Workload], title: str) -> Table:
    made = Table("median", title=title)
    for column in ("tercet", "transformers", "ratio", "machine", "reached"):
        made.add_column(column, justify="right")
    for measure, w in workloads.items():
        label, unit = {
            DECODE: (f"decode at batch {w.batch}, tokens/s", 1),
            BATCH: (f"{w.batch} requests of {w.inputs} in, {w.outputs} out, output tokens/s", 1),
            PREFILL: (f"prefill of {w.inputs}, tokens/s", w.inputs),
        }[measure]
        ours, theirs = (f"{result[f'{measure}.{name}'] * unit:,.1f}" for name in ("tercet", "transformers"))
        bound = [""] * 2
        if measure != BATCH:
            bound = [f"{result[f'{measure}.limit'] * unit:,.1f}", f"{result[f'{measure}.share_of_limit']:.0%}"]
        made.add_row(label, ours, theirs, f"{result[f'{measure}.ratio']:.2f}", *bound)
    made.add_section()
    for name in (n for n in result if n.startswith(("read_", "gemm_"))):
        unit_name = "GB/s" if name.startswith("read_") else "GFLOPS"
        made.add_row(f"{name.replace('_', ' ')}, {unit_name}", "", "", "", f"{result[name] / 1e9:,.1f}")
    made.add_row("resident, MB", *(f"{result[f'resident_mb.{name}']:,.0f}" for name in ("tercet", "transformers")))
    return made


def resident_mb() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def facts() -> dict[str, Any]:
    """Of machine and software. The commit is marked `-dirty` if the tree has changes."""
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    cpu = {key.strip(): value.strip() for key, _, value in lines}
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return {
        "cpu": cpu.get("model name", "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in FLAGS if flag in cpu.get("flags", "").split()],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit.stdout.strip() or "unknown",
    }


def main(
    threads: Annotated[int, typer.Option(min=1, help="compute threads, of both")] = 1,
    dtype: Annotated[Dtype, typer.Option(help="of the weights")] = "bfloat16",
    rival_dtype: Annotated[Dtype | None, typer.Option(help="of transformers' weights; default: the same")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="rounds")] = 5,
    shrink: Annotated[int, typer.Option(min=1, help="divide every size by this, to try the script out")] = 1,
    result_file: Annotated[Path | None, typer.Option("--json", help="where the JSON goes")] = None,
) -> None:
    """The figures are to be read: none of them makes the command fail."""
    torch.set_num_threads(threads)
    rival_dtype, about = rival_dtype or dtype, facts()
    about |= {"threads": threads, "dtype": dtype, "rival_dtype": rival_dtype, "repeats": repeats}
    workloads = {name: workload.shrunk(shrink) for name, workload in WORKLOADS.items()}
    memory = [resident_mb()]
    ours = Tercet(ModelSpec(dtype=dtype), threads)
    memory.append(resident_mb())
    theirs = Transformers(ModelSpec(dtype=rival_dtype))
    memory.append(resident_mb())
    samples = run_rounds(ours.generate, theirs.generate, workloads, Limits(shrink), repeats, ours.config.vocab_size)
    ours.stop()
    result = summarise(samples, Cost.of(ours.config, getattr(torch, dtype).itemsize, workloads[PREFILL].inputs))
    result |= {"resident_mb.tercet": memory[1] - memory[0], "resident_mb.transformers": memory[2] - memory[1]}
    kinds = dtype if dtype == rival_dtype else f"{dtype} against {rival_dtype}"
    title = f"{kinds}, {threads} of {about['cores']} cores, {about['cpu']}, {about['commit'][:12]}"
    Console().print(table(result, workloads, title))
    if result_file is not None:
        sizes = {name: asdict(workload) for name, workload in workloads.items()}
        result_file.write_text(json.dumps(about | {"workloads": sizes, "result": result, "samples": samples}, indent=1))


if __name__ == "__main__":
    typer.run(main)
