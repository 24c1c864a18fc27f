"""Whether this machine's GPU computes the right things, and how fast. Made for eight minutes.

    python -m benchmarks.gpu_check --result gpu.json

First the tests: every Triton kernel against its reference, and tests/gpu: tokens of a small random model on the GPU
against the CPU's and those of transformers, worker processes that hand KV over by each transport and are killed and
started again, steps that never wait for the device. Each file of them is a process, several at once, since most of
their time goes into compilers and starts. Then benchmarks/gpu.py, alone on the device, with the time that is left.

Needs no Ray and no network. `make gpu-wheels` fetches what is missing on a machine with Python 3.12, torch, Triton and
transformers; `make gpu-check`, there, installs it beside this repository and runs this.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.gpu import Device, as_json, machine, measure, show
from tercet.errors import UnsupportedSpec
from tercet.transfer.transports.table import ALL

ROOT = Path(__file__).parents[1]
FILES = ("tests/gpu/test_*.py", "tests/unit/test_triton_*.py")
# Files of which only what is marked `gpu` is run here: they are about all transports.
MARKED = ("tests/integration/test_transfer_conformance.py", "tests/chaos/test_transfer_faults.py")
PROCESSES = "tests/gpu/test_processes.py"
OVER_A_TRANSPORT = f"{PROCESSES}::test_workers_die_and_the_tokens_stay"
TESTS_SHARE = 0.55  # of the time: tests that take longer have failed
RESERVE_S = 45.0  # the last row of the benchmark may begin so long before the end
# Of what pytest finds on a foreign machine only what the tests need is loaded, and its warnings are no failures.
PYTEST = ("-m", "pytest", "-q", "-p", "asyncio", "-p", "timeout", "-W", "default", "-m")
USED_UP = "the time for tests was used up; give more --minutes"
NOTHING_TO_RUN = 5  # pytest's exit status


@dataclass(frozen=True)
class Tested:
    name: str  # a file, or one test of it
    passed: bool
    seconds: float
    last: str  # pytest's own sum
    output: str  # of a failure


def run_one(name: str, device: Device, end: float) -> Tested:
    """These tests, ended at `end` (time.monotonic) with all processes that they have started."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"} | hidden
    began, marks = time.monotonic(), "gpu" if name in MARKED else "not slow and not ray"
    if began >= end:
        return Tested(name, False, 0.0, USED_UP, USED_UP)
    process = subprocess.Popen(
        [sys.executable, *PYTEST, marks, name],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=max(1.0, end - began))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output = process.communicate()[0] + "\n" + USED_UP
    passed = process.returncode in (0, NOTHING_TO_RUN)
    last = output.rstrip().rpartition("\n")[2]
    return Tested(name, passed, time.monotonic() - began, last, "" if passed else output)


def run_tests(names: Sequence[str], device: Device, seconds: float) -> list[Tested]:
    end = time.monotonic() + seconds
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // 2)) as pool:
        return list(pool.map(lambda name: run_one(name, device, end), names))


def all_tests() -> list[str]:
    """The files, but one that takes the sum of all others is divided: it starts workers for each transport."""
    files = [str(path.relative_to(ROOT)) for pattern in FILES for path in sorted(ROOT.glob(pattern))]
    files.remove(PROCESSES)
    return [f"{OVER_A_TRANSPORT}[{each.name}]" for each in ALL if each.missing() is None] + files + [*MARKED]


def show_tests(console: Console, tested: Sequence[Tested]) -> None:
    for each in tested:
        if not each.passed:
            console.rule(escape(each.name))
            console.print(each.output, markup=False, highlight=False)
    made = Table("tests", "", "s", "")
    for each in tested:
        said = "passed" if each.passed else "[red]FAILED" if each.seconds else "[red]not run"
        made.add_row(escape(each.name), said, f"{each.seconds:.0f}", escape(each.last))
    console.print(made)


def main(
    device: Annotated[Device, typer.Option(help="cpu: tiny sizes, to try the script; takes longer.")] = "gpu",
    minutes: Annotated[float, typer.Option(min=0, help="For all; rows of the benchmark are dropped for it.")] = 7.5,
    tests: Annotated[list[str] | None, typer.Option(help="Of pytest; may be given often. Default: all.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Rows of the benchmark whose name contains this.")] = None,
    result: Annotated[Path | None, typer.Option(help="Write everything here, as JSON.")] = None,
) -> None:
    """Fails if a test or a row fails. A row that misses its goal is to be read."""
    began, console = time.monotonic(), Console(width=160)
    try:
        about = machine(device)
    except UnsupportedSpec as error:
        console.print(f"[red]{error}")
        raise typer.Exit(2) from error
    console.print(", ".join(f"{name} {value}" for name, value in about.items()), highlight=False)
    tested = run_tests(tests or all_tests(), device, 60 * minutes * TESTS_SHARE)
    show_tests(console, tested)
    left = 60 * minutes - (time.monotonic() - began) - RESERVE_S
    rates, results = measure(device, left, only or [])
    show(console, about, rates, results)
    console.print(f"{time.monotonic() - began:.0f} s in all")
    if result is not None:
        found = {"tests": [asdict(each) for each in tested]} | as_json(about, rates, results)
        result.write_text(json.dumps(found, indent=1))
    if results.failed or not all(each.passed for each in tested):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
