"""What another placement would be worth to a group of ranks that has counted its routing. Pure.

W windows   S data replicas   L layers   E experts   R ranks, G GPUs of the topology: the same   P slots of a layer
N nodes
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tercet.errors import InternalError, SpecError
from tercet.placement.expert_counts import Counts, holds, survives
from tercet.placement.expert_shares import TURNS, in_turns
from tercet.placement.experts.chain_model import local_fraction
from tercet.placement.experts.eplb import rebalance_experts
from tercet.placement.experts.model import NO_SLOT, Dispatch, Floats, Objective, Placement, RoutingStats, Topology
from tercet.placement.experts.scoring import evenly, node_copies
from tercet.placement.experts.solve import solve_experts
from tercet.placement.experts.tables import placement_of


@dataclass(frozen=True)
class Wish:
    """What a placement is solved for. dispatch: how ranks share rows among replicas; even: their own first, else by
    turns; weighted: by shares that are solved, too. nodes, redundancy: those that there are now, if not given."""

    policy: str = "ilp"  # or eplb; or keep: experts stay where they are, and only shares are solved
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
    shares: NDArray[np.int64] | None  # [L, N, P] of replicas, for dispatch weighted (`expert_shares`)
    crossing: tuple[float, float]  # before, after: share of the rows whose slot is on another node
    copies: tuple[float, float]  # before, after: other nodes that a token goes to in a layer, as expected
    # before, after: share of the pairs that stay on their node, or on their rank if there is one; None: not counted
    staying: tuple[float, float] | None
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
    if topo.nodes == 1 and wish.objective in {Objective.INTERNODE, Objective.INTERNODE_DEDUP}:
        raise SpecError(
            f"objective {wish.objective.value}: all ranks are on one node, and no row leaves it; use balance"
        )
    placement, kept = _solved(counts, stats, topo, wish), np.zeros(len(counts.phy2log), dtype=bool)
    if (placement.count == 0).any():
        raise InternalError(f"a placement without experts {np.argwhere(placement.count == 0)[:4].tolist()} was found")
    shares = shares_of(placement) if wish.dispatch is Dispatch.WEIGHTED else None
    if wish.policy != "eplb" and wish.objective is Objective.BALANCE:
        placement, shares, kept = _no_worse(placement, shares, counts, counts.of_windows(known), topo)
    sent = counts.of_windows(judged)
    before = taken(counts.phy2log, sent, counts.shares, topo.nodes)
    after = taken(placement.phy2log, sent, shares, topo.nodes)
    had, has = (holds(each, *sent.shape[::2]) > 0 for each in (counts.phy2log, placement.phy2log))
    return Weighed(
        placement,
        topo,
        _of_ranks(before.sum(axis=0), counts.ranks),
        _of_ranks(after.sum(axis=0), counts.ranks),
        (has & ~had).sum(axis=(1, 2)),
        kept,
        shares,
        (_crossing(before), _crossing(after)),
        (_copies(before, counts.top_k), _copies(after, counts.top_k)),
        _staying(counts, placement, judged, topo),
        held_out,
        (survives(counts.phy2log, counts.ranks), survives(placement.phy2log, counts.ranks)),
    )


def shares_of(placement: Placement) -> NDArray[np.int64]:
    """-> [L, N, P], its dispatch in turns."""
    layers, nodes = placement.dispatch_prob.shape[:2]
    found = np.zeros((layers, nodes, placement.phy2log.shape[1]), np.int64)
    layer, expert, replica = (placement.log2phy != NO_SLOT).nonzero()
    turns = in_turns(placement.dispatch_prob)
    found[layer, :, placement.log2phy[layer, expert, replica]] = turns[layer, :, expert, replica]
    return found


def _no_worse(
    found: Placement, shares: NDArray[np.int64] | None, counts: Counts, sent: Floats, topo: Topology
) -> tuple[Placement, NDArray[np.int64] | None, NDArray[np.bool_]]:
    """-> the better one of each layer by how ranks choose replicas, which the solver does not know; which are kept."""
    now = counts.shares
    if found.phy2log.shape != counts.phy2log.shape:
        return found, shares, np.zeros(len(found.phy2log), dtype=bool)
    if now is not None and shares is not None:
        nodes = math.lcm(now.shape[1], shares.shape[1])
        now, shares = (np.repeat(its, nodes // its.shape[1], axis=1) for its in (now, shares))
    each = (counts.phy2log, now), (found.phy2log, shares)
    busiest = [_of_ranks(served(row, sent, its), topo.gpus).max(axis=1) for row, its in each]
    keeps = busiest[0] <= busiest[1]
    phy2log = np.where(keeps[:, None], counts.phy2log, found.phy2log).astype(np.int32)
    if now is not None or shares is not None:  # zeros: by turns
        kept_ones, found_ones = (0 if its is None else its for its in (now, shares))
        shares = np.where(keeps[:, None, None], kept_ones, found_ones)
    return replace(evenly(phy2log, sent.shape[2], topo.nodes), layers=found.layers), shares, keeps


def _crossing(rows: Floats) -> float:
    """rows [N, L, P], by node that sends them."""
    flow = _flow(rows).sum(axis=0)
    return float(1 - np.trace(flow) / flow.sum())


def _copies(rows: Floats, top_k: int) -> float:
    """rows [N, L, P], by node that sends them."""
    return float(node_copies(_flow(rows), top_k).sum() / (rows.sum() / top_k))


def _flow(rows: Floats) -> Floats:
    """[N, L, P] -> [L, N, N], from node to node."""
    nodes, layers, slots = rows.shape
    flow: Floats = rows.reshape(nodes, layers, nodes, slots // nodes).sum(axis=3).swapaxes(0, 1)
    return flow


def _staying(counts: Counts, placement: Placement, judged: slice, topo: Topology) -> tuple[float, float] | None:
    if counts.pairs is None or not len(counts.pairs[0]):
        return None
    pairs = counts.pairs[judged].sum(axis=0).astype(np.float64)
    before = evenly(counts.phy2log.astype(np.int32), counts.load.shape[3], topo.nodes)
    there = replace(topo, slots_per_gpu=counts.phy2log.shape[1] // topo.gpus)
    found = local_fraction(before, pairs, there), local_fraction(placement, pairs, topo)
    return min(1.0, found[0]), min(1.0, found[1])  # shares are of float32


def max_over_mean(loads: Floats) -> Floats:
    """loads [L, R] -> [L]; 1 where there is none."""
    mean = loads.mean(axis=1)
    found: Floats = np.divide(loads.max(axis=1), mean, out=np.ones(len(loads)), where=mean > 0)
    return found


def served(phy2log: NDArray[np.integer[Any]], sent: Floats, shares: NDArray[np.int64] | None = None) -> Floats:
    """-> [L, P], the rows of each slot, as `taken`."""
    rows: Floats = taken(phy2log, sent, shares, 1)[0]
    return rows


def taken(phy2log: NDArray[np.integer[Any]], sent: Floats, shares: NDArray[np.int64] | None, nodes: int) -> Floats:
    """phy2log [L, P], sent [R, L, E], shares [L, any nodes, P] -> [N, L, P], the rows of each node in each slot, as
    ranks choose replicas (`distributed.expert_map.ExpertMap.choose`): by shares where a layer has any; else their own
    if they have one, else all by turns."""
    ranks, experts = sent.shape[::2]
    here = np.arange(phy2log.shape[1]) // (phy2log.shape[1] // ranks) == np.arange(ranks)[:, None]
    found = np.zeros((nodes, *phy2log.shape))
    for layer, there in enumerate(holds(phy2log, ranks, experts)):
        if shares is not None and shares[layer].any():
            part = np.repeat(shares[layer] / TURNS, ranks // shares.shape[1], axis=0)  # [R, P]
        else:
            own, everywhere = there[:, phy2log[layer]], there.sum(axis=0)[phy2log[layer]]
            part = np.where(own > 0, here / np.maximum(own, 1), 1 / everywhere)
        rows = part * sent[:, layer, phy2log[layer]]
        found[:, layer] = rows.reshape(nodes, ranks // nodes, -1).sum(axis=1)
    return found


def _solved(counts: Counts, stats: RoutingStats, topo: Topology, wish: Wish) -> Placement:
    if wish.policy == "eplb":
        plain = wish.dispatch is Dispatch.EVEN and wish.objective is Objective.BALANCE
        if not plain or wish.max_moved_bytes is not None:
            raise SpecError("policy eplb takes no objective, dispatch or max_moved_bytes: it only balances")
        phy2log, _, _ = rebalance_experts(stats.weight, topo.slots, 1, 1, topo.gpus)
        return evenly(phy2log.astype(np.int32), stats.load.shape[2], topo.nodes)
    if wish.policy == "keep":
        return _shared_anew(counts, stats, topo, wish)
    if wish.policy != "ilp":
        raise SpecError(f"policy {wish.policy!r} is none of ilp, eplb and keep")
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


def _shared_anew(counts: Counts, stats: RoutingStats, topo: Topology, wish: Wish) -> Placement:
    """Experts stay; the shares of their replicas that are best for the busiest rank."""
    if wish.dispatch is not Dispatch.WEIGHTED or wish.objective is not Objective.BALANCE:
        raise SpecError("policy keep solves shares for the busiest rank: dispatch must be weighted, objective balance")
    if wish.redundancy is not None or wish.max_moved_bytes is not None:
        raise SpecError("policy keep moves nothing: leave redundancy and max_moved_bytes out")
    held = counts.phy2log.reshape(len(counts.phy2log), topo.gpus, -1).astype(np.int32)
    return placement_of(held, stats.weight, topo, Dispatch.WEIGHTED)


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
    pairs = None if counts.pairs is None else counts.pairs[windows].sum(axis=0).astype(np.float64)
    return RoutingStats(load, _by_node(counts.of_windows(windows), nodes), pairs, counts.top_k)


def _by_node(sent: Floats, nodes: int) -> Floats:
    """sent [R, L, E] -> [L, N, E]."""
    ranks, layers, experts = sent.shape
    summed: Floats = sent.reshape(nodes, ranks // nodes, layers, experts).sum(axis=1).swapaxes(0, 1)
    return summed


def _of_ranks(slots: Floats, ranks: int) -> Floats:
    """[L, P] -> [L, R]."""
    summed: Floats = slots.reshape(len(slots), ranks, -1).sum(axis=2)
    return summed
