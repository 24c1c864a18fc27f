"""How the tokens of each expert are shared among its replicas so that the busiest GPU has little to do, for all layers
at once: the linear programme  min max load  over the shares of a given placement.

Each expert in turn fills its GPUs up to one level (water-filling), given what the others put there. That is coordinate
descent on the sum of load^2 / speed, whose minimum also has the lowest maximum, and its step is exact.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tercet.placement.experts.model import Floats, Ints

SWEEPS = 100  # if they take so many
QUICK = 8  # behind the first few a load seldom changes by more than a thousandth
ENOUGH = 1e-5  # of the mean load: a sweep that moves less is the last


class Sharing:
    """Of a placement with L layers of E experts: shares of replicas, which follow the load."""

    def __init__(self, held: Ints, experts: int, speed: Floats) -> None:
        """held [L, G, K]: experts. speed [G]."""
        layers, gpus, slots = held.shape
        self._held, self._speed = held.reshape(layers, -1).astype(np.int64), np.tile(speed, layers)
        self.count = _count(self._held, experts)
        self._order, self._first = np.argsort(self._held, axis=1, kind="stable"), np.cumsum(self.count, axis=1)
        self._first -= self.count
        self._gpu_of = np.arange(gpus * slots) // slots
        self._first_there = _first_there(held)
        self._gpus = gpus
        self._turns = [self._turn(turn) for turn in range(int((self.count > 1).sum(axis=1).max(initial=0)))]

    def solve(self, weight: Floats, start: Floats | None = None, sweeps: int = SWEEPS) -> Floats:
        """weight [L, E] -> tokens of each slot [L, G, K]. start: such shares to go on from, of another load; else each
        replica has as much as the others."""
        layers, _ = weight.shape
        share = self._flat_even(weight) if start is None else self._scaled(weight, start.reshape(layers, -1))
        share = self._merged(share)
        load = share.reshape(layers, self._gpus, -1).sum(axis=2).ravel()
        flat, small = share.ravel(), ENOUGH * float(load.mean())
        for _ in range(sweeps):
            moved = 0.0
            for layer, expert, slots, gpus, real in self._turns:
                moved = max(moved, self._fill(flat, load, weight[layer, expert], slots, gpus, real))
            if moved <= small:
                break
        return share.reshape(layers, self._gpus, -1)

    def even(self, weight: Floats) -> Floats:
        """weight [L, E] -> the same, each replica with as many tokens as the others of its expert."""
        return self._flat_even(weight).reshape(len(weight), self._gpus, -1)

    def _flat_even(self, weight: Floats) -> Floats:
        shares: Floats = np.take_along_axis(weight / self.count, self._held, axis=1)
        return shares

    def _scaled(self, weight: Floats, start: Floats) -> Floats:
        """The same proportions; even ones where the expert had no tokens."""
        layers, experts = weight.shape
        names = self._held + np.arange(layers)[:, None] * experts
        total = np.bincount(names.ravel(), start.ravel(), layers * experts).reshape(layers, experts)
        before = np.take_along_axis(total, self._held, axis=1)
        wanted = np.take_along_axis(weight, self._held, axis=1)
        scaled: Floats = np.where(
            before > 0, start * wanted / np.where(before > 0, before, 1.0), self._flat_even(weight)
        )
        return scaled

    def _merged(self, share: Floats) -> Floats:
        """[L, P], the first slot that a GPU has of an expert with the tokens of all of them."""
        at = self._first_there + np.arange(len(share))[:, None] * share.shape[1]
        merged: Floats = np.bincount(at.ravel(), share.ravel(), share.size).astype(np.float64)
        return merged.reshape(share.shape)

    def _turn(self, number: int) -> tuple[NDArray[np.int64], ...]:
        """Of each layer its expert of this number among those with replicas, if it has so many: layer [n], expert [n],
        and [n, R] its slots, their GPUs over all layers, and whether each is real or pads."""
        many = self.count > 1
        layer, expert = ((many.cumsum(axis=1) == number + 1) & many).nonzero()
        width = int(self.count[layer, expert].max())
        turn = np.arange(width)
        real = turn < self.count[layer, expert][:, None]
        at = np.where(real, self._first[layer, expert][:, None] + turn, self._first[layer, expert][:, None])
        slots = np.take_along_axis(self._order[layer], at, axis=1)
        real &= np.take_along_axis(self._first_there[layer], slots, axis=1) == slots
        gpus = self._gpu_of[slots] + layer[:, None] * self._gpus
        return layer, expert, slots + layer[:, None] * self._held.shape[1], gpus, real

    def _fill(
        self,
        share: Floats,
        load: Floats,
        tokens: Floats,
        slots: NDArray[np.int64],
        gpus: NDArray[np.int64],
        real: NDArray[np.int64],
    ) -> float:
        """Share `tokens` [n] anew among `slots` [n, R]. -> the most that one of them has gained."""
        speed, before = self._speed[gpus], np.where(real, share[slots], 0.0)
        rest = np.where(real, load[gpus] - before, np.inf)
        order = np.argsort(rest / speed, axis=1)
        filled = np.take_along_axis(np.where(real, rest, 0.0), order, axis=1).cumsum(axis=1)
        ordered = np.take_along_axis(np.where(real, speed, 0.0), order, axis=1)
        level = (tokens[:, None] + filled) / ordered.cumsum(axis=1)  # if just the first ones get some
        following = np.take_along_axis(rest / speed, order, axis=1)[:, 1:]
        enough = np.hstack([level[:, :-1] <= following, np.ones((len(level), 1), dtype=bool)]).argmax(axis=1)
        found = level[np.arange(len(level)), enough][:, None]
        after = np.where(real, np.maximum(found * speed - rest, 0.0), 0.0)
        change = after - before
        share[slots[real]], load[gpus[real]] = after[real], load[gpus[real]] + change[real]
        return float(change.max(initial=0.0))


def _first_there(held: Ints) -> NDArray[np.int64]:
    """held [L, G, K] -> [L, P], of each slot the first one with the same expert on its GPU: some policies put one there
    twice."""
    layers, gpus, slots = held.shape
    same = (held[:, :, :, None] == held[:, :, None, :]).argmax(axis=3)
    found: NDArray[np.int64] = (same + np.arange(gpus)[:, None] * slots).reshape(layers, -1)
    return found


def _count(held: NDArray[np.int64], experts: int) -> NDArray[np.int64]:
    """held [L, P] -> replicas of each expert [L, E]."""
    names = held + np.arange(len(held))[:, None] * experts
    return np.bincount(names.ravel(), minlength=len(held) * experts).reshape(len(held), experts)
