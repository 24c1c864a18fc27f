"""The engine alone, in this process, against a rival and the machine: decode, a batch, prefill.

    python -m benchmarks.engine --threads 1 --json result.json

The rival is `transformers`, or our engine with torch's kernels (`--rival torch`).
Every round runs each measure once with our engine, once with the rival (same weights, threads and prompts of random
ids, greedy, eos ignored), and once reads memory and multiplies matrices, so that noise hits all of them. Each figure,
ratios too, is the median of the rounds' figures; a ratio above 1 says that our engine is the faster.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from transformers.generation.streamers import BaseStreamer

from benchmarks import progress
from benchmarks.machine import DECODE, PREFILL, RATES, Cost, Figures, Machine, facts, resident_mb
from tercet.core import SamplingParams, Ticket
from tercet.engine.executor import Executor, LocalExecutor
from tercet.engine.loop import Engine
from tercet.engine.report import Sampled
from tercet.engine.runner import Runner
from tercet.engine.sequence import Sequence as EngineSequence
from tercet.errors import WorkerLost
from tercet.kernels.kinds import choose_kernels
from tercet.models.config import ModelConfig
from tercet.models.sources import load_model, locate
from tercet.spec import ModelSpec, RoleSpec
from tercet.transfer.memory.region import Region

COLUMNS = (("tercet", ",.1f"), ("rival", ",.1f"), ("ratio", ".2f"), ("machine", ",.1f"), ("reached", ".0%"))

Dtype = Literal["bfloat16", "float32"]
Ours = Literal["bfloat16", "float32", "gguf"]
Wanted = Literal["auto", "native", "torch"]
Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Workload:
    batch: int  # requests at once
    inputs: int  # tokens of each prompt
    outputs: int  # tokens that each gets

    def prompts(self, vocab: int, seed: int) -> Prompts:
        rng = random.Random(seed)
        return [[rng.randrange(vocab) for _ in range(self.inputs)] for _ in range(self.batch)]

    def shrunk(self, by: int) -> Workload:
        return Workload(self.batch, max(1, self.inputs // by), max(2, self.outputs // by))


@dataclass(frozen=True)
class Outcome:
    """Seconds from the start, when all requests come at once, and what each request got."""

    first_s: float  # until the first token of any
    total_s: float  # until the last
    tokens: list[list[int]]


BATCH = "batch"
WORKLOADS = {DECODE: Workload(1, 32, 64), BATCH: Workload(16, 128, 64), PREFILL: Workload(1, 1024, 2)}
SPEEDS: dict[str, Callable[[Workload, Outcome], float]] = {  # tokens per second
    DECODE: lambda work, out: (work.outputs - 1) / (out.total_s - out.first_s),
    BATCH: lambda work, out: work.batch * work.outputs / out.total_s,
    PREFILL: lambda work, out: work.inputs / out.first_s,
}


class Driver:
    """An engine as a worker has it, on its own thread, without the wires around it."""

    def __init__(self, executor: Executor, role: RoleSpec, config: ModelConfig) -> None:
        self.config = config
        self.stamps: list[float] = []  # of the last `generate`: when each step had ended
        self._engine = Engine(
            executor,
            role,
            config.max_context,
            config.eos_token_ids,
            1,
            self._on_sampled,
            replicas=role.parallelism.data,
        )
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def generate(self, prompts: Prompts, outputs: int) -> Outcome:
        """Raises WorkerLost if the engine dies of it."""
        params = SamplingParams(max_tokens=outputs, temperature=0.0, ignore_eos=True)
        sequences = [EngineSequence(Ticket(str(i), 0, 0), [*ids], len(ids), params) for i, ids in enumerate(prompts)]
        self.stamps = []
        self._left, self._idle = len(sequences), threading.Event()
        start = time.perf_counter()
        for sequence in sequences:
            self._engine.add(sequence)
        self._idle.wait()
        if self._engine.failure is not None:
            raise WorkerLost(f"the engine died: {self._engine.failure!r}") from self._engine.failure
        tokens = [s.token_ids[s.num_prompt :] for s in sequences]
        return Outcome(self.stamps[0] - start, self.stamps[-1] - start, tokens)

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
            self.stamps.append(time.perf_counter())
            self._left -= sum(item.token.finish is not None for item in sampled)
            if not self._left:
                self._idle.set()


class Tercet(Driver):
    """Engine and runner in this process."""

    def __init__(self, spec: ModelSpec, threads: int, kernels: Wanted = "auto") -> None:
        chosen = choose_kernels(kernels)
        chosen.set_threads(threads)
        self.kernels = str(chosen)
        loaded, role = load_model(spec, chosen), RoleSpec(threads=threads)
        region = Region(loaded.model.kv_layout(role.kv.blocks, role.kv.block_size))
        super().__init__(LocalExecutor(Runner(loaded.model, region)), role, loaded.config)


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
        self.model = load(path.parent, gguf_file=path.name, quantization_config=whole, dtype=spec.dtype).eval()

    def generate(self, prompts: Prompts, outputs: int) -> Outcome:
        ids, stamps = torch.tensor(prompts), _Stamps()
        settings = {"do_sample": False, "max_new_tokens": outputs, "eos_token_id": None, "pad_token_id": 0}
        start = time.perf_counter()
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), streamer=stamps, **settings)
        return Outcome(stamps.times[1] - start, stamps.times[-1] - start, out[:, ids.shape[1] :].tolist())


def bytes_per_weight(dtype: Ours, config: ModelConfig) -> float:
    """Of a GGUF's blocks the mean over its file, which has little else."""
    if dtype != "gguf":
        return float(getattr(torch, dtype).itemsize)
    return locate(ModelSpec()).stat().st_size / Cost.of(config, 1, 1).decode_bytes


