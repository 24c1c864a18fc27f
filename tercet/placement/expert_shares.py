"""Shares of an expert's replicas: of TURNS rows that ranks of a node send to an expert, how many each slot gets.

N nodes: parts of the ranks, as many in each, in their order   P slots of a layer   E experts
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tercet.errors import SpecError

TURNS = 128  # a share is off by half a turn at most, and whoever sends 128 rows has kept to it

Integers = NDArray[np.integer[Any]]


def check_shares(row: Integers, shares: Integers, ranks: int) -> None:
    """row: phy2log [P]; shares [N, P]. Raises SpecError for what are none."""
    if shares.ndim != 2 or shares.shape[1] != len(row) or not len(shares) or ranks % len(shares):
        raise SpecError(f"shares of {list(shares.shape)}, and must be [nodes, {len(row)}] for {ranks} ranks")
    if shares.min() < 0 or shares.max() > TURNS:
        raise SpecError(f"shares of {shares.min()} to {shares.max()}, and must be 0 to {TURNS}")
    total = np.stack([np.bincount(row, its, int(row.max()) + 1) for its in shares])
    wrong = total[:, row] != TURNS
    if wrong.any():
        node, slot = np.argwhere(wrong)[0]
        expert = int(row[slot])
        has = f"{total[node, expert]:.0f} at node {node}"
        raise SpecError(f"shares of expert {expert} sum to {has}, and must to {TURNS}")


def in_turns(prob: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    """prob [..., R], shares that sum to one -> the same in TURNS; what rounding leaves goes to the largest rests."""
    total = prob.sum(axis=-1, keepdims=True, dtype=np.float64)
    exact = prob.astype(np.float64) / np.where(total > 0, total, 1.0) * TURNS
    whole = np.floor(exact)
    left = TURNS - whole.sum(axis=-1, keepdims=True)
    rank = np.argsort(np.argsort(whole - exact, axis=-1, kind="stable"), axis=-1, kind="stable")
    found: NDArray[np.int64] = (whole + (rank < left)).astype(np.int64)
    return found


def resettled(
    old: Sequence[int], shares: Sequence[Sequence[int]], new: Sequence[int], per_rank: int
) -> list[list[int]]:
    """old, new [P]: the same experts on each rank, in other slots; shares [N, P] of `old` -> of `new`. The first slot
    that a rank has of an expert takes what all of them had."""
    found = [[0] * len(new) for _ in shares]
    for slot, expert in enumerate(old):
        at = slot - slot % per_rank
        into = at + list(new[at : at + per_rank]).index(expert)
        for node, its in enumerate(shares):
            found[node][into] += its[slot]
    return found
