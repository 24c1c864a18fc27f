"""Where the requests of a sequence shall be served, so that its experts are near. Pure."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from tercet.errors import SpecError
from tercet.placement.experts.model import NO_SLOT, Floats, Ints, Placement


def homes_of(counts: Floats, placement: Placement, capacity: Ints) -> NDArray[np.int64]:
    """counts [Q, L, E], tokens of each sequence (or topic); capacity [N], sequences of each node -> [Q] nodes, by the
    linear assignment with the fewest tokens that leave their node. Raises SpecError if the sequences do not fit."""
    nodes, slots = placement.dispatch_prob.shape[1], placement.phy2log.shape[1]
    if len(capacity) != nodes or (capacity < 0).any() or capacity.sum() < len(counts):
        raise SpecError(f"{len(counts)} sequences do not fit capacity {capacity.tolist()} of {nodes} nodes")
    at = placement.log2phy // (slots // nodes)
    near = [
        np.where((at == node) & (placement.log2phy != NO_SLOT), placement.dispatch_prob[:, node], 0.0).sum(axis=2)
        for node in range(nodes)
    ]
    stays = np.einsum("qle,nle->qn", counts, np.array(near), optimize=True)
    places = np.repeat(np.arange(nodes), capacity)
    sequence, place = linear_sum_assignment(stays[:, places], maximize=True)
    homes = np.zeros(len(counts), np.int64)
    homes[sequence] = places[place]
    return homes


def source_load_of(counts: Floats, homes: NDArray[np.int64], nodes: int) -> Floats:
    """counts [Q, L, E], homes [Q] -> [L, N, E]."""
    found = np.zeros((nodes, *counts.shape[1:]))
    np.add.at(found, homes, counts)
    return found.transpose(1, 0, 2)
