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
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Protocol

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

Prompts = Sequence[Sequence[int]]


class Dtype(StrEnum):
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


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


class Contestant(Protocol):
    def generate(self, prompts: Prompts, outputs: int) -> Outcome:
        """All prompts at once, `outputs` tokens for each."""


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

    def put(self, value: torch.Tensor) -> None:  # noqa: ARG002  # the interface is transformers'
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


class Transformers:
    """`generate` with a static batch; prompts are of one length, so nothing is padded."""

    def __init__(self, spec: ModelSpec) -> None:
        transformers.utils.logging.disable_progress_bar()
        path, dtype = locate(spec, weights=True), getattr(torch, spec.dtype)
        load: Any = transformers.AutoModelForCausalLM.from_pretrained
        if path.suffix == ".gguf":
            whole = transformers.GgufConfig(dequantize=True)
            model = load(path.parent, gguf_file=path.name, quantization_config=whole, dtype=dtype)
        else:
            model = load(path, dtype=dtype)
        self._model = model.eval()

    def generate(self, prompts: Prompts, outputs: int) -> Outcome:
        ids, stamps = torch.tensor(prompts), _Stamps()
        start = time.perf_counter()
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=outputs,
            eos_token_id=None,
            pad_token_id=0,
            streamer=stamps,
        )
        tokens = out[:, ids.shape[1] :].tolist()
        return Outcome(stamps.times[1] - start, stamps.times[-1] - start, tokens)


