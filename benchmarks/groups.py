"""A model shared by a group of ranks, beside one process that has as many threads in all: steps, memory, and what the
ranks say to each other.

    python -m benchmarks.groups --rounds 5 --result groups.json
    python -m benchmarks.groups --model DIRECTORY --shapes one --shapes tp2

Measures SmolLM2-135M, a Llama and a mixture of experts with random weights; or one model of your own. All groups of a
model live at once, and take turns round by round, so that noise hits them alike; an idle group takes no core. Every
figure is the median of the rounds. Prompts to decode have one token, so that all steps are alike.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import groups_models, groups_sums, progress
from benchmarks.engine import Dtype, Workload
from benchmarks.groups_ranks import Run, Served, Shape
from benchmarks.machine import Others, facts
from tercet.spec import ModelSpec

WORKS = {f"decode of {batch}": Workload(batch, 1, 33) for batch in (1, 8, 32)} | {"prefill of 512": Workload(1, 512, 1)}
SHAPES = {  # SmolLM2 has 9 heads and 3 of keys and values
    "SmolLM2-135M": ("one", "tp3", "pp2"),
    "random Llama": ("one", "tp2", "tp4", "pp2"),
    "random Qwen3-MoE": ("one", "ep2", "ep4"),
}
RANDOM = {"random Llama": groups_models.llama, "random Qwen3-MoE": groups_models.qwen3_moe}
WORLDS = (2, 4)  # ranks that sum
SUM_ROUNDS = 100
MIB = 1 << 20

Figures = dict[str, float]
Rounds = dict[str, dict[str, list[Figures]]]  # shape -> work -> of each round


def figures(work: Workload, run: Run) -> Figures:
    """step_s: of one decode step, or of the whole prompt. share_least, share_most: of the time, what a rank spent in
    operations with others, its waiting included; of the rank with the least and the most. calls, bytes: of the rank
    that gave the most, a step."""
    seconds, calls, given = ([sum(kind[at] for kind in rank.values()) for rank in run.traffic] for at in (2, 0, 1))
    tokens = work.batch if work.outputs > 1 else work.inputs
    return {
        "step_s": run.step_s,
        "tokens_s": tokens / run.step_s,
        "share_least": min(seconds) / run.wall_s,
        "share_most": max(seconds) / run.wall_s,
        "calls": max(calls) / run.steps,
        "bytes": max(given) / run.steps,
    }


def measure(source: str, dtype: str, shapes: Mapping[str, Shape], rounds: int) -> tuple[Rounds, dict[str, Any]]:
    """-> figures, and the memory of each shape's ranks behind the last round."""
    found: Rounds = {name: {work: [] for work in WORKS} for name in shapes}
    with ExitStack() as stack:
        served = {}
        for name, shape in shapes.items():
            served[name] = Served(source, shape, dtype)
            stack.callback(served[name].stop)
            served[name].ask("measure")  # when it has loaded
        for number in progress.rounds(range(rounds + 1)):
            for name, group in served.items():
                for title, work in WORKS.items():
                    run = group.ask("run", work if number else work.shrunk(8), number)
                    if number:  # round 0 warms caches and threads and is not kept
                        found[name][title].append(figures(work, run))
        return found, {name: memory(group.ask("measure"), group.ask("bare")) for name, group in served.items()}


def memory(ranks: Sequence[Mapping[str, Any]], bare: int) -> dict[str, list[float]]:
    """Bytes of each rank. own: weights, KV and all that came with them, beyond a bare process with everything
    imported."""
    return {
        "peak": [rank["peak_bytes"] for rank in ranks],
        "own": [rank["private_bytes"] - bare for rank in ranks],
    }


def medians(rounds: Rounds) -> dict[str, dict[str, Figures]]:
    return {
        name: {
            title: {key: statistics.median(each[key] for each in of) for key in of[0]} for title, of in works.items()
        }
        for name, works in rounds.items()
    }


