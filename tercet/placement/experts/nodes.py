"""Experts onto nodes so that few tokens leave theirs, then onto the GPUs of each node so that the busiest has little to
do: the objectives `internode` and `internode_dedup`. Layers are independent, and share the time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from tercet.errors import SpecError
from tercet.placement.experts.keeping import kept
from tercet.placement.experts.model import (
    Clock,
    Dispatch,
    Floats,
    Ints,
    LayerReport,
    Objective,
    Placement,
    RoutingStats,
    Topology,
    status_of,
)
from tercet.placement.experts.node_packing import packed_within, source_aware
from tercet.placement.experts.node_search import TOLERANCE, NodeSearch
from tercet.placement.experts.scoring import score, source_tokens

MOST_SEED = 2**31 - 1  # of HiGHS
LEAST_S = 0.05  # a layer with less time keeps its greedy plan


@dataclass(frozen=True)
class NodeRules:
    """What a plan keeps to. Raises SpecError for what is none."""

    eps: float = 0.005  # a node takes at most 1 + eps of the mean tokens
    kappa: float = 0.5  # a replica takes at most so much of a GPU's mean tokens, so that GPUs can be packed
    keep_groups: int = 0  # groups of experts, each with a replica of all its experts on one node; 0: none
    workers: int = 1  # layers at a time
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.eps < np.inf:
            raise SpecError(f"eps is {self.eps}, and must be a finite number from 0 on")
        if not 0 < self.kappa < np.inf:
            raise SpecError(f"kappa is {self.kappa}, and must be a finite number above 0")
        for name, least in (("keep_groups", 0), ("workers", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise SpecError(f"{name} is {getattr(self, name)}, and must be at least {least}")
        if self.seed > MOST_SEED:
            raise SpecError(f"seed is {self.seed}, and must be at most {MOST_SEED}")

    def check(self, experts: int, topo: Topology) -> None:
        """Raises SpecError if the groups fit neither the experts nor the nodes."""
        groups = self.keep_groups
        if groups and (experts % groups or groups % topo.nodes):
            raise SpecError(
                f"keep_groups {groups} must divide {experts} experts, and {topo.nodes} nodes must divide it"
            )
        if groups and experts // topo.nodes < topo.slots_per_gpu:
            raise SpecError(
                f"keep_groups {groups}: {experts // topo.nodes} experts of a node do not fill a GPU's slots"
            )


class _Slices:
    """The time that is left, for the layers that are left."""

    def __init__(self, layers: int, workers: int, deadline: float, clock: Clock) -> None:
        self._left, self._workers, self._deadline, self._clock = layers, workers, deadline, clock
        self._lock = threading.Lock()

    def end(self) -> float:
        """-> when the next layer must be done."""
        with self._lock:
            share, now = min(1.0, self._workers / self._left), self._clock()
            self._left -= 1
        return now + (self._deadline - now) * share


@dataclass(frozen=True)
class _Found:
    """Of one layer."""

    search: NodeSearch
    held: Ints  # [G, K]
    seconds: float
    late: bool


def by_nodes(
    stats: RoutingStats,
    topo: Topology,
    objective: Objective,
    rules: NodeRules,
    *,
    old: Placement | None,
    deadline: float,
    clock: Clock,
) -> Placement:
    """With dispatch by source. Raises SpecError without source_load, and if experts, slots or groups do not fit."""
    tokens = source_tokens(stats, topo)
    rules.check(tokens.shape[2], topo)
    searches = [NodeSearch(row, topo, objective, stats.top_k, rules.keep_groups, rules.seed) for row in tokens]
    slices = _Slices(len(searches), rules.workers, deadline, clock)

    def solve(search: NodeSearch) -> _Found:
        began, end = clock(), slices.end()
        if end - began >= LEAST_S:
            search.improve(rules.eps, rules.kappa, lambda: end - clock())
        late = clock() >= end or end - began < LEAST_S
        return _Found(search, packed_within(search.plan, topo), clock() - began, late)

    with ThreadPoolExecutor(rules.workers) as pool:
        found = list(pool.map(solve, searches))
    held = np.array([layer.held for layer in found])
    if old is not None:
        held = _kept_within(held, old, topo)
    placement = source_aware(held, [search.plan.flow for search in searches], topo)
    reports = _reports(placement, found, tokens, stats, topo, rules, old)
    return Placement(placement.phy2log, placement.log2phy, placement.count, placement.dispatch_prob, reports)


def _kept_within(held: Ints, old: Placement, topo: Topology) -> Ints:
    """GPUs may change their names with others of their node only, so that sources stay where they are."""
    before, gpus = old.phy2log.reshape(held.shape), topo.gpus_per_node
    nodes = [slice(node * gpus, (node + 1) * gpus) for node in range(topo.nodes)]
    found = [kept(held[:, own], before[:, own], topo.speed[own]) for own in nodes]
    return np.concatenate(found, axis=1)


def _reports(
    placement: Placement,
    found: list[_Found],
    tokens: Floats,
    stats: RoutingStats,
    topo: Topology,
    rules: NodeRules,
    old: Placement | None,
) -> tuple[LayerReport, ...]:
    worth = score(placement, stats, topo, Dispatch.WEIGHTED)
    moved = np.zeros(len(found), int) if old is None else (placement.phy2log != old.phy2log).sum(axis=1)
    reports = []
    for at, layer in enumerate(found):
        scale, value = float(tokens[at].mean()), layer.search.value
        bound = min(layer.search.bound, value)
        reports.append(
            LayerReport(
                objective=value * scale,
                bound=bound * scale,
                max_over_mean=float(worth.max_over_mean[at]),
                cross_node=float(worth.cross_node[at]),
                moved_slots=int(moved[at]),
                moved_bytes=int(moved[at]) * topo.expert_bytes,
                status=status_of(value, bound, late=layer.late),
                seconds=layer.seconds,
                relaxed=_relaxed(layer.search, rules),
            )
        )
    return tuple(reports)


def _relaxed(search: NodeSearch, rules: NodeRules) -> str:
    asked, got = (rules.eps, rules.kappa), search.attained()
    names = zip(("eps", "kappa"), asked, got, strict=True)
    return ", ".join(f"{name} {has:.4g}" for name, wanted, has in names if has > wanted + TOLERANCE)
