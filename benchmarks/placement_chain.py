"""Objective `interlayer` beside DeepSeek's EPLB, in one run:

    python -m benchmarks.placement_chain --time-limit-s 60

Pairs of experts of neighbouring layers that stay on their unit (node, or GPU if there is one node), as a share of all:
on the counts that the placement was made from (`fitted`), the most that is possible there (`at_most`: exact for the
dynamic programme, else proven), and on counts drawn anew from the same traffic (`held_out`). Max/mean is of the GPUs'
loads on held-out counts, mean over layers; `over_balance` the worst layer's, on the fitted counts, in proportion to
objective `balance`. CPU seconds include the balance placement that is the floor, `floor_s` is that alone.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.placement_load import routing
from tercet.placement.experts import (
    Dispatch,
    Objective,
    Placement,
    RoutingStats,
    Topology,
    local_fraction,
    rebalance_experts,
    solve_experts,
)
from tercet.placement.experts.chain_descent import good_chain
from tercet.placement.experts.chain_exact import is_few
from tercet.placement.experts.chain_model import Task
from tercet.placement.experts.scoring import evenly
from tercet.placement.experts.tables import placement_of

SEQUENCES, TOKENS = 200, 500
GROUPS = 8  # of experts, for the hierarchical mode of EPLB


@dataclass(frozen=True)
class Case:
    name: str
    layers: int
    experts: int
    top_k: int
    topo: Topology


CASES = (
    Case("Mixtral, 4 GPUs", 32, 8, 2, Topology(1, 4, 2)),
    Case("Mixtral, 2 nodes", 32, 8, 2, Topology(2, 2, 2)),
    Case("DeepSeek, 32 GPUs", 58, 256, 8, Topology(1, 32, 8)),
    Case("DeepSeek, 4 nodes", 58, 256, 8, Topology(4, 8, 8)),
    Case("DeepSeek + 32, 32 GPUs", 58, 256, 8, Topology(1, 32, 9)),
    Case("DeepSeek + 32, 4 nodes", 58, 256, 8, Topology(4, 8, 9)),
)


def eplb_of(stats: RoutingStats, topo: Topology, groups: int = GROUPS) -> Placement:
    """groups: 1 for its global mode, which is taken, too, if they do not divide the experts."""
    experts = stats.weight.shape[1]
    groups = groups if experts > groups and experts % groups == 0 else 1
    phy2log, _, _ = rebalance_experts(stats.weight, topo.slots, groups, topo.nodes, topo.gpus)
    return evenly(phy2log.astype(np.int32), experts, topo.nodes)


def max_over_mean(plan: Placement, load: np.ndarray[Any, Any], topo: Topology) -> float:
    """load [L, E] -> mean over layers, with the placement's shares."""
    share = plan.dispatch_prob.mean(axis=1, dtype=np.float64) * load[:, :, None]
    busy = np.zeros((len(load), topo.gpus))
    layer = np.arange(len(load))[:, None, None]
    np.add.at(busy, (layer, plan.log2phy.clip(0) // topo.slots_per_gpu), np.where(plan.log2phy < 0, 0.0, share))
    return float((busy.max(axis=1) / busy.mean(axis=1)).mean())


def measure(case: Case, eps: float = 0.05, seed: int = 0, time_limit_s: float = 60.0) -> dict[str, Any]:
    rng, topo = np.random.default_rng(seed), case.topo
    traffic = routing(rng, case.layers, case.experts, case.top_k)
    topics = traffic.topics_of(rng, topo.nodes, SEQUENCES)
    stats, later = (traffic.counted(rng, topics, TOKENS) for _ in range(2))
    assert stats.pair is not None
    assert later.pair is not None
    began = time.process_time()
    floor = solve_experts(stats, topo, time_limit_s=time_limit_s / 4)
    floored = time.process_time()
    plan = solve_experts(stats, topo, objective=Objective.INTERLAYER, eps=eps, seed=seed, time_limit_s=time_limit_s)
    ended = time.process_time()
    eplb, total = eplb_of(stats, topo), float(stats.pair.sum())
    row: dict[str, Any] = {"case": case.name, "eps": eps, "fitted": local_fraction(plan, stats.pair, topo)}
    row["at_most"] = 1 - sum(layer.bound for layer in plan.layers) / total
    for name, each in (("", plan), ("_balance", floor), ("_eplb", eplb)):
        row[f"held_out{name}"] = local_fraction(each, later.pair, topo)
        row[f"max_over_mean{name}"] = max_over_mean(each, later.weight, topo)
    row["over_balance"] = max(
        ours.max_over_mean / least.max_over_mean for ours, least in zip(plan.layers, floor.layers, strict=True)
    )
    row |= {"cpu_s": ended - floored, "floor_s": floored - began, "descent_of_exact": None}
    held = floor.phy2log.reshape(case.layers, topo.gpus, -1)
    worst = np.array([layer.objective for layer in floor.layers])
    task = Task(stats.weight, stats.pair, topo, Dispatch.WEIGHTED, held, worst, eps)
    if is_few(task):
        found = good_chain(task, np.random.default_rng(seed), lambda: True)
        near = local_fraction(placement_of(found, stats.weight, topo, Dispatch.WEIGHTED), stats.pair, topo)
        row["descent_of_exact"] = near / row["fitted"]
    return row


def main(
    eps: Annotated[list[float] | None, typer.Option(help="Of the load; several may be given.")] = None,
    seed: int = 0,
    time_limit_s: float = 60.0,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    for case in CASES:
        for each in eps or [0.05]:
            row = measure(case, each, seed, time_limit_s)
            if as_json:
                print(json.dumps(row), flush=True)
            else:
                cells = (
                    f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
                )
                print(" | ".join(cells), flush=True)


if __name__ == "__main__":
    typer.run(main)
