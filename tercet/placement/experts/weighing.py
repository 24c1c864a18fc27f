"""What another placement would be worth to a group of ranks that has counted its routing. Pure.

W windows   S data replicas   L layers   E experts   R ranks, G GPUs of the topology: the same   P slots of a layer
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tercet.errors import SpecError
from tercet.placement.experts.eplb import rebalance_experts
from tercet.placement.experts.model import Dispatch, Floats, Objective, Placement, RoutingStats, Topology
from tercet.placement.experts.scoring import dispatched, evenly
from tercet.placement.experts.solve import solve_experts


@dataclass(frozen=True, eq=False)
class Counts:
    """What a worker has counted, by windows. Raises SpecError for what cannot be."""

    load: NDArray[np.int64]  # [W, S, L, E] tokens of each replica's requests
    phy2log: NDArray[np.int64]  # [L, P], the expert in each slot meanwhile
    ranks: int  # each with P / ranks slots of a layer, and ranks / S of them of a replica
    nodes: int  # that the ranks are on, as many on each, in their order
    top_k: int
    expert_bytes: int  # of one expert in one layer
    window_s: float
    worker: str

    def __post_init__(self) -> None:
        if self.load.ndim != 4 or not self.load.size:
            raise SpecError(f"load is {self.load.shape}, and must be [windows, replicas, layers, experts]")
        if (self.load < 0).any():
            raise SpecError(f"load has {int((self.load < 0).sum())} values below 0")
        _, replicas, layers, experts = self.load.shape
        slots = self.phy2log.shape[-1]
        if self.phy2log.shape != (layers, slots) or not slots:
            raise SpecError(f"phy2log is {self.phy2log.shape}, and load has {layers} layers")
        divides = self.ranks >= 1 and self.nodes >= 1 and not (slots % self.ranks or self.ranks % self.nodes)
        if not divides or self.ranks % replicas:
            told = f"{slots} slots, {replicas} data replicas and {self.nodes} nodes"
            raise SpecError(f"{told} do not fit {self.ranks} ranks")
        held = np.sort(self.phy2log, axis=1)
        if held[:, 0].min() < 0 or held[:, -1].max() >= experts or (_distinct(held) != experts).any():
            raise SpecError(f"phy2log must hold each of {experts} experts in each layer, and no other")

    @property
    def total(self) -> int:
        """Tokens times experts times layers."""
        return int(self.load.sum())

    def of_windows(self, windows: slice) -> Floats:
        """-> [R, L, E], tokens that each rank sends: those of a replica have its rows in equal parts."""
        each = self.ranks // self.load.shape[1]
        summed = self.load[windows].sum(axis=0).astype(np.float64)
        spread: Floats = np.repeat(summed, each, axis=0) / each
        return spread


@dataclass(frozen=True)
class Wish:
    """What a placement is solved for, and how ranks share tokens among replicas: `even` as they do today (`served`), or
    `weighted`, by the placement's shares, which they cannot yet. None: as it is now."""

    policy: str = "ilp"  # or eplb
    objective: Objective = Objective.BALANCE
    dispatch: Dispatch = Dispatch.EVEN
    nodes: int | None = None
    redundancy: int | None = None  # slots of a layer beyond one for each expert
    max_moved_bytes: int | None = None
    time_limit_s: float = 10.0
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Weighed:
    placement: Placement
    topology: Topology
    before: Floats  # [L, G] tokens that each rank computes in the windows that both are judged by
    after: Floats
    moved: NDArray[np.int64]  # [L] slots that would hold another expert
    held_out: bool  # it was solved on other windows than those it is judged by


def weigh(counts: Counts, wish: Wish) -> Weighed:
    """Solves on all windows but the last one, and judges by that one; where there is one only, by the same. Raises
    SpecError, UnsupportedSpec."""
    if not counts.total:
        raise SpecError("nothing was counted: no request was computed in these windows")
    held_out = len(counts.load) > 1
    known, judged = (slice(0, -1), slice(-1, None)) if held_out else (slice(None), slice(None))
    topo, stats = _topology(counts, wish), _stats(counts, known, wish)
    placement = _solved(counts, stats, topo, wish)
    sent = counts.of_windows(judged)
    before, after = served(counts.phy2log, sent), served(placement.phy2log, sent)
    if wish.dispatch is Dispatch.WEIGHTED:
        after = dispatched(placement, _by_node(sent, topo.nodes), wish.dispatch).sum(axis=1)
    moved = np.full(len(before), topo.slots)
    if before.shape == after.shape:
        moved = (counts.phy2log != placement.phy2log).sum(axis=1)
    return Weighed(placement, topo, _of_ranks(before, counts.ranks), _of_ranks(after, counts.ranks), moved, held_out)


