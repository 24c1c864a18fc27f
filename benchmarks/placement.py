"""Placement of experts, objective `balance`, beside DeepSeek's EPLB in one run, on synthetic routing:

    python -m benchmarks.placement --result placement.json

`gap` is above the proven bound, the worst layer's; `max_over_mean` of the GPUs' loads on the counts that the placement
was made from and on counts drawn anew (`held_out`), mean over layers. CPU seconds are of all layers together.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import facts
from benchmarks.placement_chain import eplb_of, max_over_mean
from benchmarks.placement_load import routing
from tercet.placement.experts import Dispatch, Placement, RoutingStats, Topology, solve_experts
from tercet.placement.experts.sharing import QUICK, Sharing

LAYERS, EXPERTS, TOP_K = 58, 256, 8
SEQUENCES, TOKENS = 400, 500
DRIFTS = (0.1, 0.2, 0.3)  # deviation of what is added to the logits
HOTNESS = np.array([600.0, 560, 120, 120, 20, 10, 10, 10])  # 8 GPUs of 2 slots: vLLM PR 37656
SHAPES = {
    "288 slots on 32 GPUs": (Topology(4, 8, 9, expert_bytes=1), Dispatch.EVEN),
    "288 slots on 32 GPUs, weighted": (Topology(4, 8, 9, expert_bytes=1), Dispatch.WEIGHTED),
    "320 ranks of 1 slot": (Topology(40, 8, 1), Dispatch.EVEN),
    "160 ranks of 2 slots, weighted": (Topology(20, 8, 2), Dispatch.WEIGHTED),
}
Row = dict[str, Any]


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """-> result, and CPU seconds."""
    began = time.process_time()
    result = work()
    return result, time.process_time() - began


class Traffic:
    """Counts of one mixture's requests."""

    def __init__(self, seed: int, layers: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._routing = routing(self._rng, layers, EXPERTS, TOP_K)
        self._topics = self._routing.topics_of(self._rng, 4, SEQUENCES)

    def counted(self, drift: float = 0.0) -> tuple[RoutingStats, RoutingStats]:
        """To place by, and drawn anew, after a drift of the logits."""
        now = self._routing.drifted(self._rng, drift) if drift else self._routing
        made, later = (now.counted(self._rng, self._topics, TOKENS) for _ in range(2))
        return made, later


def balance(name: str, seed: int, layers: int, limit_s: float) -> Row:
    topo, dispatch = SHAPES[name]
    made, later = Traffic(seed, layers).counted()
    plan, cpu_s = timed(lambda: solve_experts(made, topo, dispatch=dispatch, time_limit_s=limit_s))
    eplb, eplb_s = timed(lambda: eplb_of(made, topo))
    over = [layer.max_over_mean for layer in plan.layers]
    return {
        "case": name,
        "gap": max(layer.gap for layer in plan.layers),
        "max_over_mean": float(np.mean(over)),
        "worst_layer": max(over),
        "eplb": max_over_mean(eplb, made.weight, topo),
        "held_out": max_over_mean(plan, later.weight, topo),
        "eplb_held_out": max_over_mean(eplb, later.weight, topo),
        "cpu_s": cpu_s,
        "eplb_cpu_s": eplb_s,
    }


def golden() -> list[Row]:
    """Objective, bound and seconds of an instance whose optimum is known."""
    topo, rows = Topology(1, 8, 2), []
    for dispatch in Dispatch:
        plan, cpu_s = timed(lambda given=dispatch: solve_experts(_of(HOTNESS), topo, dispatch=given, time_limit_s=60))
        [layer] = plan.layers
        rows.append({"dispatch": dispatch.value, "reached": layer.objective, "bound": layer.bound, "cpu_s": cpu_s})
    even = eplb_of(_of(HOTNESS), topo)
    rows.append({"dispatch": "EPLB, even", "reached": max_over_mean(even, HOTNESS[None], topo) * HOTNESS.sum() / 8})
    return rows


def _of(weight: np.ndarray[Any, Any]) -> RoutingStats:
    return RoutingStats(weight.reshape(1, 1, -1))


def drifted(seed: int, drift: float, layers: int, limit_s: float) -> Row:
    """Few moves, and shares alone, after the load has changed."""
    topo, traffic = SHAPES["288 slots on 32 GPUs, weighted"][0], Traffic(seed, layers)
    made, _ = traffic.counted()
    now, later = traffic.counted(drift)
    old = solve_experts(made, topo, time_limit_s=limit_s)
    most = layers * 10  # slots; an expert has one byte here
    plan, cpu_s = timed(lambda: solve_experts(now, topo, old=old, max_moved_bytes=most, time_limit_s=limit_s))
    shared, share_s = _shared(old, made, now, topo)
    moved = [layer.moved_slots for layer in plan.layers]
    eplb_moves = (eplb_of(now, topo).phy2log != eplb_of(made, topo).phy2log).sum(axis=1)
    return {
        "drift": drift,
        "as_it_was": max_over_mean(old, later.weight, topo),
        "shares_solved_again": float((shared(later).max(axis=1) / shared(later).mean(axis=1)).mean()),
        "shares_ms": 1e3 * share_s,
        "few_moves": max_over_mean(plan, later.weight, topo),
        "moved": float(np.mean(moved)),
        "eplb_moves": float(eplb_moves.mean()),
        "cpu_s": cpu_s,
    }


def _shared(old: Placement, made: RoutingStats, now: RoutingStats, topo: Topology) -> tuple[Any, float]:
    """-> counts -> loads [L, G] by shares that are solved for `now` on the old placement; CPU seconds of one solve."""
    held = old.phy2log.reshape(len(old.phy2log), topo.gpus, -1)
    sharing = Sharing(held, EXPERTS, topo.speed)
    start = sharing.solve(made.weight)
    share, seconds = timed(lambda: sharing.solve(now.weight, start, QUICK))
    part = share / np.take_along_axis(now.weight, old.phy2log.astype(np.int64), axis=1).reshape(share.shape).clip(1e-9)

    def loads(stats: RoutingStats) -> np.ndarray[Any, Any]:
        tokens = np.take_along_axis(stats.weight, old.phy2log.astype(np.int64), axis=1).reshape(share.shape)
        return (part * tokens).sum(axis=2)

    return loads, seconds


def table(title: str, rows: list[Row]) -> Table:
    made = Table(title=title)
    for column in rows[0]:
        made.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:
        made.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    return made


def main(
    result: Annotated[Path | None, typer.Option(help="Where the figures go, as JSON.")] = None,
    seed: int = 0,
    layers: int = LAYERS,
    limit_s: Annotated[float, typer.Option(help="Deadline of each placement, seconds.")] = 120.0,
) -> None:
    found = {
        "balance": [balance(name, seed, layers, limit_s) for name in SHAPES],
        "golden": golden(),
        "drift": [drifted(seed, drift, layers, limit_s) for drift in DRIFTS],
    }
    for title, rows in found.items():
        Console().print(table(title, rows))
    if result is not None:
        result.write_text(json.dumps({"machine": facts(), "seed": seed, "rows": found}, indent=1))


if __name__ == "__main__":
    typer.run(main)
