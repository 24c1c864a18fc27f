"""This cluster beside vLLM and llama.cpp on one machine: one model, one HTTP client, one run.

    python -m benchmarks.rivals --vllm VENV/bin/vllm --llama-server PATH/llama-server --result rivals.json

One system works at a time, on two threads. They take turns: every round starts each of them, warms it and takes some
repetitions of each row, so that a machine that drifts hits all alike. vLLM, whose start takes minutes, is started once
and idles between its turns. A figure is the median of the clean repetitions:
one during which other processes kept more than a quarter of a core busy does not count and is made again. Prompts are
random ids, other ones each time, so that no prefix cache answers. A system that is not installed is left out by name.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import progress
from benchmarks.engine import Workload
from benchmarks.machine import Others, facts
from benchmarks.rivals_systems import SYSTEMS, THREADS, Given, save_hf_model, serving
from benchmarks.serving import Outcome, Target, first_model, report, run
from benchmarks.workload import random_requests

VOCAB = 10_000
MOST_OTHERS = 0.25  # cores that other processes may take of a clean repetition
TRIES = 3  # repetitions at most, for each one that is wanted
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Row:
    work: Workload
    value: Callable[[Sequence[Outcome]], float]
    title: str


ROWS = {
    "decode": Row(Workload(1, 128, 128), lambda out: 1 / out[0].tpot, "decode, tokens/s from first to last"),
    "ttft": Row(Workload(1, 1024, 4), lambda out: 1e3 * out[0].ttft, "time to first token, ms"),
    "concurrent": Row(Workload(16, 128, 64), lambda out: float(report(out, {})["output_throughput"]), "tokens/s"),
}


@dataclass(frozen=True)
class Goal:
    row: str
    ours: str
    rival: str
    limit: float  # of ours / rival
    most: bool = False  # the ratio may be at most the limit; else it must reach it

    def met(self, ratio: float) -> bool:
        return ratio <= self.limit if self.most else ratio >= self.limit


GOALS = (
    Goal("decode", "tercet", "vllm", 1.3),
    Goal("ttft", "tercet", "vllm", 0.95, most=True),
    Goal("concurrent", "tercet", "vllm", 1.3),
    Goal("decode", "tercet-gguf", "llama.cpp", 1.5),
    Goal("concurrent", "tercet-pd", "tercet", 0.9),
)
PAIRS = (
    ("tercet", "vllm"),
    ("tercet", "vllm-float32"),
    ("tercet-gguf", "llama.cpp"),
    ("tercet-pd", "tercet"),
)


@dataclass(frozen=True)
class Repetition:
    round: int
    value: float
    others: float  # cores that other processes kept busy meanwhile

    @property
    def clean(self) -> bool:
        return self.others <= MOST_OTHERS


@dataclass(frozen=True)
class Wanted:
    rows: Mapping[str, Row]
    rounds: int
    repetitions: int  # clean ones of each row in a round


Found = dict[str, dict[str, list[Repetition]]]  # system -> row -> repetitions
Medians = Mapping[str, Mapping[str, float]]  # system -> row -> of the clean ones; a row without one is not there


def ask(target: Target, work: Workload, seed: int) -> list[Outcome]:
    """All requests of a row at once. Ends the program if one of them fails."""
    requests = random_requests(work.batch, (work.inputs, work.outputs), 0.0, 0, VOCAB, seed)
    outcomes = asyncio.run(run(target, requests, None, TIMEOUT_S))
    failed = [outcome.error for outcome in outcomes if outcome.error]
    if failed:
        raise SystemExit(f"{target.url}: {len(failed)} of {work.batch} requests failed: {failed[0]}")
    return outcomes


def repeat(measure: Callable[[], float], wanted: int, number: int) -> Iterator[Repetition]:
    """Until `wanted` of them are clean, or there were too many tries."""
    clean = 0
    for _ in range(wanted * TRIES):
        others = Others()
        value = measure()
        made = Repetition(number, value, others.cores())
        yield made
        clean += made.clean
        if clean == wanted:
            return


def turn(target: Target, rows: Mapping[str, Row], wanted: int, number: int) -> Iterator[tuple[str, Repetition]]:
    """One system's turn in a round: every system gets the same prompts, as long as it has no dirty repetitions."""
    seeds = count(1000 * number)
    for row in rows.values():
        ask(target, row.work.shrunk(8), next(seeds))
    for name, row in rows.items():
        for made in repeat(lambda row=row: row.value(ask(target, row.work, next(seeds))), wanted, number):
            yield name, made


def medians(found: Found) -> Medians:
    clean = {
        name: {row: [r.value for r in made if r.clean] for row, made in rows.items()} for name, rows in found.items()
    }
    return {name: {row: statistics.median(v) for row, v in rows.items() if v} for name, rows in clean.items()}


def ratio(middle: Medians, row: str, ours: str, rival: str) -> float | None:
    """None if one of them has no clean figure."""
    try:
        return middle[ours][row] / middle[rival][row]
    except KeyError:
        return None


