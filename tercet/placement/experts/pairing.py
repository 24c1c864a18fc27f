"""Two slots a GPU, all GPUs alike, weighted dispatch: experts in groups that share GPUs with no other.

A group of m experts on m - 1 GPUs can be laid out so that each GPU has as much to do as the others, whatever the
loads: the smallest expert goes to a GPU whole, the largest one fills that up, and so on. So G GPUs and E experts,
G < E < 2G, make E - G groups, and the level of a group is its tokens over its GPUs. Groups are made alike by parting
the experts of the worst one and of another one anew, again and again: bin covering with few items a bin.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

from tercet.placement.experts.model import Dispatch, Floats, Ints, Topology

MOST_PARTED = 10  # experts of two groups at once: each more doubles the ways to part them
LEAST_GAIN = 1e-6  # relative


def can_pair(experts: int, topo: Topology, dispatch: Dispatch) -> bool:
    alike = topo.slots_per_gpu == 2 and bool((topo.speed == topo.speed[0]).all())
    return alike and topo.gpus < experts < topo.slots and topo.least_replicas == 1 and dispatch is Dispatch.WEIGHTED


def paired(weight: Floats, topo: Topology, target: float, go_on: Callable[[], bool]) -> Ints:
    """weight [E] -> held [G, 2]. target: a load that is good enough."""
    group = _first(weight, topo.gpus)
    while _improve(weight, group, target) and go_on():
        pass
    groups = [(group == each).nonzero()[0] for each in range(int(group.max()) + 1)]
    return np.concatenate([_laid_out(weight, members) for members in groups])


def _first(weight: Floats, gpus: int) -> Ints:
    """-> the group of each expert [E]. The hottest ones each begin one; the one that would have most to do gets one GPU
    more until all are given; then the others, warmest first, go to where most room is for each that is still wanted."""
    order = np.argsort(-weight, kind="stable")
    hot, cold = np.split(order, [len(weight) - gpus])
    count = np.ones(len(hot), dtype=np.int32)
    for _ in range(len(cold) - len(hot)):
        count[int((weight[hot] / count + weight[cold].mean()).argmax())] += 1
    group, room = np.empty(len(weight), dtype=np.int32), weight.sum() / gpus * count - weight[hot]
    group[hot] = np.arange(len(hot))
    for expert in cold.tolist():
        chosen = int(np.where(count > 0, room / np.maximum(count, 1), -np.inf).argmax())
        group[expert] = chosen
        count[chosen] -= 1
        room[chosen] -= weight[expert]
    return group


def _improve(weight: Floats, group: Ints, target: float) -> bool:
    """Part the worst group and another one anew, so that neither is as bad. -> whether that was wanted and can be."""
    level = np.bincount(group, weight) / (np.bincount(group) - 1)
    worst = int(level.argmax())
    below = level[worst] * (1 - LEAST_GAIN)
    others = (int(other) for other in np.argsort(level, kind="stable") if other != worst)
    return below > target and any(_part(weight, group, worst, other, below) for other in others)


def _part(weight: Floats, group: Ints, one: int, other: int, below: float) -> bool:
    """By the best of all ways, if both groups get below that level by it."""
    moved = np.concatenate([_movable(group, each) for each in (one, other)])
    ways, worse = _ways(len(moved)), np.zeros(1 << len(moved))
    for each, part in ((one, ways), (other, ~ways)):
        stays = group == each
        stays[moved] = False
        gpus = stays.sum() + part.sum(axis=1) - 1
        tokens = weight[stays].sum() + part @ weight[moved]
        worse = np.maximum(worse, np.where(gpus > 0, tokens / np.maximum(gpus, 1), np.inf))
    best = int(worse.argmin())
    if worse[best] >= below:
        return False
    group[moved] = np.where(ways[best], one, other)
    return True


def _movable(group: Ints, number: int) -> NDArray[np.int64]:
    """-> its experts, or as many as may be parted, evenly among them."""
    members = (group == number).nonzero()[0]
    most = min(len(members), MOST_PARTED // 2)
    some: NDArray[np.int64] = members[np.linspace(0, len(members) - 1, most).round().astype(np.int64)]
    return some


@cache
def _ways(count: int) -> NDArray[np.bool_]:
    """-> [2 ** count, count]"""
    ways: NDArray[np.bool_] = (np.arange(1 << count)[:, None] >> np.arange(count)) & 1 == 1
    return ways


def _laid_out(weight: Floats, members: NDArray[np.int64]) -> Ints:
    """-> held [m - 1, 2]. Each GPU takes the smallest expert whole and what fits of the largest one; where both fit
    whole, all that are left fit alone, and go with the largest one."""
    left = {int(expert): float(weight[expert]) for expert in members}
    level = sum(left.values()) / (len(left) - 1)
    held: list[tuple[int, int]] = []
    while len(left) > 1:
        small, large = (choose(left, key=lambda expert: (left[expert], expert)) for choose in (min, max))
        held.append((small, large))
        left[large] = max(0.0, left[large] - (level - left.pop(small)))
    return np.array(held, dtype=np.int32)