class Limits:
    """What the machine can do: read memory, and multiply square matrices."""

    def __init__(self, shrink: int) -> None:
        self._wide = torch.ones(READ_BYTES // 4 // shrink)
        rows = READ_BYTES // 2 // shrink // 4096
        self._matrix, self._vector = torch.ones(rows, 4096, dtype=torch.bfloat16), torch.ones(4096).bfloat16()
        n = GEMM_SIZE // shrink
        self._flops = 2 * n**3
        self._squares = {kind: torch.rand(n, n).to(getattr(torch, kind)) for kind in Dtype}

    def measure(self) -> dict[str, float]:
        """Bytes or FLOPs per second."""
        rates = {
            "read_sum_float32": self._wide.nbytes / _seconds(self._wide.sum),
            "read_matvec_bfloat16": self._matrix.nbytes / _seconds(lambda: self._matrix @ self._vector),
        }
        for kind, square in self._squares.items():
            rates[f"gemm_{kind}"] = self._flops / _seconds(lambda a=square: torch.mm(a, a))
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


Samples = dict[str, list[float]]


def run_rounds(
    ours: Contestant, theirs: Contestant, workloads: Mapping[str, Workload], limits: Limits, repeats: int, vocab: int
) -> Samples:
    """-> `MEASURE.tercet`, `MEASURE.transformers` (per second), `MEASURE.same_tokens` and rates of the machine, a
    sample for each round. One round more, which warms caches and threads with small workloads, is not kept."""
    samples: Samples = {}
    console = Console(stderr=True)
    for number in range(repeats + 1):
        warming, start = number == 0, time.perf_counter()
        figures = limits.measure()
        for measure, workload in workloads.items():
            sized = workload.shrunk(8) if warming else workload
            figures |= _compare(measure, sized, ours, theirs, vocab, number)
        console.print(
            f"{'warm-up' if warming else f'round {number} of {repeats}'}: {time.perf_counter() - start:.0f} s"
        )
        for name, value in figures.items() if not warming else ():
            samples.setdefault(name, []).append(value)
    return samples


def _compare(
    measure: str, workload: Workload, ours: Contestant, theirs: Contestant, vocab: int, seed: int
) -> dict[str, float]:
    prompts = workload.prompts(vocab, seed)
    mine, other = (contestant.generate(prompts, workload.outputs) for contestant in (ours, theirs))
    pairs = [pair for a, b in zip(mine.tokens, other.tokens, strict=True) for pair in zip(a, b, strict=True)]
    return {
        f"{measure}.tercet": mine.speed(measure),
        f"{measure}.transformers": other.speed(measure),
        f"{measure}.same_tokens": sum(a == b for a, b in pairs) / len(pairs),
    }


def summarise(samples: Samples, cost: Cost) -> dict[str, float]:
    """Medians, ratios, and the shares of the machine's limits that our engine reaches."""
    result = {name: statistics.median(values) for name, values in samples.items()}
    for measure in WORKLOADS:
        pairs = zip(samples[f"{measure}.tercet"], samples[f"{measure}.transformers"], strict=True)
        result[f"{measure}.ratio"] = statistics.median(ours / theirs for ours, theirs in pairs)
    read = max(result["read_sum_float32"], result["read_matvec_bfloat16"])
    gemm = max(result[f"gemm_{kind}"] for kind in Dtype)
    result["decode.limit"], result["prefill.limit"] = read / cost.decode_bytes, gemm / cost.prefill_flops
    for measure in (DECODE, PREFILL):
        result[f"{measure}.share_of_limit"] = result[f"{measure}.tercet"] / result[f"{measure}.limit"]
    return result


def table(result: Mapping[str, float], workloads: Mapping[str, Workload], title: str) -> Table:
    made = Table(title=title)
    for column in ("median", "tercet", "transformers", "ratio", "machine", "reached"):
        made.add_column(column, justify="left" if column == "median" else "right")
    batch, prompt = workloads[BATCH], workloads[PREFILL].inputs
    labels = {
        DECODE: "decode at batch 1, tokens/s",
        BATCH: f"{batch.batch} requests of {batch.inputs} in, {batch.outputs} out, output tokens/s",
        PREFILL: f"prefill of {prompt}, input tokens/s",
    }
    for measure, label in labels.items():
        unit = prompt if measure == PREFILL else 1
        speeds = [result.get(f"{measure}.{key}", 0.0) * unit for key in ("tercet", "transformers", "limit")]
        ours, theirs, limit = (f"{value:,.1f}" if value else "" for value in speeds)
        share = result.get(f"{measure}.share_of_limit")
        ratio = f"{result[f'{measure}.ratio']:.2f}"
        made.add_row(label, ours, theirs, ratio, limit, f"{share:.0%}" if share is not None else "")
    made.add_section()
    for name, value in result.items():
        if name.startswith(("read_", "gemm_")):
            unit = "GB/s" if name.startswith("read_") else "GFLOPS"
            made.add_row(f"{name.replace('_', ' ')}, {unit}", "", "", "", f"{value / 1e9:,.1f}")
    made.add_section()
    made.add_row("resident, MB", *(f"{result[f'resident_mb.{name}']:,.0f}" for name in ("tercet", "transformers")))
    return made


def machine() -> dict[str, Any]:
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    cpu = {key.strip(): value.strip() for key, _, value in lines}
    flags = cpu.get("flags", "").split()
    return {
        "cpu": cpu.get("model name", "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in FLAGS if flag in flags],
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }


def git_commit() -> str:
    """With `-dirty` if the tree has changes; `unknown` outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    root = Path(__file__).parent
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def resident_mb() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main(
    threads: Annotated[int, typer.Option(min=1, help="compute threads, of both")] = 1,
    dtype: Annotated[Dtype, typer.Option(help="of the weights")] = Dtype.BFLOAT16,
    rival_dtype: Annotated[Dtype | None, typer.Option(help="of transformers' weights; default: the same")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="rounds")] = 5,
    shrink: Annotated[int, typer.Option(min=1, help="divide every size by this, to try the script out")] = 1,
    source: Annotated[str, typer.Option(help="of the model, as in a spec")] = ModelSpec().source,
    result_file: Annotated[Path | None, typer.Option("--json", help="where the JSON goes")] = None,
) -> None:
    """Exit code 0 whatever the figures are: they are read, not judged."""
    torch.set_num_threads(threads)
    workloads = {name: workload.shrunk(shrink) for name, workload in WORKLOADS.items()}
    before = resident_mb()
    ours = Tercet(ModelSpec(source=source, dtype=dtype.value), threads)
    with_ours = resident_mb()
    theirs = Transformers(ModelSpec(source=source, dtype=(rival_dtype or dtype).value))
    resident = {"resident_mb.tercet": with_ours - before, "resident_mb.transformers": resident_mb() - with_ours}
    samples = run_rounds(ours, theirs, workloads, Limits(shrink), repeats, ours.config.vocab_size)
    ours.stop()
    cost = Cost.of(ours.config, getattr(torch, dtype).itemsize, workloads[PREFILL].inputs)
    result = summarise(samples, cost) | resident
    setting = {"threads": threads, "dtype": dtype, "rival_dtype": rival_dtype or dtype, "repeats": repeats}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "commit": git_commit()}
    host = machine()
    title = f"{dtype}, {threads} of {host['cores']} cores, {host['cpu']} ({', '.join(host['flags'])})"
    Console().print(table(result, workloads, title))
    if result_file is not None:
        sizes = {name: asdict(workload) for name, workload in workloads.items()}
        facts = {"setting": setting, "machine": host, "versions": versions, "workloads": sizes, "cost": asdict(cost)}
        result_file.write_text(json.dumps(facts | {"result": result, "samples": samples}, indent=1))


if __name__ == "__main__":
    typer.run(main)