def loads_of(counts: Counts) -> Floats:
    """-> [L, R], tokens that each rank computes of all windows."""
    return _of_ranks(served(counts.phy2log, counts.of_windows(slice(None))), counts.ranks)


def max_over_mean(loads: Floats) -> Floats:
    """loads [L, R] -> [L]; 1 where there is none."""
    mean = loads.mean(axis=1)
    found: Floats = np.divide(loads.max(axis=1), mean, out=np.ones(len(loads)), where=mean > 0)
    return found


def served(phy2log: NDArray[np.integer[Any]], sent: Floats) -> Floats:
    """phy2log [L, P], sent [R, L, E] -> [L, P], the tokens of each slot as ranks choose replicas today
    (`distributed.expert_map.ExpertMap.choose`): their own if they have one, else all by turns."""
    ranks, layers, experts = sent.shape
    rank_of = np.arange(phy2log.shape[1]) // (phy2log.shape[1] // ranks)
    found = np.zeros(phy2log.shape)
    for layer in range(layers):
        holds = np.zeros((ranks, experts), dtype=np.int64)
        np.add.at(holds, (rank_of, phy2log[layer]), 1)
        own, everywhere = holds[:, phy2log[layer]], holds.sum(axis=0)[phy2log[layer]]
        here = rank_of == np.arange(ranks)[:, None]
        part = np.where(own > 0, here / np.maximum(own, 1), 1 / everywhere)  # [R, P]
        found[layer] = (part * sent[:, layer, phy2log[layer]]).sum(axis=0)
    return found


def _solved(counts: Counts, stats: RoutingStats, topo: Topology, wish: Wish) -> Placement:
    if wish.policy == "eplb":
        plain = wish.dispatch is Dispatch.EVEN and wish.objective is Objective.BALANCE
        if not plain or wish.max_moved_bytes is not None:
            raise SpecError("policy eplb balances, shares evenly and moves what it likes; leave the other options out")
        phy2log, _, _ = rebalance_experts(stats.weight, topo.slots, 1, 1, topo.gpus)
        return evenly(phy2log.astype(np.int32), stats.load.shape[2], topo.nodes)
    if wish.policy != "ilp":
        raise SpecError(f"policy {wish.policy!r} is neither ilp nor eplb")
    old = None
    if counts.phy2log.shape[1] == topo.slots:
        old = evenly(counts.phy2log.astype(np.int32), stats.load.shape[2], topo.nodes)
    return solve_experts(
        stats,
        topo,
        old=old,
        objective=wish.objective,
        dispatch=wish.dispatch,
        max_moved_bytes=wish.max_moved_bytes,
        time_limit_s=wish.time_limit_s,
        seed=wish.seed,
    )


def _topology(counts: Counts, wish: Wish) -> Topology:
    nodes = counts.nodes if wish.nodes is None else wish.nodes
    slots, experts = counts.phy2log.shape[1], counts.load.shape[3]
    if wish.redundancy is not None:
        slots = experts + wish.redundancy
    if counts.ranks < 2:
        raise SpecError("one rank has all experts: there is nothing to place")
    if nodes < 1 or counts.ranks % nodes or slots < experts or slots % counts.ranks:
        raise SpecError(f"{slots} slots for {experts} experts on {counts.ranks} ranks of {nodes} nodes do not divide")
    return Topology(nodes, counts.ranks // nodes, slots // counts.ranks, counts.expert_bytes)


def _stats(counts: Counts, windows: slice, wish: Wish) -> RoutingStats:
    nodes = counts.nodes if wish.nodes is None else wish.nodes
    load = counts.load[windows].sum(axis=1).astype(np.float64)
    return RoutingStats(load, _by_node(counts.of_windows(windows), nodes), None, counts.top_k)


def _by_node(sent: Floats, nodes: int) -> Floats:
    """sent [R, L, E] -> [L, N, E]."""
    ranks, layers, experts = sent.shape
    summed: Floats = sent.reshape(nodes, ranks // nodes, layers, experts).sum(axis=1).swapaxes(0, 1)
    return summed


def _of_ranks(slots: Floats, ranks: int) -> Floats:
    """[L, P] -> [L, R]."""
    summed: Floats = slots.reshape(len(slots), ranks, -1).sum(axis=2)
    return summed


def _distinct(held: NDArray[np.int64]) -> NDArray[np.int64]:
    """held [L, P], sorted -> [L]."""
    steps: NDArray[np.int64] = (np.diff(held, axis=1) != 0).sum(axis=1)
    return steps + 1
