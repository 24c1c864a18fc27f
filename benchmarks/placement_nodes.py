"""Experts onto nodes, beside EPLB in the same run: traffic between nodes and balance on held-out counts.

Synthetic routing (`placement_load`) of sequences, each of one topic; topics are uneven. Placements are made from the
counts of some sequences and scored on those of others. Homes are random, or assigned by what a first window of each
sequence counted; placement and homes are then made by turns. GPUs: 4 nodes of 8, 256 experts and 32 redundant slots.

    python -m benchmarks.placement_nodes --layers 58 --rounds 3
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.placement_chain import GROUPS, eplb_of
from benchmarks.placement_load import TOPIC_DEVIATION, Routing, routing
from tercet.placement.experts import (
    Dispatch,
    Objective,
    Placement,
    RoutingStats,
    Topology,
    solve_experts,
)
from tercet.placement.experts.homes import homes_of, source_load_of
from tercet.placement.experts.scoring import score

EXPERTS, TOP_K = 256, 8
TOPO = Topology(nodes=4, gpus_per_node=8, slots_per_gpu=9)
SEQUENCES = 128  # a node
TOKENS = 1_000  # of a sequence in a window
TOPICS, SKEW = 8, 1.0  # skew of their shares: lower is more uneven
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Traffic:
    """Sequences: two windows of counts [Q, L, E], and random homes [Q]."""

    first: Floats
    second: Floats
    homes: NDArray[np.int64]


def traffic(rng: np.random.Generator, routes: Routing, mix: Floats) -> Traffic:
    number = SEQUENCES * TOPO.nodes
    topic = rng.choice(len(mix), size=number, p=mix)
    expected = routes.expert * TOKENS * TOP_K
    first, second = (rng.poisson(expected[topic]).astype(np.float64) for _ in range(2))
    return Traffic(first, second, rng.permutation(np.arange(number) % TOPO.nodes))


def stats_of(counts: Floats, homes: NDArray[np.int64]) -> RoutingStats:
    return RoutingStats(counts.sum(axis=0)[None], source_load_of(counts, homes, TOPO.nodes), top_k=TOP_K)


def measure(
    layers: int, rounds: int = 3, seconds: float = 600.0, seed: int = 0, topic_deviation: float = TOPIC_DEVIATION
) -> list[dict[str, Any]]:
    """rounds: of homes and placement by turns; seconds: for each placement. -> a row for each policy."""
    rng = np.random.default_rng(seed)
    routes = routing(rng, layers, EXPERTS, TOP_K, TOPICS, topic_deviation=topic_deviation)
    mix = rng.dirichlet(np.full(TOPICS, SKEW))
    seen, unseen = traffic(rng, routes, mix), traffic(rng, routes, mix)
    random = stats_of(seen.first, seen.homes)
    rows = []
    for name, groups in (("EPLB, hierarchical", GROUPS), ("EPLB, global", 1)):
        placement, spent = _timed(lambda g=groups: eplb_of(random, TOPO, g))
        rows.append(_row(name, placement, stats_of(unseen.second, unseen.homes), Dispatch.EVEN, spent))
    for objective, kept in ((Objective.INTERNODE, 0), (Objective.INTERNODE_DEDUP, 0), (Objective.INTERNODE, GROUPS)):
        name = objective.value + (f", {kept} groups kept" if kept else "")
        placement, spent = _timed(lambda o=objective, k=kept: _solved(random, o, k, seconds, seed))
        rows.append(_row(name, placement, stats_of(unseen.second, unseen.homes), Dispatch.WEIGHTED, spent))
    placement, spent = _timed(lambda: _by_turns(seen, rounds, seconds, seed))
    homes = homes_of(unseen.first, placement, np.full(TOPO.nodes, SEQUENCES))
    rows.append(_row("internode, homes", placement, stats_of(unseen.second, homes), Dispatch.WEIGHTED, spent))
    return rows


def _timed(made: Callable[[], Placement]) -> tuple[Placement, float]:
    """-> what is made, and its CPU seconds."""
    began = time.process_time()
    return made(), time.process_time() - began


def _solved(stats: RoutingStats, objective: Objective, groups: int, seconds: float, seed: int) -> Placement:
    return solve_experts(stats, TOPO, objective=objective, keep_groups=groups, time_limit_s=seconds, seed=seed)


def _by_turns(seen: Traffic, rounds: int, seconds: float, seed: int) -> Placement:
    homes = seen.homes
    for turn in range(rounds):
        placement = _solved(stats_of(seen.first, homes), Objective.INTERNODE, 0, seconds, seed)
        if turn < rounds - 1:
            homes = homes_of(seen.first, placement, np.full(TOPO.nodes, SEQUENCES))
    return placement


def _row(name: str, placement: Placement, stats: RoutingStats, dispatch: Dispatch, spent: float) -> dict[str, Any]:
    worth, reports = score(placement, stats, TOPO, dispatch), placement.layers
    return {
        "policy": name,
        "dispatch": dispatch.value,
        "cross_node": float(worth.cross_node.mean()),
        "node_copies": float(worth.node_copies.mean()),
        "max_over_mean": float(worth.max_over_mean.mean()),
        "worst_max_over_mean": float(worth.max_over_mean.max()),
        "gap": max((report.gap for report in reports), default=None),
        "relaxed": sum(bool(report.relaxed) for report in reports),
        "cpu_s": spent,
    }


def main(layers: int = 58, rounds: int = 3, seconds: float = 600.0, seed: int = 0) -> None:
    rows = measure(layers, rounds, seconds, seed)
    base = rows[0]["cross_node"]
    print(f"{layers} layers, held-out sequences; mean of layers, and the worst one")
    print(f"{'policy':28} {'cross-node':>16} {'copies':>7} {'max/mean':>15} {'gap':>8} {'CPU s':>7} relaxed")
    for row in rows:
        cross = f"{row['cross_node']:.4f} ({row['cross_node'] / base - 1:+.1%})"
        balance = f"{row['max_over_mean']:.4f} {row['worst_max_over_mean']:.4f}"
        gap = "" if row["gap"] is None else f"{row['gap']:.3%}"
        copies, spent = f"{row['node_copies']:.3f}", f"{row['cpu_s']:.1f}"
        print(f"{row['policy']:28} {cross:>16} {copies:>7} {balance:>15} {gap:>8} {spent:>7} {row['relaxed']}")


if __name__ == "__main__":
    typer.run(main)
