"""Where experts shall lie: a placement of all layers with a certificate, within a deadline. Pure."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from tercet.errors import SpecError, UnsupportedSpec
from tercet.placement.experts.balance import Layer, balanced
from tercet.placement.experts.chain import chained
from tercet.placement.experts.keeping import migrated
from tercet.placement.experts.model import (
    Clock,
    Dispatch,
    Ints,
    LayerReport,
    Objective,
    Placement,
    RoutingStats,
    Topology,
    status_of,
)
from tercet.placement.experts.nodes import NodeRules, by_nodes
from tercet.placement.experts.tables import placement_of

INTERLAYER_EPS, NODES_EPS = 0.05, 0.005


def solve_experts(
    stats: RoutingStats,
    topo: Topology,
    *,
    old: Placement | None = None,
    objective: Objective = Objective.BALANCE,
    dispatch: Dispatch = Dispatch.WEIGHTED,
    eps: float | None = None,
    kappa: float = 0.5,
    keep_groups: int = 0,
    max_moved_bytes: int | None = None,
    time_limit_s: float = 10.0,
    workers: int = 1,
    seed: int = 0,
    clock: Clock = time.monotonic,
) -> Placement:
    """For the mean of the windows' loads. old: what is there, of which few experts are to move, at most
    `max_moved_bytes` over all layers. eps: by how much loads may be above their least (INTERLAYER_EPS, or that of
    `NodeRules`, if it is not given); kappa, keep_groups, workers: see `NodeRules`; seed: of all but `balance`. The
    placement is valid whatever the deadline. Raises SpecError if the experts do not fill the slots or the arguments do
    not fit each other, UnsupportedSpec for what is not built."""
    weight = stats.weight
    rules = NodeRules(NODES_EPS if eps is None else eps, kappa, keep_groups, workers, seed)
    _check(len(weight), topo, old, objective, max_moved_bytes, time_limit_s)
    began = clock()
    deadline = began + time_limit_s
    if objective is Objective.INTERLAYER:
        floor = partial(solve_experts, stats, topo, dispatch=dispatch, time_limit_s=time_limit_s / 4, clock=clock)
        above = INTERLAYER_EPS if eps is None else eps
        return chained(
            stats, topo, floor, old=old, dispatch=dispatch, eps=above, seed=seed, clock=clock, deadline=deadline
        )
    if objective is not Objective.BALANCE:
        if dispatch is not Dispatch.WEIGHTED:
            told = f"objective {objective.value} gives each node shares of its own"
            raise UnsupportedSpec(f"{told}: dispatch must be weighted (--dispatch weighted)")
        return by_nodes(stats, topo, objective, rules, old=old, deadline=deadline, clock=clock)
    layers = balanced(weight, topo, dispatch, deadline if old is None else began + time_limit_s / 2, clock)
    moved = [0] * len(layers)
    if old is not None:
        before = old.phy2log.reshape(len(layers), topo.gpus, -1)
        most = before.size if max_moved_bytes is None else max_moved_bytes // topo.expert_bytes
        moved = _migrate(layers, before, topo, dispatch, most, lambda: clock() < deadline)
    late = clock() >= deadline
    reports = [_report(layer, topo, slots, late=late) for layer, slots in zip(layers, moved, strict=True)]
    return placement_of(np.array([layer.held for layer in layers]), weight, topo, dispatch, reports)


def _check(
    layers: int,
    topo: Topology,
    old: Placement | None,
    objective: Objective,
    max_moved_bytes: int | None,
    time_limit_s: float,
) -> None:
    if topo.least_replicas > 1 and objective is not Objective.BALANCE:
        raise UnsupportedSpec(f"least_replicas with objective {objective.value} is not built so far; balance has it")
    if max_moved_bytes is not None and objective is not Objective.BALANCE:
        raise UnsupportedSpec(f"max_moved_bytes with objective {objective.value} is not built so far; balance has it")
    if not time_limit_s > 0:
        raise SpecError(f"time_limit_s is {time_limit_s}, and must be above 0")
    if old is not None and old.phy2log.shape != (layers, topo.slots):
        raise SpecError(f"the old placement has layers and slots {old.phy2log.shape}, not {(layers, topo.slots)}")
    if max_moved_bytes is not None and (old is None or max_moved_bytes < 0 or topo.expert_bytes < 1):
        raise SpecError(f"max_moved_bytes {max_moved_bytes} is for an old placement and experts of at least one byte")


def _migrate(
    layers: Sequence[Layer], old: Ints, topo: Topology, dispatch: Dispatch, most: int, go_on: Callable[[], bool]
) -> list[int]:
    """The layers become what is moved to, those first that lack most. -> slots that hold another expert, of each."""
    moved = [0] * len(layers)
    for number in sorted(range(len(layers)), key=lambda number: -layers[number].gain_over(old[number], topo, dispatch)):
        layer, left = layers[number], most - sum(moved)
        best = layer.held, layer.worst
        layer.held, layer.worst = migrated(best, old[number], layer.weight, topo, dispatch, left, go_on)
        moved[number] = int((layer.held != old[number]).sum())
    return moved


def _report(layer: Layer, topo: Topology, moved: int, *, late: bool) -> LayerReport:
    mean = float(layer.weight.sum() / topo.speed.sum())
    status = status_of(layer.worst, layer.bound, late=late)
    bound = min(layer.bound, layer.worst)  # they may differ by what a number has
    over = layer.worst / mean
    return LayerReport(layer.worst, bound, over, 0.0, moved, moved * topo.expert_bytes, status, layer.seconds)
