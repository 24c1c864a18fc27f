"""A good chain of placements of all layers: one layer after the other, its neighbours fixed, forwards and backwards.

A chain is built from one layer on, each next one as if it were the last; several such starts, and the best is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tercet.placement.experts.arranging import shares_of, worst_of
from tercet.placement.experts.chain_layer import Items, Layer
from tercet.placement.experts.chain_model import Task
from tercet.placement.experts.model import Floats, Ints

STARTS = 4
MOST_SWEEPS = 12
LEAST_GAIN = 1e-4  # of a sweep: with less it was the last
ROUNDING = 1e-4  # to which shares of replicas are solved
EXACT = 1e-9


def good_chain(task: Task, rng: np.random.Generator, go_on: Callable[[], bool]) -> Ints:
    """-> held [L, G, K], the best of some starts; `task.floor` if there was no time for one."""
    items, best = items_of(task), None
    for number in range(STARTS):
        if not go_on():
            break
        descent = Descent(task, items)
        descent.build(rng, 0 if number == 0 else int(rng.integers(len(items))), go_on)
        descent.sweeps(rng, go_on)
        if best is None or descent.stays > best.stays:
            best = descent
    return task.floor if best is None else best.held()


def items_of(task: Task) -> list[Items]:
    """Of each layer, the floor's replicas slot by slot."""
    limit = (1 + EXACT) * task.most[:, None] * task.topo.speed
    return [_items(task, *each) for each in zip(task.floor, task.weight, limit, strict=True)]


def _items(task: Task, held: Ints, weight: Floats, limit: Floats) -> Items:
    expert, load = held.ravel().astype(np.int64), shares_of(held, weight, task.topo, task.dispatch).ravel()
    of_all, count = weight[expert], np.bincount(expert)[expert]
    fraction = np.where(of_all > 0, load / np.where(of_all > 0, of_all, 1.0), 1 / count)
    return Items(expert, fraction, load, limit, task.alike, len(weight))


class Descent:
    """gpu [L, P]: where each item is. A layer is nowhere until it is built."""

    def __init__(self, task: Task, items: list[Items]) -> None:
        self._task, self._items = task, items
        self._start = np.arange(task.topo.slots) // task.topo.slots_per_gpu
        self.gpu = np.tile(self._start, (len(items), 1))
        shape = (len(items), task.weight.shape[1], task.units)
        self._share, self._number = np.zeros(shape), np.zeros(shape)

    @property
    def stays(self) -> float:
        """Pairs on one unit."""
        flows = zip(self._share[:-1], self._task.pair, self._number[1:] > 0, strict=True)
        return float(sum((share * (pair @ there)).sum() for share, pair, there in flows))

    def build(self, rng: np.random.Generator, first: int, go_on: Callable[[], bool]) -> None:
        """One layer after the other behind the first, then those before it."""
        for layer in (*range(first, len(self.gpu)), *range(first - 1, -1, -1)):
            self.gpu[layer] = self._start
            self._visit(layer, rng if go_on() else None)

    def sweeps(self, rng: np.random.Generator, go_on: Callable[[], bool]) -> None:
        """Until one brings little."""
        for sweep in range(MOST_SWEEPS):
            before = self.stays
            for layer in range(len(self.gpu))[:: 1 if sweep % 2 else -1]:
                if not go_on():
                    return
                self._visit(layer, rng)
            if self.stays <= before * (1 + LEAST_GAIN):
                return

    def held(self) -> Ints:
        """-> [L, G, K]. A layer whose GPUs would be too busy when shares are solved anew gets its start back."""
        return np.array([self._held(layer) for layer in range(len(self.gpu))])

    def _visit(self, layer: int, rng: np.random.Generator | None) -> None:
        """rng: None if only the names of units may change."""
        pair, nothing = self._task.pair, np.zeros(self._share.shape[1:])
        ahead = pair[layer] @ (self._number[layer + 1] > 0) if layer < len(pair) else nothing
        behind = pair[layer - 1].T @ self._share[layer - 1] if layer else nothing
        step = Layer(self._items[layer], self.gpu[layer].copy(), ahead, behind)
        step.rename()
        if rng is not None:
            step.improve(rng)
        self.gpu[layer] = step.gpu
        self._share[layer], self._number[layer] = self._items[layer].tables(step.gpu)

    def _held(self, layer: int) -> Ints:
        task = self._task
        held = self._slots(layer)
        if worst_of(held, task.weight[layer], task.topo, task.dispatch) > task.most[layer] * (1 + ROUNDING):
            self.gpu[layer] = self._start
            self._visit(layer, None)
            held = self._slots(layer)
        return held

    def _slots(self, layer: int) -> Ints:
        order = np.argsort(self.gpu[layer], kind="stable")
        held: Ints = self._task.floor[layer].ravel()[order].reshape(self._task.topo.gpus, -1)
        return held
