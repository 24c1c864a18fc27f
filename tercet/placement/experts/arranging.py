"""One layer's placement, and what makes it better: swaps, shares of the load, other numbers of replicas."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from tercet.placement.experts.model import Dispatch, Floats, Ints, Topology
from tercet.placement.experts.packing import Packing, packed
from tercet.placement.experts.sharing import Sharing

ROUNDS = 6  # of shares and swaps
DONORS = 6  # experts of which a replica would be missed least
LEAST_GAIN = 1e-6  # relative

Arrangement = tuple[Ints, float]  # held [G, K], its highest load over speed


def shares_of(held: Ints, weight: Floats, topo: Topology, dispatch: Dispatch) -> Floats:
    """held [G, K], weight [E] -> tokens of each slot [G, K]."""
    sharing = Sharing(held[None], len(weight), topo.speed)
    even = dispatch is Dispatch.EVEN
    shares: Floats = (sharing.even(weight[None]) if even else sharing.solve(weight[None]))[0]
    return shares


def worst_of(held: Ints, weight: Floats, topo: Topology, dispatch: Dispatch) -> float:
    """The highest load over speed of a layer."""
    return float((shares_of(held, weight, topo, dispatch).sum(axis=1) / topo.speed).max())


def arranged(weight: Floats, count: Ints, topo: Topology, dispatch: Dispatch, target: float) -> Arrangement:
    """With these numbers of replicas. target: what is good enough."""
    packing = packed(weight, count, topo)
    packing.improve(target)
    if dispatch is Dispatch.EVEN:
        return packing.held, packing.worst
    held, best = packing.held, np.inf
    for _ in range(ROUNDS):  # the shares change what a swap is worth
        share = shares_of(packing.held, weight, topo, dispatch)
        worst = float((share.sum(axis=1) / topo.speed).max())
        if worst >= best * (1 - LEAST_GAIN):
            break
        held, best = packing.held, worst
        packing = Packing(held.copy(), share, topo.speed)
        if best <= target or not packing.improve(target):
            break
    return held, best


def recounted(
    weight: Floats, found: Arrangement, topo: Topology, dispatch: Dispatch, target: float, go_on: Callable[[], bool]
) -> Arrangement:
    """With one replica more of an expert on the busiest GPU and one less of another, again and again, while that helps:
    the hottest replica need not make the busiest GPU."""
    better: Arrangement | None = found
    while better is not None and better[1] > target:
        found, better = better, None
        for count in _exchanges(weight, found[0], topo, dispatch):
            if not go_on():
                return found
            tried = arranged(weight, count, topo, dispatch, target)
            if tried[1] < found[1] * (1 - LEAST_GAIN):
                better = tried
                break
    return found if better is None else better


def _exchanges(weight: Floats, held: Ints, topo: Topology, dispatch: Dispatch) -> Iterator[Ints]:
    """Numbers of replicas that differ from those of `held` in two experts."""
    share, count = (
        shares_of(held, weight, topo, dispatch),
        np.bincount(held.ravel(), minlength=len(weight)).astype(np.int32),
    )
    busiest = int((share.sum(axis=1) / topo.speed).argmax())
    donors = np.argsort(
        np.where(count > topo.least_replicas, weight / np.maximum(count - 1, 1), np.inf), kind="stable"
    )[:DONORS]
    for gains in held[busiest][np.argsort(-share[busiest])].tolist():
        for gives in donors.tolist():
            if gains != gives and count[gains] < topo.gpus and count[gives] > topo.least_replicas:
                changed = count.copy()
                changed[[gains, gives]] += 1, -1
                yield changed
