"""KV moved between two processes of one host: the mover over each transport, against memcpy, sockets and libraries.

    python -m benchmarks.transfer --rounds 5 --result transfer.json

Every round runs each shape on every side, in turn, with blocks drawn anew, never adjacent, so that noise and warm
caches hit all alike; twice each, and the second counts. Ours is the time from the first push until `Released`; its
round trip is OFFER to GRANT, and its handover OFFER to `Complete`: 16 tokens of SmolLM2, all layers, ready to be
decoded. A figure is the median of the rounds; a ratio is that of two such medians. After the rounds every side moves
once more into zeroed memory, and all its bytes are compared.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import time
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from benchmarks import progress
from benchmarks.machine import facts
from benchmarks.transfer_pairs import SIDES, Running, SideLost, layout_of
from benchmarks.transfer_report import goals, table
from benchmarks.transfer_rivals import SOURCE, TARGET, Job
from tercet.transfer.memory.region import Region

POOL = 256 << 20  # bytes, of each side
SHAPES = {"1 x 64 MiB": (1, 64 << 20), "256 x 256 KiB": (256, 256 << 10), "4096 x 16 KiB": (4096, 16 << 10)}
PACKAGES = ("numpy", "torch", "nixl", "ucxx-cu12", "libucx-cu12", "mooncake-transfer-engine-non-cuda", "xxhash")
IDLE_S = 3.0


def draw(shape: str, size: int, count: int, pool: int, rng: random.Random) -> Job:
    """Random blocks, no two of them adjacent in the order of both pools."""
    while True:
        src, dst = (rng.sample(range(pool // size), count) for _ in (SOURCE, TARGET))
        if not any(src[n + 1] - src[n] == dst[n + 1] - dst[n] == 1 for n in range(count - 1)):
            return Job(shape, size, src, dst)


class Bench:
    """The pools, the sides that run, and what was measured."""

    def __init__(self, names: list[str], shrink: int) -> None:
        self.rng, self.pool = random.Random(0), POOL // shrink
        self.shapes = {name: (count, size // shrink) for name, (count, size) in SHAPES.items()}
        self.pools = [Region(layout_of(64, self.pool)) for _ in (SOURCE, TARGET)]
        self.pools[SOURCE].view[:] = np.random.default_rng(0).bytes(self.pool)
        self.running: dict[str, Running] = {}
        self.not_run: dict[str, str] = {}
        self.raw: dict[str, dict[str, list[float]]] = {}  # side -> shape -> seconds; also round_trip and handover
        self.idle: dict[str, float] = {}  # side -> percent of a core
        for name in names:
            self.begin(name)

    def begin(self, name: str) -> None:
        why = SIDES[name].missing()
        if why is not None:
            self.not_run[name] = why
            return
        paths = [f"/proc/{os.getpid()}/fd/{pool.fd}" for pool in self.pools]
        try:
            self.running[name] = Running(
                name, paths, self.pool, {shape: size for shape, (_, size) in self.shapes.items()}
            )
        except SideLost as error:
            self.not_run[name] = str(error)

    def ask(self, name: str, order: Job | int) -> Any:
        """None if the side broke; it is left out from then on."""
        try:
            return self.running[name].ask(order)
        except SideLost as error:
            self.not_run[name] = f"broke: {error}"
            del self.running[name]
            self.raw.pop(name, None)
            return None

    def warm(self, name: str) -> None:
        """Every block of both pools once, and some small messages."""
        for shape, (count, size) in self.shapes.items():
            blocks = self.pool // size
            order = self.rng.sample(range(blocks), blocks)
            for first in range(0, blocks, count):
                some = order[first : first + count]
                if name not in self.running or self.ask(name, Job(shape, size, some, some[::-1])) is None:
                    return
        self.ask(name, 5)

    def round(self, number: int, small: int) -> None:
        for shape, (count, size) in self.shapes.items():
            for name in rotated(list(self.running), number):
                for counts in (False, True):  # the first wakes processes up that have slept while others ran
                    if name in self.running:
                        seconds = self.ask(name, draw(shape, size, count, self.pool, self.rng))
                        if counts and seconds is not None:
                            self.raw.setdefault(name, {}).setdefault(shape, []).append(seconds)
        for name in rotated(list(self.running), number):
            for key, found in (self.ask(name, small) or {}).items():
                self.raw.setdefault(name, {}).setdefault(key, []).extend(found)

    def rest(self) -> None:
        """The CPU that connected pairs take for nothing."""
        before, start = {name: side.cpu_s for name, side in self.running.items()}, time.monotonic()
        time.sleep(IDLE_S)
        share = 100 / (time.monotonic() - start)
        self.idle = {name: (side.cpu_s - before[name]) * share for name, side in self.running.items()}

    def verify(self) -> None:
        """Every side must bring every byte, into memory that holds none of them."""
        source, target = (np.frombuffer(pool.view, np.uint8) for pool in self.pools)
        for shape, (count, size) in self.shapes.items():
            for name in list(self.running):
                target[:] = 0
                job = draw(shape, size, count, self.pool, self.rng)
                seconds = self.ask(name, job)
                rows, landed = source.reshape(-1, size), target.reshape(-1, size)
                if seconds is not None and not (rows[job.src] == landed[job.dst]).all():
                    raise SystemExit(f"{name} brought wrong bytes, {shape}")

    def stop(self) -> None:
        for side in self.running.values():
            side.stop()


def rotated(names: list[str], number: int) -> list[str]:
    return names[number % len(names) :] + names[: number % len(names)] if names else []


def rounded(seconds: float) -> float:
    """To the tenth of a microsecond: most of the file would be digits that mean nothing."""
    return round(seconds, 7)


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    small: Annotated[int, typer.Option(min=2, help="round trips and handovers of a side, in all")] = 200,
    shrink: Annotated[int, typer.Option(min=1, help="divide every block by this, to try the script out")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="a side; may be given often. Default: all")] = None,
    result: Annotated[Path | None, typer.Option(help="where the JSON goes")] = None,
) -> None:
    """The figures are to be read: none of them makes the command fail, but a wrong byte does."""
    about = facts()  # first: the tree may change while this runs
    bench = Bench(only or list(SIDES), shrink)
    try:
        for name in list(bench.running):
            bench.warm(name)
        for number in progress.rounds(range(rounds)):
            bench.round(number, max(1, small // rounds))
        bench.rest()
        bench.verify()
    finally:
        bench.stop()
    medians = {
        name: {key: statistics.median(seconds) for key, seconds in raw.items()} for name, raw in bench.raw.items()
    }
    gigabytes = {shape: count * size / 1e9 for shape, (count, size) in bench.shapes.items()}
    Console(width=150).print(table(medians, bench.idle, gigabytes), goals(medians, bench.idle, gigabytes))
    for name, why in bench.not_run.items():
        print(f"not run: {name}: {why}")
    if result is not None:
        about |= {"versions": versions(), "rounds": rounds, "shrink": shrink, "not_run": bench.not_run}
        raw = {
            name: {key: list(map(rounded, found)) for key, found in each.items()} for name, each in bench.raw.items()
        }
        result.write_text(json.dumps(about | {"seconds": raw, "medians": medians, "idle_percent": bench.idle}))


if __name__ == "__main__":
    typer.run(main)
