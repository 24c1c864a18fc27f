"""A mixture's experts by each kind of kernels, beside a loop over the experts that got tokens, as transformers computes
them by default.

    python -m benchmarks.moe --threads 2
    python -m benchmarks.moe --device gpu

Each figure is the median of calls that take different experts in turn. GB/s are the weights of the experts that got
tokens, read once each, over that time; on a GPU they stand beside the bandwidth that was measured before (on a CPU the
last cache holds these small mixtures). All kinds must give what the loop gives, or there are no figures.
"""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from benchmarks import progress
from benchmarks.gpu_timing import Timer
from benchmarks.machine import facts
from tercet.devices import DEVICES
from tercet.kernels.kinds import Kernels, Kind
from tercet.kernels.moe import Experts, Routing, pack_experts, route
from tercet.kernels.packing import activation_dtype
from tercet.kernels.routing_counts import RoutingCounts

Device = Literal["gpu", "cpu"]
KINDS: dict[Device, list[Kind]] = {"cpu": ["native", "torch"], "gpu": ["triton", "torch"]}
DTYPES: dict[Device, list[torch.dtype]] = {"cpu": [torch.float32, torch.bfloat16], "gpu": [torch.bfloat16]}
LOOP, COUNT = "loop", "count"
DRAWS = 8  # inputs that are taken in turn
SPIN_S = 0.3  # longer than OpenMP's threads spin behind their work, on cores that the next kind's threads want
COUNTED_LAYERS = 24  # of a step whose routing is counted
TOLERANCE = 1e-1  # of values around 1: kinds round to bfloat16 in different places
SUM_BYTES = 2 << 30  # that are read to measure a GPU's bandwidth


@dataclass(frozen=True)
class Shape:
    name: str
    n: int  # experts
    k: int  # of a token
    hidden: int
    width: int


SHAPES: dict[Device, list[Shape]] = {
    "cpu": [Shape("Qwen3-MoE, small", 64, 8, 512, 192), Shape("Mixtral, small", 8, 2, 512, 1024)],
    "gpu": [Shape("Qwen3-30B-A3B", 128, 8, 2048, 768), Shape("Mixtral 8x7B", 8, 2, 4096, 14336)],
}


@dataclass(frozen=True)
class Draw:
    """One call's input."""

    x: Tensor  # [T, E]
    experts: Tensor  # [T, k]
    weights: Tensor  # [T, k]


@dataclass(frozen=True)
class Row:
    shape: str
    dtype: str
    tokens: int
    read_bytes: float  # of the experts that got tokens, mean over the draws
    seconds: dict[str, float]  # kind, LOOP or COUNT -> median


class ExpertLoop:
    """One expert after the other, each over its own rows."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        self._gate_up, self._down = gate_up, down
        self.count = len(gate_up)

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in experts.unique().tolist():
            rows, slots = torch.where(experts == expert)
            gate, up = functional.linear(x[rows], self._gate_up[expert]).chunk(2, -1)
            made = functional.linear(functional.silu(gate) * up, self._down[expert])
            out.index_add_(0, rows, (made * weights[rows, slots, None]).to(out.dtype))
        return out


def measure(
    shape: Shape, dtype: torch.dtype, tokens: list[int], device: Device, timer: Timer, threads: int
) -> list[Row]:
    """Raises SystemExit if some kind's experts give something else than a loop over them."""
    gate_up, down = (
        (torch.randn(shape.n, *size, device=timer.device) / size[1] ** 0.5).to(dtype)
        for size in ((2 * shape.width, shape.hidden), (shape.hidden, shape.width))
    )
    packed = [_Measured(LOOP, ExpertLoop(gate_up, down), Kernels("torch", timer.device), dtype)]
    for kind in KINDS[device]:
        kernels = Kernels(kind, timer.device)
        experts = pack_experts(gate_up, down, dtype, kernels)
        packed.append(_Measured(kind, experts, kernels, activation_dtype(dtype, kernels)))
    rows = []
    for count in tokens:
        draws = [_draw(shape, count, timer.device) for _ in range(DRAWS)]
        for each in packed[1:]:
            check(each.name, each.forward(draws[0]), packed[0].forward(draws[0]))
        seconds = {each.name: each.median(timer, draws, threads) for each in packed}
        seconds[COUNT] = _count_seconds(timer, shape, draws)
        used = sum(len(draw.experts.unique()) for draw in draws) / DRAWS
        read = used * 3 * shape.hidden * shape.width * dtype.itemsize
        rows.append(Row(shape.name, str(dtype).removeprefix("torch."), count, read, seconds))
    return rows