def speeds(title: str, found: Mapping[str, Mapping[str, Figures]], shapes: Mapping[str, Shape]) -> Table:
    columns = [column for work in WORKS for column in (f"{work}, ms", "tokens/s", "ratio")]
    table, first = Table("ranks x threads", *columns, title=f"{title}: ratio to the first"), next(iter(found))
    for name, works in found.items():
        cells = []
        for work, of in works.items():
            ratio = of["tokens_s"] / found[first][work]["tokens_s"]
            cells += [f"{1e3 * of['step_s']:.1f}", f"{of['tokens_s']:,.1f}", f"{ratio:.2f}"]
        table.add_row(f"{name}: {shapes[name].ranks} x {shapes[name].threads}", *cells)
    return table


def costs(title: str, found: Mapping[str, Mapping[str, Figures]], taken: Mapping[str, Any]) -> Table:
    columns = [column for work in WORKS for column in (f"{work}: share", "calls", "KB")]
    table = Table("", *columns, "own, MiB", "peak, MiB", title=f"{title}: among ranks, a step; memory of each rank")
    for name, works in found.items():
        cells = []
        for of in works.values():
            share = f"{of['share_least']:.0%} to {of['share_most']:.0%}"
            cells += [share, f"{of['calls']:.1f}", f"{of['bytes'] / 1e3:,.1f}"]
        table.add_row(name, *cells, *(_mib(taken[name][key]) for key in ("own", "peak")))
    return table


def _mib(of_ranks: Sequence[float]) -> str:
    return ", ".join(f"{num_bytes / MIB:,.0f}" for num_bytes in of_ranks)


def latencies(found: Mapping[str, Figures]) -> Table:
    table = Table("median, us", *found, title="sums and plans")
    for key in next(iter(found.values())):
        table.add_row(key, *(f"{1e6 * of[key]:,.0f}" for of in found.values()))
    return table


def _measured(source: str, title: str, dtype: str, names: Sequence[str], rounds: int) -> dict[str, Any]:
    """Measures and shows one model."""
    cores = len(os.sched_getaffinity(0))
    shapes = {name: Shape.parse(name, cores) for name in names}
    found, taken = measure(source, dtype, shapes, rounds)
    middle = medians(found)
    console = Console(width=200)
    console.print(speeds(title, middle, shapes))
    console.print(costs(title, middle, taken))
    return {"medians": middle, "memory": taken, "rounds": found}


def main(
    model: Annotated[str | None, typer.Option(help="measure this one: a directory, a GGUF file or a hub id")] = None,
    shapes: Annotated[list[str] | None, typer.Option(help="of --model: one, tp2, pp2, tp2pp2, ep4 ...")] = None,
    dtype: Annotated[Dtype, typer.Option(help="of the weights")] = "bfloat16",
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    result: Annotated[Path | None, typer.Option(help="where the JSON goes")] = None,
) -> None:
    """The figures are to be read: none of them makes the command fail."""
    if (model is None) != (shapes is None):
        raise SystemExit("--model and --shapes go together")
    command = shlex.join(["python", "-m", "benchmarks.groups", *sys.argv[1:]])
    about: dict[str, Any] = facts() | {"command": command, "dtype": dtype}
    about["works"] = {title: asdict(work) for title, work in WORKS.items()}
    others, models = Others(), {}
    with tempfile.TemporaryDirectory() as folder:
        if model is not None and shapes is not None:
            models[model] = _measured(model, model, dtype, shapes, rounds)
        else:
            for title, names in SHAPES.items():
                models[title] = _measured(_source(title, Path(folder)), title, dtype, names, rounds)
    sums = {f"{world} ranks": groups_sums.measure(world, SUM_ROUNDS) for world in WORLDS}
    Console(width=200).print(latencies(sums))
    about["others_cores"] = others.cores()
    if result is not None:
        result.write_text(json.dumps({"machine": about, "models": models, "sums": sums}, indent=1) + "\n")


def _source(title: str, folder: Path) -> str:
    if title not in RANDOM:
        return ModelSpec().source
    groups_models.save(RANDOM[title](), folder / title)
    return str(folder / title)


if __name__ == "__main__":
    typer.run(main)
