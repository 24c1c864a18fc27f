"""Objective `interlayer`: experts that follow one another in neighbouring layers on one unit, so that a token stays.

A unit is a node if there are several, else a GPU. A pair (expert of layer l, expert of layer l + 1) stays if the second
has a replica on the unit of the replica of the first that the token went to; tokens are taken to go to an expert's
replicas in the shares of `dispatch_prob`, mean over nodes, wherever they come from.

balance placement ─> few states: exact, by dynamic programming (chain_exact.py)
                  ─> else: linear assignments, layer by layer (chain_descent.py)       chain_bound.py: the certificate

No GPU's load is above 1 + eps times what `balance` reaches, whose placement is returned if nothing better is found.
The objective is MoETuner's (arXiv 2502.06643) and ExFlow's (arXiv 2401.08383), who solve it as integer programmes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy.optimize import linear_sum_assignment

from tercet.errors import SpecError
from tercet.placement.experts.arranging import worst_of
from tercet.placement.experts.chain_bound import Side, stays_at_most
from tercet.placement.experts.chain_descent import ROUNDING, good_chain
from tercet.placement.experts.chain_exact import best_chain, is_few
from tercet.placement.experts.chain_model import Task, local_pairs
from tercet.placement.experts.keeping import kept
from tercet.placement.experts.model import (
    Clock,
    Dispatch,
    Floats,
    Ints,
    LayerReport,
    Placement,
    RoutingStats,
    Topology,
    status_of,
)
from tercet.placement.experts.tables import placement_of

SEARCH = 0.6  # of the time; the rest is for the bounds


def check_pairs(stats: RoutingStats, eps: float) -> Floats:
    """-> pair. Raises SpecError for what this objective cannot be asked of."""
    if stats.pair is None:
        recorded = "`tercet experts export --pairs` records them"
        raise SpecError(f"objective interlayer needs pairs, which were not counted; {recorded}")
    if not len(stats.pair):
        raise SpecError("objective interlayer needs at least 2 layers, and there is 1")
    if not eps >= 0:
        raise SpecError(f"eps is {eps}, and must be at least 0")
    return stats.pair


def chained(
    stats: RoutingStats,
    topo: Topology,
    balance: Callable[[], Placement],
    *,
    old: Placement | None,
    dispatch: Dispatch,
    eps: float,
    seed: int,
    clock: Clock,
    deadline: float,
) -> Placement:
    """balance: makes the placement of objective `balance`. Of each layer, the reported objective is the pairs with the
    next layer that leave their unit, and the bound what no placement with as many replicas of each expert and no higher
    loads is below; if the chain is exact, no such placement's sum over layers is below that of the bounds. The last
    layer has none. Raises SpecError, see `check_pairs`."""
    began, pair, floor, weight = clock(), check_pairs(stats, eps), balance(), stats.weight
    worst = np.array([layer.objective for layer in floor.layers])
    task = Task(weight, pair, topo, dispatch, floor.phy2log.reshape(len(weight), topo.gpus, -1), worst, eps)
    held = best_chain(task, lambda: clock() < deadline) if is_few(task) else None
    exact = held is not None
    if held is None:
        now = clock()
        search_until = now + SEARCH * (deadline - now)
        held = good_chain(task, np.random.default_rng(seed), lambda: clock() < search_until)
    plan = placement_of(held, weight, topo, dispatch)
    if local_pairs(plan, pair, topo).sum() <= local_pairs(floor, pair, topo).sum():
        held = task.floor
    if old is not None:
        held = _named(held, old.phy2log.reshape(held.shape), task)
    plan = placement_of(held, weight, topo, dispatch)
    leaves = np.maximum(pair.sum(axis=(1, 2)) - local_pairs(plan, pair, topo), 0.0)
    bound = leaves if exact else _bounds(task, leaves, plan.count, lambda: clock() < deadline)
    moved = np.zeros(len(weight), int) if old is None else (plan.phy2log != old.phy2log).sum(axis=1)
    late = clock() >= deadline
    rows = zip(held, weight, [*leaves, 0.0], [*bound, 0.0], moved, strict=True)
    seconds = (clock() - began) / len(weight)
    return replace(plan, layers=tuple(_report(task, *row, late=late, seconds=seconds) for row in rows))


def _bounds(task: Task, leaves: Floats, count: Ints, go_on: Callable[[], bool]) -> Floats:
    """leaves [L - 1] -> [L - 1], pairs that leave at least; 0 where time ran out."""
    most = task.most * (1 + ROUNDING) * task.unit_speed.sum(axis=1).max()
    sides = [Side(*each) for each in zip(task.weight, count, most, strict=True)]
    found = np.zeros(len(leaves))
    for at, joint in enumerate(task.pair):
        if go_on():
            stays = stays_at_most(joint, sides[at], sides[at + 1], task.units, task.topo.slots // task.units)
            found[at] = joint.sum() - stays
    bounds: Floats = np.minimum(found, leaves)  # they may differ by what a number has
    return bounds


def _named(held: Ints, old: Ints, task: Task) -> Ints:
    """With those names of units, the same in all layers, of GPUs within units and of slots that keep most slots."""
    layers, units = len(held), task.units
    has, had = (np.zeros((layers, units, task.weight.shape[1])) for _ in range(2))
    for table, each in ((has, held), (had, old)):
        np.put_along_axis(table, each.reshape(layers, units, -1).astype(np.int64), 1.0, axis=2)
    both = np.einsum("lue,lve->uv", had, has)
    names = linear_sum_assignment(np.where(task.alike, both, -np.inf), maximize=True)[1]
    shape = (layers, units, -1, held.shape[2])
    placed, before = held.reshape(shape)[:, names], old.reshape(shape)
    each_unit = [kept(placed[:, unit], before[:, unit], speed) for unit, speed in enumerate(task.unit_speed)]
    return np.stack(each_unit, axis=1).reshape(held.shape)


def _report(
    task: Task, held: Ints, weight: Floats, leaves: float, bound: float, moved: int, *, late: bool, seconds: float
) -> LayerReport:
    mean = float(weight.sum() / task.topo.speed.sum())
    worst = worst_of(held, weight, task.topo, task.dispatch) / mean
    status = status_of(leaves, bound, late=late)
    size = int(moved) * task.topo.expert_bytes
    return LayerReport(float(leaves), float(bound), worst, 0.0, int(moved), size, status, seconds)
