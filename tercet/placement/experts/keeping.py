"""From an old placement to a new one with few moved experts: some moves that bring a layer near the best one, or the
best one itself with its GPUs under the names that keep most of them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.optimize import linear_sum_assignment

from tercet.placement.expert_moves import settled
from tercet.placement.experts.arranging import Arrangement, worst_of
from tercet.placement.experts.model import Dispatch, Floats, Ints, Topology
from tercet.placement.experts.moving import repaired

NEAR = 0.02  # above the best one: as good, if fewer experts move


def migrated(
    best: Arrangement,
    old: Ints,
    weight: Floats,
    topo: Topology,
    dispatch: Dispatch,
    most_moved: int,
    go_on: Callable[[], bool],
) -> Arrangement:
    """One layer, old [G, K] -> another placement, of which at most `most_moved` slots hold another expert, and its
    highest load over speed. It is no worse than the old one."""
    target = best[1] * (1 + NEAR)
    if worst_of(old, weight, topo, dispatch) <= target:
        return old, worst_of(old, weight, topo, dispatch)
    few = repaired(old, weight, topo, dispatch, target, most_moved, go_on)
    if few[1] <= target or not go_on():
        return few
    whole = renamed(best[0], old, topo.speed)
    return (whole, best[1]) if (whole != old).sum() <= most_moved and best[1] < few[1] else few


def kept(held: Ints, old: Ints, speed: Floats) -> Ints:
    """`renamed` of each layer: held, old [L, G, K]."""
    return np.array([renamed(new, before, speed) for new, before in zip(held, old, strict=True)])


def renamed(new: Ints, old: Ints, speed: Floats) -> Ints:
    """new, old [G, K] -> the new one, its GPUs of one speed and their slots in the order that keeps most experts where
    they were."""
    experts = int(max(new.max(), old.max())) + 1
    has, had = (np.zeros((len(new), experts)) for _ in range(2))
    np.put_along_axis(has, new.astype(np.int64), 1.0, axis=1)
    np.put_along_axis(had, old.astype(np.int64), 1.0, axis=1)
    alike = speed[:, None] == speed[None, :]
    places, names = linear_sum_assignment(np.where(alike, had @ has.T, -1.0), maximize=True)
    found = np.empty_like(new)
    for place, name in zip(places, names, strict=True):
        found[place] = _ordered(new[name], old[place])
    return found


def _ordered(new: Ints, old: Ints) -> Ints:
    """A GPU's experts, those that it had in their slots. It may have had one twice, by a policy that allows that."""
    return np.array(settled(old.tolist(), new.tolist(), len(old)), new.dtype)