def compare(measure: str, work: Workload, ours: Outcome, theirs: Outcome) -> Figures:
    pairs = [pair for a, b in zip(ours.tokens, theirs.tokens, strict=True) for pair in zip(a, b, strict=True)]
    mine, other = SPEEDS[measure](work, ours), SPEEDS[measure](work, theirs)
    same = sum(a == b for a, b in pairs) / len(pairs)
    values = {"tercet": mine, "rival": other, "ratio": mine / other, "same_tokens": same}
    return {f"{measure}.{name}": value for name, value in values.items()}


def run_rounds(
    ours: Tercet,
    theirs: Transformers | Tercet,
    machine: Machine,
    cost: Cost,
    workloads: Mapping[str, Workload],
    repeats: int,
) -> list[Figures]:
    """Of each round `MEASURE.KEY` for each measure, and the machine's rates."""
    rounds = []
    for number in progress.rounds(range(repeats + 1)):
        start, figures = time.perf_counter(), machine.measure()
        for measure, whole in workloads.items():
            work = whole if number else whole.shrunk(8)  # round 0 warms caches and threads and is not kept
            prompts = work.prompts(ours.config.vocab_size, number)
            figures |= compare(measure, work, *(each.generate(prompts, work.outputs) for each in (ours, theirs)))
        for measure, limit in cost.limits(figures).items():
            figures |= {f"{measure}.machine": limit, f"{measure}.reached": figures[f"{measure}.tercet"] / limit}
        rounds.append(figures)
        print(f"round {number} of {repeats}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return rounds[1:]


def table(result: Figures, workloads: Mapping[str, Workload], title: str) -> Table:
    made = Table("median", title=title)
    for column, _ in COLUMNS:
        made.add_column(column, justify="right")
    for measure, work in workloads.items():
        cells = [format(result[k], form) if (k := f"{measure}.{key}") in result else "" for key, form in COLUMNS]
        made.add_row(f"{measure}, {work.batch} of {work.inputs} in, {work.outputs} out, tokens/s", *cells)
    made.add_section()
    for name, unit in ((name, unit) for name in result for kind, unit in RATES.items() if name.startswith(kind)):
        made.add_row(f"{name.replace('_', ' ')}, {unit}", "", "", "", f"{result[name] / 1e9:,.1f}")
    made.add_row("resident, MB", *(f"{result[f'resident_mb.{name}']:,.0f}" for name in ("tercet", "rival")))
    return made


def main(
    threads: Annotated[int, typer.Option(min=1, help="compute threads, of both")] = 1,
    dtype: Annotated[Ours, typer.Option(help="of our weights")] = "bfloat16",
    rival_dtype: Annotated[
        Dtype | None, typer.Option(help="of the rival's weights; default: the same, or bfloat16")
    ] = None,
    rival: Annotated[Literal["transformers", "torch"], typer.Option(help="who is measured beside us")] = "transformers",
    kernels: Annotated[Wanted, typer.Option(help="of our engine")] = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="rounds")] = 5,
    shrink: Annotated[int, typer.Option(min=1, help="divide every size by this, to try the script out")] = 1,
    result_file: Annotated[Path | None, typer.Option("--json", help="where the JSON goes")] = None,
) -> None:
    """The figures are to be read: none of them makes the command fail."""
    torch.set_num_threads(threads)
    rival_dtype = rival_dtype or ("bfloat16" if dtype == "gguf" else dtype)
    about = facts() | {
        "threads": threads,
        "dtype": dtype,
        "rival": rival,
        "rival_dtype": rival_dtype,
        "repeats": repeats,
    }
    workloads = {name: work.shrunk(shrink) for name, work in WORKLOADS.items()}
    memory = [resident_mb()]
    ours = Tercet(ModelSpec(dtype=dtype), threads, kernels)
    torch.set_num_threads(threads)  # of transformers; with native kernels ours uses none of torch's
    about["kernels"] = ours.kernels
    memory.append(resident_mb())
    other = ModelSpec(dtype=rival_dtype)
    theirs = Tercet(other, threads, "torch") if rival == "torch" else Transformers(other)
    memory.append(resident_mb())
    cost = Cost.of(ours.config, bytes_per_weight(dtype, ours.config), workloads[PREFILL].inputs)
    rounds = run_rounds(ours, theirs, Machine(shrink), cost, workloads, repeats)
    ours.stop()
    result = {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}
    result |= {"resident_mb.tercet": memory[1] - memory[0], "resident_mb.rival": memory[2] - memory[1]}
    title = f"{dtype} against {rival} in {rival_dtype}, {threads} of {about['cores']} cores, {about['cpu']}"
    title += f", kernels {about['kernels']}"
    title += f", {about['commit'][:12]}"
    Console().print(table(result, workloads, title))
    if result_file is not None:
        about["workloads"] = {name: asdict(work) for name, work in workloads.items()}
        result_file.write_text(json.dumps(about | {"result": result, "rounds": rounds}, indent=1))


if __name__ == "__main__":
    typer.run(main)
