"""What a group of ranks has counted of its routing. Apart from what solves placements: who counts needs no solver.

W windows   S data replicas   L layers   E experts   R ranks   P slots of a layer   N nodes, as shares are given
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tercet.errors import SpecError
from tercet.placement.expert_shares import check_shares

Floats = NDArray[np.float64]
MOST_ROWS, MOST_BYTES = 2.0**53, 2**50  # more of them is a damaged file


@dataclass(frozen=True, eq=False)
class Counts:
    """What a worker has counted, by windows. Raises SpecError for what cannot be."""

    load: NDArray[np.int64]  # [W, S, L, E] rows of each replica's requests: a row is a token at an expert in a layer
    computed: NDArray[np.int64]  # [W, L, R] of each rank, for requests of all; R / S ranks are of one replica
    phy2log: NDArray[np.int64]  # [L, P], the expert in each slot meanwhile; each rank has P / R of them
    nodes: int  # that the ranks are on, as many on each, in their order
    top_k: int
    expert_bytes: int  # of one expert in one layer
    window_s: float
    worker: str
    # [L, N, P] of replicas (expert_shares.py); zeros in a layer, or None: rows take replicas by turns
    shares: NDArray[np.int64] | None = None
    pairs: NDArray[np.int64] | None = None  # [W, L - 1, E, E] of a token's experts in a layer and in the next, sampled

    def __post_init__(self) -> None:
        if self.load.ndim != 4 or not self.load.size:
            raise SpecError(f"load is {self.load.shape}, and must be [windows, replicas, layers, experts]")
        windows, replicas, layers, experts = self.load.shape
        if self.computed.ndim != 3 or self.computed.shape[:2] != (windows, layers) or not self.computed.size:
            raise SpecError(f"computed is {self.computed.shape}, and must be [{windows}, {layers}, ranks]")
        for name in ("load", "computed"):
            rows = getattr(self, name)
            if (rows < 0).any() or rows.sum(dtype=np.float64) > MOST_ROWS:
                raise SpecError(f"{name} has values below 0, or of over {MOST_ROWS:g} in all")
        if self.phy2log.shape != (layers, self.phy2log.shape[-1] if self.phy2log.ndim else 0) or not self.phy2log.size:
            raise SpecError(f"phy2log is {self.phy2log.shape}, and load has {layers} layers")
        slots = self.phy2log.shape[1]
        if slots % self.ranks or self.nodes < 1 or self.ranks % self.nodes or self.ranks % replicas:
            told = f"{slots} slots, {replicas} data replicas and {self.nodes} nodes"
            raise SpecError(f"{told} do not fit {self.ranks} ranks")
        held = np.sort(self.phy2log, axis=1)
        if held[:, 0].min() < 0 or held[:, -1].max() >= experts or (_distinct(held) != experts).any():
            raise SpecError(f"phy2log must hold each of {experts} experts in each layer, and no other")
        if not 1 <= self.top_k <= experts or not 1 <= self.expert_bytes <= MOST_BYTES or not 0 <= self.window_s < 1e9:
            raise SpecError(
                f"top_k {self.top_k}, expert_bytes {self.expert_bytes} or window_s {self.window_s} cannot be"
            )
        self._check_shares()
        self._check_pairs()

    def _check_shares(self) -> None:
        if self.shares is None:
            return
        layers, slots = self.phy2log.shape
        fits = self.shares.ndim == 3 and self.shares.shape[::2] == (layers, slots)
        if not fits or not self.shares.shape[1] or self.ranks % self.shares.shape[1]:
            raise SpecError(f"shares is {self.shares.shape}, and must be [{layers}, nodes, {slots}]")
        for row, its in zip(self.phy2log, self.shares, strict=True):
            if its.any():
                check_shares(row, its, self.ranks)

    def _check_pairs(self) -> None:
        if self.pairs is None:
            return
        windows, _, layers, experts = self.load.shape
        if self.pairs.shape != (windows, layers - 1, experts, experts):
            raise SpecError(f"pairs is {self.pairs.shape}, and must be {(windows, layers - 1, experts, experts)}")
        if (self.pairs < 0).any() or self.pairs.sum(dtype=np.float64) > MOST_ROWS:
            raise SpecError(f"pairs has values below 0, or of over {MOST_ROWS:g} in all")

    @property
    def ranks(self) -> int:
        return int(self.computed.shape[2])

    @property
    def total(self) -> int:
        """Rows."""
        return int(self.load.sum())

    def of_windows(self, windows: slice) -> Floats:
        """-> [R, L, E], rows that each rank sends: those of a replica have its rows in equal parts."""
        each = self.ranks // self.load.shape[1]
        summed = self.load[windows].sum(axis=0).astype(np.float64)
        spread: Floats = np.repeat(summed, each, axis=0) / each
        return spread


def _distinct(held: NDArray[np.int64]) -> NDArray[np.int64]:
    """held [L, P], sorted -> [L]."""
    steps: NDArray[np.int64] = (np.diff(held, axis=1) != 0).sum(axis=1)
    return steps + 1


def survives(phy2log: NDArray[np.integer[Any]], ranks: int) -> bool:
    """phy2log [L, P]: whether each expert that is there lies on two ranks, so that one may be lost."""
    ranks_with = (holds(phy2log, ranks, int(phy2log.max()) + 1) > 0).sum(axis=1)
    return bool((ranks_with != 1).all())


def holds(phy2log: NDArray[np.integer[Any]], ranks: int, experts: int) -> NDArray[np.int64]:
    """phy2log [L, P] -> [L, R, E], how many slots of each rank hold the expert."""
    layers, slots = phy2log.shape
    names = (np.arange(layers)[:, None] * ranks + np.arange(slots) // (slots // ranks)) * experts + phy2log
    found: NDArray[np.int64] = np.bincount(names.ravel(), minlength=layers * ranks * experts)
    return found.reshape(layers, ranks, experts)
