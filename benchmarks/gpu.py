"""What a GPU is used for: each kernel, whole steps of an 8B-shaped model, and KV handed over, as fractions of what the
device was measured to do.

    python -m benchmarks.gpu --result gpu.json

First the limits are measured: a copy and a sum (the faster one is the bandwidth), and a product of bfloat16 matrices. A
row's least time is that in which its bytes move once at the bandwidth, or its products are computed at the product's
rate, whichever takes longer; its fraction is that least time over its median. Kernels are timed by the device's clock
with the L2 emptied before each call, steps and requests by the host's. Rows for which no time is left are named.
"""

from __future__ import annotations

from tests import triton_interpreter  # noqa: F401  # before Triton: without a GPU, its kernels are then interpreted

# isort: split

import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import gpu_handover, gpu_kernels, gpu_model, gpu_rivals
from benchmarks.gpu_sizes import SIZES, Sizes
from benchmarks.gpu_timing import Budget, Case, Results, Row, Timer, measured_rates, run_all
from benchmarks.machine import facts
from tercet.devices import DEVICES
from tercet.errors import UnsupportedSpec

Device = Literal["gpu", "cpu"]
RATE_UNITS = {"gemm": ("TFLOP/s", 1e12)}  # the others are GB/s


def machine(device: Device) -> dict[str, Any]:
    """What stands beside every figure. Raises UnsupportedSpec if there is no such device here."""
    where = DEVICES[device].torch_device()
    about = facts() | {"triton": metadata.version("triton"), "beside": gpu_rivals.installed()}
    if where.type == "cuda":
        properties = torch.cuda.get_device_properties(where)
        about |= {"gpu": properties.name, "gpu_gib": properties.total_memory / 2**30, "cuda": torch.version.cuda}
    return about


def cases(sizes: Sizes, device: Device) -> Iterator[Case]:
    """In the order of what is wanted most, since the last ones are dropped when the time is used up."""
    yield from gpu_model.cases(sizes, DEVICES[device].torch_device())
    yield from gpu_handover.cases(sizes, device)
    yield from gpu_kernels.cases(sizes)


def measure(device: Device, seconds: float, only: list[str]) -> tuple[dict[str, float], Results]:
    """-> the device's limits, and the rows. only: what a name must contain one of; all if empty."""
    budget, sizes = Budget(seconds), SIZES[device]
    timer = Timer(DEVICES[device].torch_device(), sizes.rounds)
    rates = measured_rates(timer, sizes.copy_bytes, sizes.side)
    timer.free()
    wanted = (case for case in cases(sizes, device) if not only or any(text in case.name for text in only))
    return rates, run_all(wanted, timer, rates, budget)


# ---- what is shown


def limits_line(rates: dict[str, float]) -> str:
    def told(name: str) -> str:
        unit, scale = RATE_UNITS.get(name, ("GB/s", 1e9))
        return f"{name.replace('_', ' ')} {rates[name] / scale:,.1f} {unit}"

    return ", ".join(map(told, rates))


def table(rows: list[Row], title: str) -> Table:
    made = Table("", "ms", "GB/s", "TFLOP/s", "of the limit", "goal", "others, ms", title=title)
    for row in rows:
        reached = (row.least.bytes / row.seconds / 1e9, row.least.flops / row.seconds / 1e12)
        others = [
            f"{name} {1e3 * took:.3f}" if isinstance(took, float) else f"{name}: {took}"
            for name, took in row.rivals.items()
        ]
        goal = "" if row.goal is None else f"{row.goal:.0%}"
        share = f"{row.fraction:.0%} of {row.bound}"
        figures = f"{1e3 * row.seconds:.3f}", *(f"{rate:,.1f}" for rate in reached)
        made.add_row(row.name, *figures, share, goal, "; ".join(others))
    return made


def show(console: Console, about: dict[str, Any], rates: dict[str, float], results: Results) -> None:
    console.print(f"limits: {limits_line(rates)}")
    console.print(table(results.rows, about.get("gpu", about["cpu"])))
    for name, why in results.not_run.items():
        console.print(f"not run: {name}: {why}", markup=False)
    for name, why in results.failed.items():
        console.print(f"FAILED: {name}: {why}", markup=False)


def as_json(about: dict[str, Any], rates: dict[str, float], results: Results) -> dict[str, Any]:
    return {
        "machine": about,
        "rates": rates,
        "rows": [row.as_json() for row in results.rows],
        "not_run": results.not_run,
        "failed": results.failed,
    }


def main(
    device: Annotated[Device, typer.Option(help="cpu: tiny sizes, to try the script itself.")] = "gpu",
    minutes: Annotated[float, typer.Option(min=0, help="Rows that would begin later are dropped.")] = 4.0,
    only: Annotated[list[str] | None, typer.Option(help="Rows whose name contains this; may be given often.")] = None,
    result: Annotated[Path | None, typer.Option(help="Write everything here, as JSON.")] = None,
) -> None:
    """A row that misses its goal is to be read; one that fails makes the command fail."""
    console = Console(width=160)
    try:
        about = machine(device)
    except UnsupportedSpec as error:
        console.print(f"[red]{error}")
        raise typer.Exit(2) from error
    rates, results = measure(device, 60 * minutes, only or [])
    show(console, about, rates, results)
    if result is not None:
        result.write_text(json.dumps(as_json(about, rates, results), indent=1))
    if results.failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
