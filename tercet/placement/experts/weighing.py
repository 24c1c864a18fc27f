"""What another placement would be worth to a group of ranks that has counted its routing. Pure.

W windows   S data replicas   L layers   E experts   R ranks, G GPUs of the topology: the same   P slots of a layer
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tercet.errors import SpecError
from tercet.placement.expert_counts import Counts, holds, survives
from tercet.placement.experts.eplb import rebalance_experts
from tercet.placement.experts.model import Dispatch, Floats, Objective, Placement, RoutingStats, Topology
from tercet.placement.experts.scoring import dispatched, evenly
from tercet.placement.experts.solve import solve_experts


@dataclass(frozen=True)
class Wish:
    """What a placement is solved for. dispatch: how ranks share rows among replicas; `weighted` is by the placement's
    shares, which ranks cannot yet. nodes, redundancy: those that there are now, if not given."""

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
    placement: Placement  # of layers that are kept, the one that there is
    topology: Topology
    before: Floats  # [L, R] rows that each rank computes in the windows that both are judged by
    after: Floats
    fetched: NDArray[np.int64]  # [L] experts that a rank would have to fetch, since it has none of them
    kept: NDArray[np.bool_]  # [L] what was found is no better than what there is, by what it was solved on
    held_out: bool  # it was solved on other windows than those it is judged by
    survives: tuple[bool, bool]  # before, after: whether each expert lies on two ranks, so that one may be lost


def weigh(counts: Counts, wish: Wish) -> Weighed:
    """Solves on all windows but the last one, and judges by that one; where there is one only, by the same. Raises
    SpecError, UnsupportedSpec."""
    held_out = len(counts.load) > 1
    known, judged = (slice(0, -1), slice(-1, None)) if held_out else (slice(None), slice(None))
    if not counts.load[known].any() or not counts.load[judged].any():
        raise SpecError("nothing was counted in a window that is needed: no request was computed there")
    topo, stats = _topology(counts, wish), _stats(counts, known, wish)
    placement, kept = _solved(counts, stats, topo, wish), np.zeros(len(counts.phy2log), dtype=bool)
    if wish.policy == "ilp" and wish.dispatch is Dispatch.EVEN:
        placement, kept = _no_worse(placement, counts, counts.of_windows(known), topo)
    sent = counts.of_windows(judged)
    before, after = served(counts.phy2log, sent), served(placement.phy2log, sent)
    if wish.dispatch is Dispatch.WEIGHTED:
        after = dispatched(placement, _by_node(sent, topo.nodes), wish.dispatch).sum(axis=1)
    had, has = (holds(each, *sent.shape[::2]) > 0 for each in (counts.phy2log, placement.phy2log))
    return Weighed(
        placement,
        topo,
        _of_ranks(before, counts.ranks),
        _of_ranks(after, counts.ranks),
        (has & ~had).sum(axis=(1, 2)),
        kept,
        held_out,
        (survives(counts.phy2log, counts.ranks), survives(placement.phy2log, counts.ranks)),
    )


def _no_worse(found: Placement, counts: Counts, sent: Floats, topo: Topology) -> tuple[Placement, NDArray[np.bool_]]:
    """-> the better one of each layer by how ranks choose replicas, which the solver does not know; which are kept"""
    if found.phy2log.shape != counts.phy2log.shape:
        return found, np.zeros(len(found.phy2log), dtype=bool)
    busiest = [_of_ranks(served(each, sent), topo.gpus).max(axis=1) for each in (counts.phy2log, found.phy2log)]
    keeps = busiest[0] <= busiest[1]
    phy2log = np.where(keeps[:, None], counts.phy2log, found.phy2log).astype(np.int32)
    return replace(evenly(phy2log, sent.shape[2], topo.nodes), layers=found.layers), keeps


def max_over_mean(loads: Floats) -> Floats:
    """loads [L, R] -> [L]; 1 where there is none."""
    mean = loads.mean(axis=1)
    found: Floats = np.divide(loads.max(axis=1), mean, out=np.ones(len(loads)), where=mean > 0)
    return found


def served(phy2log: NDArray[np.integer[Any]], sent: Floats) -> Floats:
    """phy2log [L, P], sent [R, L, E] -> [L, P], the rows of each slot as ranks choose replicas today
    (`distributed.expert_map.ExpertMap.choose`): their own if they have one, else all by turns."""
    ranks, experts = sent.shape[::2]
    here = np.arange(phy2log.shape[1]) // (phy2log.shape[1] // ranks) == np.arange(ranks)[:, None]
    found = np.zeros(phy2log.shape)
    for layer, there in enumerate(holds(phy2log, ranks, experts)):
        own, everywhere = there[:, phy2log[layer]], there.sum(axis=0)[phy2log[layer]]
        part = np.where(own > 0, here / np.maximum(own, 1), 1 / everywhere)  # [R, P]
        found[layer] = (part * sent[:, layer, phy2log[layer]]).sum(axis=0)
    return found


def _solved(counts: Counts, stats: RoutingStats, topo: Topology, wish: Wish) -> Placement:
    if wish.policy == "eplb":
        plain = wish.dispatch is Dispatch.EVEN and wish.objective is Objective.BALANCE
        if not plain or wish.max_moved_bytes is not None:
            raise SpecError("policy eplb takes no objective, dispatch or max_moved_bytes: it only balances")
        phy2log, _, _ = rebalance_experts(stats.weight, topo.slots, 1, 1, topo.gpus)
        return evenly(phy2log.astype(np.int32), stats.load.shape[2], topo.nodes)
    if wish.policy != "ilp":
        raise SpecError(f"policy {wish.policy!r} is neither ilp nor eplb")
    old = None
    if wish.max_moved_bytes is not None and counts.phy2log.shape[1] != topo.slots:
        raise SpecError("max_moved_bytes is for as many slots as there are now: leave redundancy out")
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
    if nodes < 1 or counts.ranks % nodes:
        raise SpecError(f"nodes {nodes}: {counts.ranks} ranks do not divide into as many")
    least, most = -experts % counts.ranks, experts * (counts.ranks - 1)
    if slots % counts.ranks or not experts <= slots <= experts + most:
        told = f"{least}, {least + counts.ranks}, {least + 2 * counts.ranks} ... at most {most}"
        raise SpecError(f"redundancy {slots - experts}: {experts} experts on {counts.ranks} ranks take {told}")
    stays = wish.objective is Objective.BALANCE and slots >= 2 * experts and survives(counts.phy2log, counts.ranks)
    shape = nodes, counts.ranks // nodes, slots // counts.ranks
    return Topology(*shape, counts.expert_bytes, least_replicas=2 if stays else 1)


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
