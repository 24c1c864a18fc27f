"""A placement's tables, from the expert in each slot."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tercet.placement.experts.model import NO_SLOT, Dispatch, Floats, Ints, LayerReport, Placement, Topology
from tercet.placement.experts.sharing import Sharing


def placement_of(
    held: Ints, weight: Floats, topo: Topology, dispatch: Dispatch, reports: Sequence[LayerReport] = ()
) -> Placement:
    """held [L, G, K], weight [L, E]."""
    layers, experts = weight.shape
    phy2log = held.reshape(layers, -1).astype(np.int32)
    log2phy, count = tables_of(phy2log, experts)
    sharing = Sharing(held, experts, topo.speed)
    share = sharing.even(weight) if dispatch is Dispatch.EVEN else sharing.solve(weight)
    tokens = np.where(log2phy == NO_SLOT, 0.0, _at(share.reshape(layers, -1), log2phy))
    total = tokens.sum(axis=2, keepdims=True)
    even = (log2phy != NO_SLOT) / count[:, :, None]
    prob = np.where(total > 0, tokens / np.where(total > 0, total, 1.0), even).astype(np.float32)
    everywhere = np.repeat(prob[:, None], topo.nodes, axis=1)
    return Placement(phy2log, log2phy, count, everywhere, tuple(reports))


def tables_of(phy2log: Ints, experts: int) -> tuple[Ints, Ints]:
    """phy2log [L, P] -> log2phy [L, E, R], count [L, E]."""
    layers = len(phy2log)
    names = phy2log + np.arange(layers)[:, None] * experts
    count = np.bincount(names.ravel(), minlength=layers * experts).reshape(layers, experts)
    order = np.argsort(phy2log, axis=1, kind="stable")
    first = count.cumsum(axis=1) - count
    turn = np.arange(int(count.max()))
    there = turn < count[:, :, None]
    at = np.where(there, first[:, :, None] + turn, 0).reshape(layers, -1)
    found = np.take_along_axis(order, at, axis=1).reshape(layers, experts, -1)
    return np.where(there, found, NO_SLOT).astype(np.int32), count.astype(np.int32)


def _at(share: Floats, log2phy: NDArray[np.int32]) -> Floats:
    """share [L, P] -> [L, E, R]."""
    layers = len(share)
    found: Floats = np.take_along_axis(share, log2phy.reshape(layers, -1).clip(0).astype(np.int64), axis=1)
    return found.reshape(log2phy.shape)
