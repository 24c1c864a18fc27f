"""What the GPU benchmark measures with: a device's limits, the median time of some work, and what a row of it says."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

BANDWIDTH, GEMM = "bandwidth", "gemm"
ROUNDS = 7
FLUSH = 1 << 30  # bytes written before each timed call: far more than an L2 holds
Work = Callable[[], object]


class NotRun(Exception):
    """A row that cannot be measured here; says why."""


@dataclass(frozen=True)
class Least:
    """What some work must move and compute at least, however it is done."""

    bytes: float = 0.0  # read from and written to the device's memory, each once
    flops: float = 0.0  # of products on the tensor cores

    def seconds(self, rates: dict[str, float]) -> float:
        """On a device of these rates: the roofline."""
        return max(self.bytes / rates[BANDWIDTH], self.flops / rates[GEMM])

    def bound(self, rates: dict[str, float]) -> str:
        return BANDWIDTH if self.bytes / rates[BANDWIDTH] >= self.flops / rates[GEMM] else GEMM


@dataclass(frozen=True)
class Row:
    name: str
    seconds: float
    least: Least
    fraction: float  # of the roofline
    bound: str  # which limit makes the roofline
    rivals: dict[str, float | str] = field(default_factory=dict)  # seconds, or why it was not run
    goal: float | None = None  # of the fraction

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Case(Protocol):
    """A row to be."""

    name: str

    def run(self, timer: Timer, rates: dict[str, float]) -> Row:
        """Its memory is given back when it returns."""


class Timer:
    """Medians of what is called several times, behind calls that warm up."""

    def __init__(self, device: torch.device, rounds: int = ROUNDS) -> None:
        self.device, self.rounds = device, rounds
        self._on_gpu = device.type == "cuda"
        self._warm = 3 if self._on_gpu else 1
        self._flush = torch.empty(FLUSH if self._on_gpu else 1, dtype=torch.uint8, device=device)

    def seconds(self, work: Work) -> float:
        """Of the device's work alone. While it writes the flush, the host gets ahead of it, so that the time that a
        launch takes there does not count; and the L2 holds nothing of the inputs."""
        for _ in range(self._warm):
            work()
        if not self._on_gpu:
            return statistics.median(self._wall(work) for _ in range(self.rounds))
        marks = []
        for _ in range(self.rounds):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            begin.record()
            work()
            end.record()
            marks.append((begin, end))
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) / 1e3 for begin, end in marks)

    def wall_seconds(self, work: Work) -> float:
        """Of the host's clock, the device's work included: what a step takes."""
        for _ in range(self._warm):
            work()
        return statistics.median(self._wall(work) for _ in range(self.rounds))

    def _wall(self, work: Work) -> float:
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give memory that nothing holds any more back to the device."""
        if self._on_gpu:
            torch.cuda.empty_cache()


def measured_rates(timer: Timer, size: int, side: int) -> dict[str, float]:
    """Bytes and FLOPs per second. size: bytes of a copy; side: of the square matrices that are multiplied.

    copy             read and written bytes of a copy within the device's memory
    read             bytes of a sum
    bandwidth        the faster of both
    gemm             bfloat16, random numbers
    to_host, to_device   of pinned memory, where there is a GPU
    """
    source = torch.ones(size // 4, device=timer.device)
    target = torch.empty_like(source)
    rates = {
        "copy": 2 * size / timer.seconds(lambda: target.copy_(source)),
        "read": size / timer.seconds(source.sum),
    }
    rates[BANDWIDTH] = max(rates.values())
    if timer.device.type == "cuda":
        host = torch.empty(size // 4, pin_memory=True)
        rates["to_host"] = size / timer.seconds(lambda: host.copy_(source, non_blocking=True))
        rates["to_device"] = size / timer.seconds(lambda: target.copy_(host, non_blocking=True))
    a, b = (torch.randn(side, side, device=timer.device).bfloat16() for _ in range(2))
    rates[GEMM] = 2 * side**3 / timer.seconds(lambda: a @ b)
    return rates


class Budget:
    """The time that is left; rows that come too late are dropped, by name."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()


@dataclass
class Results:
    rows: list[Row] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)  # name -> no time, no memory, not here
    failed: dict[str, str] = field(default_factory=dict)  # name -> what was raised


def run_all(cases: Iterable[Case], timer: Timer, rates: dict[str, float], budget: Budget) -> Results:
    """A row that fails does not keep the others from being measured."""
    results = Results()
    for case in cases:
        timer.free()  # what the case before held
        if budget.left <= 0:
            results.not_run[case.name] = "the time was used up"
            continue
        try:
            results.rows.append(case.run(timer, rates))
        except (torch.cuda.OutOfMemoryError, NotRun) as error:
            results.not_run[case.name] = first_line(error)
        except Exception as error:  # noqa: BLE001  # a kernel or a worker may fail in any way; it is told by name
            results.failed[case.name] = first_line(error)
    return results


def first_line(error: Exception) -> str:
    said = str(error) if isinstance(error, NotRun) else f"{type(error).__name__}: {error}"
    return said.splitlines()[0]
