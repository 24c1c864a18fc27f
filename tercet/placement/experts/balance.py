"""The objective `balance`: the busiest GPU of each layer has as little to do as can be.

    greedy ─> weighted, two slots a GPU: groups (pairing.py)
           ─> swaps; with weighted dispatch shares and swaps by turns ─> small layers: the integer programme
           ─> other numbers of replicas

The greedy placement of every layer is made first, and no later step makes it worse.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tercet.placement.experts.arranging import arranged, recounted, worst_of
from tercet.placement.experts.exact import exactly, is_small
from tercet.placement.experts.model import OPTIMAL, Clock, Dispatch, Floats, Ints, Topology
from tercet.placement.experts.packing import bound_of, packed, replicas_of
from tercet.placement.experts.pairing import can_pair, paired

GOOD = 2e-3  # above it: other numbers of replicas are not tried
EXACT_S = 5.0  # for one small layer


@dataclass
class Layer:
    """The best placement so far."""

    weight: Floats  # [E]
    held: Ints  # [G, K]
    worst: float  # load over speed
    bound: float  # no placement is below it
    seconds: float = 0.0

    @property
    def count(self) -> Ints:
        return np.bincount(self.held.ravel(), minlength=len(self.weight)).astype(np.int32)

    @property
    def target(self) -> float:
        return self.bound * (1 + OPTIMAL)

    def gain_over(self, held: Ints, topo: Topology, dispatch: Dispatch) -> float:
        """How many times the load of the busiest GPU there is what it is here."""
        return worst_of(held, self.weight, topo, dispatch) / self.worst

    def take(self, held: Ints, worst: float) -> None:
        """If it is better."""
        if worst < self.worst:
            self.held, self.worst = held, worst


def balanced(weight: Floats, topo: Topology, dispatch: Dispatch, deadline: float, clock: Clock) -> list[Layer]:
    """weight [L, E]; deadline on the clock. Raises SpecError if the experts do not fill the slots."""
    layers = [_greedy(row, topo, dispatch, clock) for row in weight]
    for step in (_by_groups, _by_swaps, _exact, _by_counts):
        for layer in layers:
            began = clock()
            if layer.worst > layer.target and began < deadline:
                step(layer, topo, dispatch, lambda: deadline - clock())
                layer.seconds += clock() - began
    return layers


def _greedy(weight: Floats, topo: Topology, dispatch: Dispatch, clock: Clock) -> Layer:
    began, count = clock(), replicas_of(weight, topo)
    packing = packed(weight, count, topo)
    even = dispatch is Dispatch.EVEN
    bound = bound_of(weight, count, topo) if even else weighted_bound(weight, topo)
    worst = packing.worst if even else worst_of(packing.held, weight, topo, dispatch)
    return Layer(weight, packing.held, worst, bound, clock() - began)


def weighted_bound(weight: Floats, topo: Topology) -> float:
    """The least T for which the experts' tokens fit into as many slots: an expert in n slots takes at most T times the
    speed of the n fastest GPUs."""
    reach = np.cumsum(np.sort(topo.speed)[::-1])
    low = float(weight.sum() / topo.speed.sum())
    high = low + float(weight.max() / reach[0])
    for _ in range(60):
        middle = (low + high) / 2
        needed = np.maximum(np.searchsorted(reach, weight / middle * (1 - 1e-12)) + 1, topo.least_replicas)
        fits = needed.sum() <= topo.slots and needed.max() <= topo.gpus
        low, high = (low, middle) if fits else (middle, high)
    return low


def _by_groups(layer: Layer, topo: Topology, dispatch: Dispatch, left_s: Clock) -> None:
    if can_pair(len(layer.weight), topo, dispatch):
        held = paired(layer.weight, topo, layer.target, lambda: left_s() > 0)
        layer.take(held, worst_of(held, layer.weight, topo, dispatch))


def _by_swaps(layer: Layer, topo: Topology, dispatch: Dispatch, left_s: Clock) -> None:
    layer.take(*arranged(layer.weight, layer.count, topo, dispatch, layer.target))


def _exact(layer: Layer, topo: Topology, dispatch: Dispatch, left_s: Clock) -> None:
    if is_small(len(layer.weight), topo, dispatch):
        held, bound = exactly(layer.weight, topo, dispatch, min(EXACT_S, left_s()))
        layer.bound = max(layer.bound, bound)
        if held is not None:
            layer.take(held, worst_of(held, layer.weight, topo, dispatch))


def _by_counts(layer: Layer, topo: Topology, dispatch: Dispatch, left_s: Clock) -> None:
    target = layer.bound * (1 + GOOD)
    layer.take(*recounted(layer.weight, (layer.held, layer.worst), topo, dispatch, target, lambda: left_s() > 0))
