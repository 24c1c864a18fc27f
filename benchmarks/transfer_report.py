"""The tables of benchmarks/transfer.py: what was measured, and which goals it meets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rich.table import Table

MEMCPY = ("memcpy slices", "memcpy memmove")
NIXL = ("NIXL auto", "NIXL no CMA", "NIXL tcp")
HANDOVER_MS = {"shm": 1.0, "tcp": 2.0}
IDLE_PERCENT = 2.0
TRANSPORTS = ("shm", "tcp", "torch", "nixl", "ucx")

Medians = Mapping[str, Mapping[str, float]]  # side -> shape, "round_trip" or "handover" -> seconds
Goal = tuple[str, float, str, float]  # what, what was found, "at least" or "at most", the goal


@dataclass(frozen=True)
class Speeds:
    medians: Medians
    gigabytes: Mapping[str, float]  # shape -> what it moves

    def of(self, shape: str, *sides: str) -> float | None:
        """GB/s of the fastest of the sides; None if none of them ran."""
        found = [self.gigabytes[shape] / self.medians[side][shape] for side in sides if side in self.medians]
        return max(found, default=None)

    def ratio(self, shape: str, side: str, *others: str) -> float | None:
        ours, theirs = self.of(shape, side), self.of(shape, *others)
        return None if ours is None or theirs is None else ours / theirs


def table(medians: Medians, idle: Mapping[str, float], gigabytes: Mapping[str, float]) -> Table:
    speeds = Speeds(medians, gigabytes)
    made = Table("side", title="GB/s, ratio to memcpy of the same shape; medians")
    for column in (*gigabytes, "round trip, µs", "handover, ms", "idle, % of a core"):
        made.add_column(column, justify="right")
    for side, found in medians.items():
        pairs = [(speeds.of(shape, side), speeds.ratio(shape, side, *MEMCPY)) for shape in gigabytes]
        cells = [f"{cell(speed, 1, '.2f')}  {cell(ratio, 1, '.2f')}" for speed, ratio in pairs]
        cells += [cell(found.get("round_trip"), 1e6, ".0f"), cell(found.get("handover"), 1e3, ".2f")]
        made.add_row(side, *cells, cell(idle.get(side), 1, ".1f"))
    return made


def cell(value: float | None, scale: float, form: str) -> str:
    return "" if value is None else format(value * scale, form)


def goals(medians: Medians, idle: Mapping[str, float], gigabytes: Mapping[str, float]) -> Table:
    made = Table("goal", "found", "asked", "", title="goals; what did not run is left out")
    every = [*_speed_goals(Speeds(medians, gigabytes)), *_small_goals(medians, idle)]
    for what, found, sense, asked in every:
        met = found >= asked if sense == "at least" else found <= asked
        made.add_row(what, f"{found:.2f}", f"{sense} {asked:g}", "met" if met else "MISSED")
    return made


def _speed_goals(speeds: Speeds) -> Iterator[Goal]:
    """Ratios of our speed to that of others."""
    shapes = list(speeds.gigabytes)
    asked: list[tuple[str, str, str, tuple[str, ...], float]] = [
        (f"shm / memcpy, {shape}", shape, "shm", MEMCPY, least)
        for shape, least in zip(shapes, (0.9, 0.9, 0.5), strict=True)
    ]
    asked += [(f"shm / NIXL's best, {shape}", shape, "shm", NIXL, 2.0) for shape in shapes]
    asked += [(f"tcp / plain loop, {shape}", shape, "tcp", ("tcp loop",), 1.0) for shape in shapes]
    asked += [(f"tcp / NIXL over TCP, {shapes[-1]}", shapes[-1], "tcp", ("NIXL tcp",), 2.5)]
    asked += [(f"nixl / raw, {shape}", shape, "nixl", ("NIXL no CMA",), 0.95) for shape in shapes]
    asked += [(f"ucx / raw, {shape}", shape, "ucx", ("ucxx tcp",), 0.95) for shape in shapes]
    for what, shape, side, others, least in asked:
        ratio = speeds.ratio(shape, side, *others)
        if ratio is not None:
            yield what, ratio, "at least", least


def _small_goals(medians: Medians, idle: Mapping[str, float]) -> Iterator[Goal]:
    for side, most in HANDOVER_MS.items():
        if side in medians:
            yield f"{side} handover of 16 tokens, ms", medians[side]["handover"] * 1e3, "at most", most
    for side in TRANSPORTS:
        if side in idle:
            yield f"{side} idle, % of a core", idle[side], "at most", IDLE_PERCENT