def figures(found: Found, rows: Mapping[str, Row], title: str) -> Table:
    middle = medians(found)
    made = Table("median (clean + dirty repetitions)", *found, title=title)
    pairs = [pair for pair in PAIRS if {*pair} <= {*found}]
    for pair in pairs:
        made.add_column(" / ".join(pair))
    for name, row in rows.items():
        cells = []
        for system, all_made in found.items():
            clean = sum(r.clean for r in all_made[name])
            value = f"{middle[system][name]:,.1f}" if clean else "-"
            cells.append(f"{value} ({clean} + {len(all_made[name]) - clean})")
        ratios = [ratio(middle, name, *pair) for pair in pairs]
        work = f"{row.title}, {row.work.batch} of {row.work.inputs} in, {row.work.outputs} out"
        made.add_row(work, *cells, *("-" if r is None else f"{r:.2f}" for r in ratios))
    return made


def judged(middle: Medians) -> Table:
    made = Table("goal", "ratio", "", title="ours / rival")
    for goal in GOALS:
        found = ratio(middle, goal.row, goal.ours, goal.rival)
        said = f"{goal.row}: {goal.ours} / {goal.rival} {'≤' if goal.most else '≥'} {goal.limit}"
        made.add_row(
            said, *("-", "not run") if found is None else (f"{found:.2f}", "met" if goal.met(found) else "MISSED")
        )
    return made


def chosen(only: Sequence[str], given: Given) -> tuple[list[str], dict[str, str]]:
    """-> the systems to measure, and of each that is left out why."""
    for name in only:
        if name not in SYSTEMS:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(SYSTEMS)}", param_hint="--only")
        if why := SYSTEMS[name].missing(given):
            raise typer.BadParameter(f"{name} is asked for, and there is {why}", param_hint="--only")
    left = {name: "not asked for" for name in SYSTEMS if only and name not in only}
    left |= {name: why for name, system in SYSTEMS.items() if name not in left and (why := system.missing(given))}
    return [name for name in SYSTEMS if name not in left], left


@contextmanager
def locked(file: Path | None) -> Iterator[None]:
    """Others that measure on this machine wait, if they ask for the same file's lock."""
    if file is None:
        yield
        return
    with file.open("a") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield


def measure(
    names: Sequence[str], given: Given, wanted: Wanted, logs: Path, lock: Path | None
) -> Iterator[tuple[str, str, Repetition]]:
    """-> system, row, repetition. What starts slowly is started once, before all rounds, and idles until its turn."""
    with ExitStack() as stack:
        slow = {n: stack.enter_context(serving(n, given, logs)) for n in names if SYSTEMS[n].slow_start}
        stack.enter_context(locked(lock))
        for number in progress.rounds(range(wanted.rounds)):
            for name in names:
                with nullcontext(slow[name]) if name in slow else serving(name, given, logs) as system:
                    target = Target(f"{system.url}/v1/completions", asyncio.run(first_model(system.url)), True)
                    for row, made in turn(target, wanted.rows, wanted.repetitions, number):
                        print(f"{name} {row}: {made.value:.1f}{'' if made.clean else ' dirty'}", file=sys.stderr)
                        yield name, row, made


def save(file: Path, about: Mapping[str, object], found: Found, rows: Mapping[str, Row]) -> None:
    made = {
        name: {row: [asdict(r) for r in all_made] for row, all_made in rows.items()} for name, rows in found.items()
    }
    works = {name: asdict(row.work) for name, row in rows.items()}
    whole = {**about, "workloads": works, "medians": medians(found), "repetitions_made": made}
    file.write_text(json.dumps(whole, indent=1))


Command = Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="the command; default: left out")]


def main(
    vllm: Command = None,
    llama_server: Command = None,
    hf_model: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="for vLLM; default: made of the GGUF")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="a system, may be repeated; default: all")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="times that each system is started")] = 2,
    repetitions: Annotated[int, typer.Option(min=1, help="clean ones of each row in a round")] = 3,
    shrink: Annotated[int, typer.Option(min=1, help="divide every length by this, to try the script out")] = 1,
    lock: Annotated[Path | None, typer.Option(help="a file whose lock (flock) is held while the rounds run")] = None,
    result: Annotated[Path | None, typer.Option(help="where the JSON goes")] = None,
) -> None:
    """The figures are to be read: no ratio makes the command fail. A system that dies does."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or it would leave a server behind
    rows = {name: Row(row.work.shrunk(shrink), row.value, row.title) for name, row in ROWS.items()}
    with tempfile.TemporaryDirectory(prefix="tercet-rivals-") as folder:
        given = Given(vllm, llama_server, hf_model or Path(folder) / "smollm2")
        names, left_out = chosen(only or [], given)
        if vllm and not hf_model and any(name.startswith("vllm") for name in names):
            save_hf_model(given.hf_model)
        about = facts() | {"threads": THREADS, "rounds": rounds, "repetitions": repetitions, "left_out": left_out}
        about["versions"] = {name: SYSTEMS[name].version(given) for name in names}
        found: Found = {name: {row: [] for row in rows} for name in names}
        try:
            for name, row, made in measure(names, given, Wanted(rows, rounds, repetitions), Path(folder), lock):
                found[name][row].append(made)
        finally:  # minutes are not lost because a later system dies
            if result is not None:
                save(result, about, found, rows)
    middle, console = medians(found), Console()
    title = f"{THREADS} of {about['cores']} cores, {about['cpu']} ({', '.join(about['flags'])}), {about['commit'][:12]}"
    console.print(figures(found, rows, title), judged(middle), about["versions"])
    for name, why in left_out.items():
        console.print(f"left out: {name}: {why}", markup=False)


if __name__ == "__main__":
    typer.run(main)
