"""The best chain of placements of all layers, by dynamic programming over all partitions of few experts.

A layer's state says which unit has each expert; the worth of two states in neighbouring layers is the pairs that stay,
a matrix product for all of them at once. Units that are alike may change their names in all layers together, so that
the best chain up to a state is worth the same for each of its namings: one state of each naming stands for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from math import factorial

import numpy as np
from numpy.typing import NDArray

from tercet.placement.experts.chain_model import Task
from tercet.placement.experts.model import Floats, Ints, Topology

MOST_STATES = 200_000
MOST_WORK = 2e10  # multiplications
BLOCK = 2_000_000  # pairs of states in memory
ROUNDING = 1e-9
Longs = NDArray[np.int64]


def is_few(task: Task) -> bool:
    """Whether `best_chain` ends within seconds. No slot is left for replicas."""
    topo, units, (layers, experts) = task.topo, task.units, task.weight.shape
    if experts != topo.slots:
        return False
    gpus, slots = topo.gpus // units, experts // units
    states = factorial(experts) // factorial(slots) ** units
    inside = factorial(slots) // factorial(topo.slots_per_gpu) ** gpus // (factorial(gpus) if _alike(topo) else 1)
    named = states // factorial(units) if _alike(topo) else states
    work = states * named * experts * units * layers
    return bool(states * inside**units <= MOST_STATES and work <= MOST_WORK)


def best_chain(task: Task, go_on: Callable[[], bool]) -> Ints | None:
    """-> held [L, G, K] with the most pairs that stay and no GPU above `task.most`; None if time ran out."""
    topo, units = task.topo, task.units
    states = _States.of(task.weight.shape[1], topo, units)
    worst = [states.worst(row, topo) for row in task.weight]
    allowed = [states.least(each) <= most * (1 + ROUNDING) for each, most in zip(worst, task.most, strict=True)]
    value = [np.where(allowed[0], 0.0, -np.inf)]  # of the best chain that ends in each state
    for joint, fits in zip(task.pair, allowed[1:], strict=True):
        if not go_on():
            return None
        value.append(np.where(fits, states.onwards(value[-1], joint), -np.inf))
    at = int(value[-1].argmax())
    chain = [at]
    for joint, before in zip(task.pair[::-1], value[-2::-1], strict=True):
        at = int((before + states.has @ (joint @ states.has[at].reshape(units, -1).T).T.ravel()).argmax())
        chain.append(at)
    return np.array([states.held(at, each, topo) for at, each in zip(chain[::-1], worst, strict=True)], dtype=np.int32)


@dataclass(frozen=True)
class _States:
    gpu_of: Longs  # [n, E], all placements up to what GPUs of one unit are called
    state: Longs  # [n], whose units hold the same
    has: Floats  # [m, U * E], of each state
    naming: Longs  # [m], the state that stands for it, by number among those that do
    named: Longs  # [q], those that do

    @classmethod
    def of(cls, experts: int, topo: Topology, units: int) -> _States:
        gpu_of = _placements(experts, topo, units)
        unit_of, state = np.unique(gpu_of // (topo.gpus // units), axis=0, return_inverse=True)
        has = (unit_of[:, None, :] == np.arange(units)[:, None]).astype(np.float64)
        first = has.argmax(axis=2).argsort(axis=1).argsort(axis=1)  # of each unit, in the order of its first expert
        plain = np.take_along_axis(first, unit_of, axis=1) if _alike(topo) else unit_of
        _, named, naming = np.unique(plain, axis=0, return_index=True, return_inverse=True)
        return cls(gpu_of, state.ravel(), has.reshape(len(has), -1), naming.ravel(), named)

    def worst(self, weight: Floats, topo: Topology) -> Floats:
        """weight [E] -> [n], the highest load over speed."""
        loads = [(self.gpu_of == gpu) @ weight / speed for gpu, speed in enumerate(topo.speed)]
        worst: Floats = np.max(loads, axis=0)
        return worst

    def least(self, worst: Floats) -> Floats:
        """worst [n] -> [m], of the best placement in each state."""
        least = np.full(len(self.has), np.inf)
        np.minimum.at(least, self.state, worst)
        return least

    def onwards(self, value: Floats, joint: Floats) -> Floats:
        """value [m] of the states of a layer, joint [E, E] -> [m], the same one layer on."""
        reached = np.flatnonzero(np.isfinite(value))
        has, experts = self.has[reached], len(joint)
        best = np.empty(len(self.named))
        step = max(1, BLOCK // len(reached))
        for begin in range(0, len(best), step):
            after = self.has[self.named[begin : begin + step]].reshape(-1, experts) @ joint.T
            worth = after.reshape(-1, self.has.shape[1]) @ has.T
            worth += value[reached]
            best[begin : begin + step] = worth.max(axis=1)
        return best[self.naming]

    def held(self, state: int, worst: Floats, topo: Topology) -> Longs:
        """-> [G, K], with the lowest load that the state has."""
        inside = np.flatnonzero(self.state == state)
        gpu_of = self.gpu_of[inside[worst[inside].argmin()]]
        return np.argsort(gpu_of, kind="stable").reshape(topo.gpus, -1)


def _alike(topo: Topology) -> bool:
    return bool((topo.speed == topo.speed[0]).all())


def _placements(experts: int, topo: Topology, units: int) -> Longs:
    """-> [n, E], the GPU of each expert. GPUs of a unit that are alike come in the order of their first experts."""
    found = np.full((1, experts), -1)
    inside = topo.gpus // units
    for gpu in range(topo.gpus):
        free = np.argsort(found != -1, axis=1, kind="stable")[:, : experts - gpu * topo.slots_per_gpu]
        chosen = np.array(list(combinations(range(free.shape[1]), topo.slots_per_gpu)))
        new = np.repeat(found, len(chosen), axis=0)
        np.put_along_axis(new, free[:, chosen].reshape(len(new), -1), gpu, axis=1)
        if gpu % inside and _alike(topo):
            new = new[(new == gpu - 1).argmax(axis=1) < (new == gpu).argmax(axis=1)]
        found = new
    return found
