"""One layer while its neighbours are fixed: its items onto GPUs so that many pairs stay and no GPU has too much.

An item is a replica with its share of its expert's tokens. What it is worth on a unit does not depend on where items
of other experts are. So the best places for one item of every expert are a linear assignment, and swaps can be judged
all at once; they bring the loads back within their limits at little loss.

P items   E experts   G GPUs   U units; GPU g is of unit g // (G / U)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from tercet.placement.experts.model import Floats

PRICES = (0.1, 1.0, 10.0, 100.0, 1000.0)  # of a token above a limit, in pairs of a token
LEAST_SWAP = 1e-9  # of all pairs
Longs = NDArray[np.int64]


@dataclass(frozen=True)
class Items:
    """Of one layer."""

    expert: Longs  # [P]
    fraction: Floats  # [P], of its expert's tokens
    load: Floats  # [P] tokens
    most: Floats  # [G] tokens
    alike: NDArray[np.bool_]  # [U, U], whether two units may change all their items
    experts: int

    def tables(self, gpu: Longs) -> tuple[Floats, Floats]:
        """gpu [P] -> [E, U], the share of an expert's tokens on a unit, and its replicas there."""
        share, number = (np.zeros((self.experts, len(self.alike))) for _ in range(2))
        at = (self.expert, gpu // (len(self.most) // len(self.alike)))
        np.add.at(share, at, self.fraction)
        np.add.at(number, at, 1.0)
        return share, number


class Layer:
    """gpu [P]: where each item is."""

    def __init__(self, items: Items, gpu: Longs, ahead: Floats, behind: Floats) -> None:
        """ahead [E, U]: pairs of all an expert's tokens with experts of the next layer that are on a unit; behind
        [E, U]: pairs of an expert with tokens of the layer before that come from a unit."""
        self._is, self.gpu, self._ahead, self._behind = items, gpu, ahead, behind
        self._inside = len(items.most) // len(items.alike)
        total = float(ahead.sum() + behind.sum())
        self._least, self._price = LEAST_SWAP * total, total / float(items.load.sum())

    @property
    def worth(self) -> float:
        share, number = self._is.tables(self.gpu)
        return float((share * self._ahead).sum() + self._behind[number > 0].sum())

    @property
    def excess(self) -> float:
        return float(np.maximum(self._over(), 0.0).sum())

    def rename(self) -> None:
        """The best names for units: what is on them stays together."""
        share, number = self._is.tables(self.gpu)
        worth = share.T @ self._ahead + (number > 0).T @ self._behind
        names = linear_sum_assignment(np.where(self._is.alike, worth, -np.inf), maximize=True)[1]
        unit, place = np.divmod(self.gpu, self._inside)
        self.gpu = names[unit] * self._inside + place

    def improve(self, rng: np.random.Generator) -> None:
        """By swaps, then by an assignment and swaps; what ends worse is undone."""
        for assigns in (False, True):
            before, excess, worth = self.gpu, self.excess, self.worth
            if assigns:
                self._assign(rng)
            self._swap()
            if self.excess > excess or self.worth < worth:
                self.gpu = before

    def _gain(self) -> Floats:
        """-> [P, G], what an item is worth on a GPU, given the other items of its expert; -inf where one of them is."""
        expert, every = self._is.expert, np.arange(len(self.gpu))
        there = np.zeros((self._is.experts, len(self._is.most)))
        there[expert, self.gpu] = 1.0
        others = there[expert]
        others[every, self.gpu] = 0.0
        alone = others.reshape(len(expert), -1, self._inside).sum(axis=2) == 0
        worth = self._is.fraction[:, None] * self._ahead[expert] + self._behind[expert] * alone
        return np.where(others == 0, np.repeat(worth, self._inside, axis=1), -np.inf)

    def _assign(self, rng: np.random.Generator) -> None:
        """One item of every expert to the best places, whatever the load; the others stay."""
        order = rng.permutation(len(self.gpu))
        free = order[np.unique(self._is.expert[order], return_index=True)[1]]
        gain = self._gain()
        gain[np.arange(len(gain)), self.gpu] += self._least  # of equals, where it is
        items, places = linear_sum_assignment(gain[free][:, self.gpu[free]], maximize=True)
        gpu = self.gpu.copy()
        gpu[free[items]] = self.gpu[free[places]]
        self.gpu = gpu

    def _swap(self) -> None:
        """While it helps. A token above its GPU's limit costs more and more pairs."""
        for price in PRICES:
            while self._swaps(self._price * price):
                pass
            if not self.excess:
                return

    def _swaps(self, price: float) -> bool:
        """The best swap of each item, if neither has been swapped yet. -> whether there was any."""
        gpu, expert, load = self.gpu.copy(), self._is.expert, self._is.load
        gain, over = self._gain(), self._over()
        moved = (gain - gain[np.arange(len(gpu)), gpu][:, None])[:, gpu]
        here = over[gpu][:, None]
        one = moved - price * (np.maximum(here - load[:, None] + load, 0.0) - np.maximum(here, 0.0))
        score = one + one.T
        score[(gpu[:, None] == gpu) | (expert[:, None] == expert)] = 0.0
        partner, best = score.argmax(axis=1), score.max(axis=1)
        used: set[int] = set()
        for i in np.argsort(-best, kind="stable")[: np.count_nonzero(best > self._least)].tolist():
            j = int(partner[i])
            u, v, more = int(gpu[i]), int(gpu[j]), float(load[j] - load[i])
            if used.isdisjoint((int(expert[i]), int(expert[j]))):
                excess = max(over[u] + more, 0) - max(over[u], 0) + max(over[v] - more, 0) - max(over[v], 0)
                if moved[i, j] + moved[j, i] > price * excess + self._least:
                    used |= {int(expert[i]), int(expert[j])}
                    gpu[[i, j]] = v, u
                    over[[u, v]] += more, -more
        self.gpu = gpu
        return bool(used)

    def _over(self) -> Floats:
        """-> [G], tokens above the limit."""
        over: Floats = np.bincount(self.gpu, self._is.load, len(self._is.most)) - self._is.most
        return over