@dataclass(frozen=True)
class _Measured:
    name: str
    experts: Experts
    kernels: Kernels
    activations: torch.dtype

    def forward(self, draw: Draw) -> Tensor:
        return self.experts.forward(draw.x.to(self.activations), draw.experts, draw.weights)

    def median(self, timer: Timer, draws: list[Draw], threads: int) -> float:
        self.kernels.set_threads(threads)
        if timer.device.type == "cpu":
            time.sleep(SPIN_S)
        inputs = itertools.cycle([(draw.x.to(self.activations), draw.experts, draw.weights) for draw in draws])
        return timer.seconds(lambda: self.experts.forward(*next(inputs)))


def check(name: str, computed: Tensor, expected: Tensor) -> None:
    off = float((computed.float() - expected.float()).abs().max())
    if not off <= TOLERANCE:
        raise SystemExit(f"{name} experts give something else than a loop over them (off by {off:.2g})")


def _draw(shape: Shape, tokens: int, device: torch.device) -> Draw:
    routing = Routing(shape.n, shape.k, normalise=True)
    logits = torch.randn(tokens, shape.n, device=device)
    return Draw(torch.randn(tokens, shape.hidden, device=device), *route(logits, routing))


def _count_seconds(timer: Timer, shape: Shape, draws: list[Draw]) -> float:
    """Of one layer, mean over as many steps as it takes to count one of them with its pairs."""
    every = 16
    counts = RoutingCounts(COUNTED_LAYERS, shape.n, timer.device, every)
    layers = list(itertools.islice(itertools.cycle(draw.experts for draw in draws), COUNTED_LAYERS))

    def steps() -> None:
        for _ in range(every):
            for layer, experts in enumerate(layers):
                counts.count(layer, experts)

    return timer.seconds(steps) / (every * COUNTED_LAYERS)


def bandwidth(timer: Timer, size: int) -> float:
    """Bytes a second of a sum."""
    numbers = torch.ones(size // 4, device=timer.device)
    return size / timer.seconds(numbers.sum)


def table(rows: list[Row], device: Device, rate: float | None, title: str) -> Table:
    """rate: the device's bandwidth, where it is a limit."""
    first, names = KINDS[device][0], (*KINDS[device], LOOP)
    columns = ("", "dtype", "T", *(f"{name}, ms" for name in names), f"loop / {first}", f"{first}, GB/s", "count, us")
    made = Table(*columns, title=title)
    for row in rows:
        ours = row.seconds[first]
        reached = row.read_bytes / ours
        share = "" if rate is None else f" ({reached / rate:.0%} of the limit)"
        counted = f"{1e6 * row.seconds[COUNT]:.1f} ({row.seconds[COUNT] / ours:.2%})"
        figures = (f"{row.seconds[LOOP] / ours:.1f}", f"{reached / 1e9:,.1f}{share}", counted)
        times = (f"{1e3 * row.seconds[name]:.3f}" for name in names)
        made.add_row(row.shape, row.dtype, str(row.tokens), *times, *figures)
    return made


def main(
    device: Annotated[Device, typer.Option()] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="compute threads, on a CPU")] = 1,
    rounds: Annotated[int, typer.Option(min=5, help="calls of each median")] = 9,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="rows; may be given often")] = None,
    result: Annotated[Path | None, typer.Option(help="where the JSON goes")] = None,
) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    timer = Timer(DEVICES[device].torch_device(), rounds)
    about: dict[str, Any] = facts() | {"device": str(timer.device), "threads": threads, "rounds": rounds}
    about["bandwidth"] = rate = bandwidth(timer, SUM_BYTES) if device == "gpu" else None
    wanted = tokens or [1, 4, 16, 64, 256]
    rows = [
        row
        for shape, dtype in progress.rounds([*itertools.product(SHAPES[device], DTYPES[device])], "shapes and dtypes")
        for row in measure(shape, dtype, wanted, device, timer, threads)
    ]
    console = Console(width=160)
    console.print(about)
    console.print(table(rows, device, rate, f"{about['cpu'] if device == 'cpu' else device}, {threads} threads"))
    if result is not None:
        result.write_text(json.dumps({"machine": about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
