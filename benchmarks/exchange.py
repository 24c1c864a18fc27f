"""Tokens to the ranks of experts and back: dispatch and combine, without what the experts compute.

    python -m benchmarks.exchange --result exchange.json

Every rank is a process of this host, with one thread. Rows are drawn at random, `k` distinct experts each; rank after
rank holds as many experts as the others, each once. Blocks of rounds of both exchanges take turns, so that noise hits
both alike. A round takes as long as its slowest rank; a figure is the median of the rounds.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import progress
from benchmarks.machine import facts
from tests.exchanges import Case, Rank, ask_all, collective, direct

TOKENS = (1, 4, 16, 64, 256)  # of each rank
WORLDS = (2, 4)
WIDTH, EXPERTS, K = 512, 64, 8
WARM = 5  # rounds that do not count
BLOCKS = 2  # times that each exchange has its turn

Seconds = dict[str, dict[str, list[float]]]  # exchange -> "world x tokens" -> of each round


def measure(world: int, rounds: int, tokens: tuple[int, ...]) -> Seconds:
    found: Seconds = {}
    ranks = [Rank() for _ in range(world)]
    try:
        for _ in range(BLOCKS):
            for name in ("collective", "direct", "direct, TCP"):
                _connect(ranks, name)
                for count in tokens:
                    case = Case((count,) * world, k=K, experts=EXPERTS, width=WIDTH, spare=0)
                    of_ranks = ask_all(ranks, "timed", case, WARM + -(-rounds // BLOCKS))
                    slowest = [max(each) for each in zip(*of_ranks, strict=True)][WARM:]
                    found.setdefault(name, {}).setdefault(f"{world} x {count}", []).extend(slowest)
    finally:
        for rank in ranks:
            rank.stop()
    return found


def _connect(ranks: list[Rank], name: str) -> None:
    slots_per_rank = EXPERTS // len(ranks)
    if name == "collective":
        with tempfile.TemporaryDirectory() as folder:
            collective(ranks, f"{folder}/store", slots_per_rank)
    else:
        direct(ranks, slots_per_rank, tcp=name == "direct, TCP")


def table(medians: dict[str, dict[str, float]]) -> Table:
    shown = Table("ranks x tokens", *(f"{name}, us" for name in medians), title="dispatch and combine, median")
    for key in next(iter(medians.values())):
        shown.add_row(key, *(f"{of[key] * 1e6:.0f}" for of in medians.values()))
    return shown


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 60,
    most: Annotated[int, typer.Option(min=1, help="tokens of a rank")] = max(TOKENS),
    result: Annotated[Path | None, typer.Option(help="where the JSON goes")] = None,
) -> None:
    about = facts()  # first: the tree may change while this runs
    seconds: Seconds = {}
    for world in progress.rounds(WORLDS, "sizes of groups"):
        for name, found in measure(world, rounds, tuple(count for count in TOKENS if count <= most)).items():
            seconds.setdefault(name, {}).update(found)
    medians = {name: {key: statistics.median(each) for key, each in found.items()} for name, found in seconds.items()}
    Console(width=100).print(table(medians))
    if result is not None:
        result.write_text(json.dumps(about | {"seconds": seconds, "medians": medians}))


if __name__ == "__main__":
    typer.run(main)
