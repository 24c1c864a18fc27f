"""What objective `interlayer` counts, and what its solvers are given."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tercet.placement.experts.model import NO_SLOT, Dispatch, Floats, Ints, Placement, Topology


def units_of(topo: Topology) -> int:
    """Nodes if there are several, else GPUs."""
    return topo.nodes if topo.nodes > 1 else topo.gpus


def local_pairs(placement: Placement, pair: Floats, topo: Topology) -> Floats:
    """pair [L - 1, E, E] -> [L - 1], those that stay on their unit."""
    layers, experts, _ = placement.log2phy.shape
    units, real = units_of(topo), placement.log2phy != NO_SLOT
    unit = np.where(real, placement.log2phy // (topo.slots // units), 0)
    share, number = np.zeros((layers, experts, units)), np.zeros((layers, experts, units))
    at = (np.arange(layers)[:, None, None], np.arange(experts)[None, :, None], unit)
    np.add.at(share, at, np.where(real, placement.dispatch_prob.mean(axis=1, dtype=np.float64), 0.0))
    np.add.at(number, at, real.astype(np.float64))
    stays: Floats = (share[:-1] * (pair @ (number[1:] > 0))).sum(axis=(1, 2))
    return stays


def local_fraction(placement: Placement, pair: Floats, topo: Topology) -> float:
    """Of all pairs; 0 if there are none. The placement may come from elsewhere, and the pairs from another time."""
    total = float(pair.sum())
    return float(local_pairs(placement, pair, topo).sum()) / total if total else 0.0


@dataclass(frozen=True)
class Task:
    weight: Floats  # [L, E] tokens
    pair: Floats  # [L - 1, E, E]
    topo: Topology
    dispatch: Dispatch
    floor: Ints  # held [L, G, K], of objective `balance`
    worst: Floats  # [L], its highest load over speed
    eps: float  # by how much of it a placement may be worse

    @property
    def units(self) -> int:
        return units_of(self.topo)

    @property
    def most(self) -> Floats:
        """-> [L], what no GPU's load over speed is above."""
        return self.worst * (1 + self.eps)

    @property
    def unit_speed(self) -> Floats:
        """-> [U, GPUs of a unit]."""
        return self.topo.speed.reshape(self.units, -1)

    @property
    def alike(self) -> NDArray[np.bool_]:
        """-> [U, U], whether two units may change all their experts."""
        same: NDArray[np.bool_] = (self.unit_speed[:, None] == self.unit_speed[None]).all(axis=2)
        return same
