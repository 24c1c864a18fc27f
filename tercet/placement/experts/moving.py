"""Few moves that help much after the load has drifted: one more replica of an expert on a busy GPU in place of one of
an expert that has others, or two experts that change places. Each round tries the likeliest ones at once and takes the
best. A move of an expert into a slot costs its weights' way there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from tercet.placement.experts.arranging import worst_of
from tercet.placement.experts.model import Dispatch, Floats, Ints, Topology
from tercet.placement.experts.sharing import QUICK, Sharing

TRIED = 32  # moves a round
HOTTEST = 8  # experts on the busiest GPU that get a replica more
LEAST_GAIN = 1e-5  # of a round, relative

Slot = tuple[int, int]  # GPU, place there
Move = dict[Slot, int]  # slot -> the expert that it gets


def repaired(
    held: Ints,
    weight: Floats,
    topo: Topology,
    dispatch: Dispatch,
    target: float,
    most_moved: int,
    go_on: Callable[[], bool],
) -> tuple[Ints, float]:
    """held [G, K], weight [E] -> a placement of which at most `most_moved` slots hold another expert, and its highest
    load over speed; it ends at `target`."""
    best, old = held, held
    share, worst = _judged(best[None], weight, topo, dispatch)
    shares, level = share[0], float(worst[0])
    while level > target and go_on():
        tried = [_applied(best, move) for move in _moves(best, shares, topo)]
        tried = [each for each in tried if (each != old).sum() <= most_moved]
        if not tried:
            break
        share, worst = _judged(np.array(tried), weight, topo, dispatch)
        chosen = int(worst.argmin())
        if worst[chosen] >= level * (1 - LEAST_GAIN):
            break
        best, shares, level = tried[chosen], share[chosen], float(worst[chosen])
    return best, worst_of(best, weight, topo, dispatch)


def _judged(tried: Ints, weight: Floats, topo: Topology, dispatch: Dispatch) -> tuple[Floats, Floats]:
    """tried [n, G, K] -> shares, and the highest load over speed [n]."""
    sharing, weights = Sharing(tried, len(weight), topo.speed), np.tile(weight, (len(tried), 1))
    share = sharing.even(weights) if dispatch is Dispatch.EVEN else sharing.solve(weights, sweeps=QUICK)
    return share, (share.sum(axis=2) / topo.speed).max(axis=1)


def _applied(held: Ints, move: Move) -> Ints:
    moved = held.copy()
    for slot, expert in move.items():
        moved[slot] = expert
    return moved


def _moves(held: Ints, share: Floats, topo: Topology) -> list[Move]:
    """The likeliest ones: by what the highest of the two GPUs' loads would be if all other shares stayed."""
    load = share.sum(axis=1)
    busiest = int((load / topo.speed).argmax())
    found = [*_swaps(held, share, load, topo, busiest), *_replicas(held, share, load, topo, busiest)]
    found.sort(key=lambda scored: scored[0])
    half = TRIED // 2
    swaps, single = ([move for _, move in found if len(move) == size][:half] for size in (2, 1))
    return [*swaps, *single]


def _swaps(held: Ints, share: Floats, load: Floats, topo: Topology, gpu: int) -> Iterator[tuple[float, Move]]:
    for own, expert in enumerate(held[gpu].tolist()):
        gain = share[gpu, own] - share
        after = np.maximum((load[gpu] - gain) / topo.speed[gpu], (load[:, None] + gain) / topo.speed[:, None])
        after[gain <= 0] = np.inf
        for at in np.argsort(after, axis=None)[:TRIED].tolist():
            other = (at // held.shape[1], at % held.shape[1])
            comes = int(held[other])
            if np.isfinite(after[other]) and expert not in held[other[0]] and comes not in held[gpu]:
                yield float(after[other]), {(gpu, own): comes, other: expert}


def _replicas(held: Ints, share: Floats, load: Floats, topo: Topology, gpu: int) -> Iterator[tuple[float, Move]]:
    count = np.bincount(held.ravel())
    left = (load[:, None] - share) / topo.speed[:, None]  # beside the new replica
    tokens = np.bincount(held.ravel(), share.ravel())
    spread = tokens[held] / np.maximum(count[held] - 1, 1)  # what the others of the expert that goes get at least
    score = np.where(count[held] > topo.least_replicas, np.maximum(left, spread / topo.speed[:, None]), np.inf)
    hottest = held[gpu][np.argsort(-share[gpu])][:HOTTEST].tolist()
    for at in np.argsort(score, axis=None)[:TRIED].tolist():
        slot = (at // held.shape[1], at % held.shape[1])
        for expert in hottest:
            if np.isfinite(score[slot]) and expert not in held[slot[0]]:
                yield float(score[slot]), {slot: expert}
