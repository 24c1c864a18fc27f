"""How many token pairs of two neighbouring layers can stay on their unit at most: what no placement is above.

E experts   U units   S slots of a unit   P [E, E] pairs   r, c [E] its sums over rows and columns, T of all
X [E, U] which share of an expert's tokens is on a unit   Y [E, U] whether the next layer's expert is there

Pairs that stay: sum(P * Z), Z = X Y'.  P = r c' / T + D gives two parts, each bounded on its own; the smaller of their
sum and the bound by matching of P itself holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tercet.placement.experts.model import Floats, Ints

ROUNDS = 40  # of prices for rows and columns by turns


@dataclass(frozen=True)
class Side:
    """What is known of one layer."""

    load: Floats  # [E] tokens
    count: Ints  # [E] replicas, on as many units at most
    most: float  # tokens of the busiest unit


def stays_at_most(pair: Floats, before: Side, after: Side, units: int, slots: int) -> float:
    """pair [E, E] -> pairs on one unit, of every placement with these counts of replicas and no unit above `most`."""
    total = float(pair.sum())
    if not total:
        return 0.0
    reach = np.minimum(after.count, units) * slots
    rows, columns = pair.sum(axis=1), pair.sum(axis=0)
    rest = pair - np.outer(rows, columns) / total
    residue = matched_at_most(rest, slots, reach)
    if (before.count == 1).all() and (after.count == 1).all():
        residue = min(residue, _aligned_at_most(rest, units, slots))
        popular = min(
            _sorted_at_most(rows, columns, slots),
            _unit_at_most(rows, before, slots),
            _unit_at_most(columns, after, slots),
        )
    else:
        copies = float((np.minimum(after.count, units) * columns).sum())
        popular = _unit_at_most(rows, before, slots) * copies / total
    return min(total, matched_at_most(pair, slots, reach), popular + residue)


def matched_at_most(pair: Floats, slots: int, reach: Ints) -> float:
    """b-matching: sum(pair * Z) for 0 <= Z <= 1, rows of Z at most `slots`, columns at most `reach` [E].

    Sound: an expert's tokens meet at most S experts on the unit they went to, so a row of Z is at most S; a column sums
    X over the units that have the expert, at most S on each. Any prices a, b >= 0 of rows and columns bound the
    programme by S sum(a) + reach b + sum(max(0, pair - a - b)), which the rounds lower one side at a time.
    """
    experts = len(pair)
    by_column = np.zeros(experts)
    reach = np.minimum(reach, experts)
    best = np.inf
    for _ in range(ROUNDS):
        by_row = _price(pair - by_column, np.full(experts, slots))
        by_column = _price((pair - by_row[:, None]).T, reach)
        left = np.maximum(pair - by_row[:, None] - by_column, 0.0).sum()
        found = float(slots * by_row.sum() + reach @ by_column + left)
        if found >= best * (1 - 1e-5):
            return min(best, found)
        best = found
    return best


def _price(worth: Floats, most: Ints) -> Floats:
    """worth [n, E] -> [n] the least price at which no more than `most` [n] of a row are worth it."""
    experts = worth.shape[1]
    at = np.maximum(experts - 1 - most, 0)
    found: Floats = np.partition(worth, np.unique(at), axis=1)[np.arange(len(worth)), at]
    return np.maximum(np.where(most < experts, found, 0.0), 0.0)


def _aligned_at_most(rest: Floats, units: int, slots: int) -> float:
    """S times the U - 1 largest singular values of D. Sound without replicas: X and Y have orthogonal columns of norm
    sqrt(S), so Z / S has norm 1 and rank U and keeps the vector of ones, which D sends to 0; what is left of Z / S has
    rank U - 1, and von Neumann's trace inequality does the rest."""
    return float(slots * np.linalg.svd(rest, compute_uv=False)[: units - 1].sum())


def _sorted_at_most(rows: Floats, columns: Floats, slots: int) -> float:
    """sum_u r(u) c(u) / T. Sound: whatever the units hold, their sums are majorised by those of the hottest S, the next
    S and so on, and two such vectors multiply to most when both are sorted."""
    r, c = (np.sort(each)[::-1].reshape(-1, slots).sum(axis=1) for each in (rows, columns))
    return float(r @ c / rows.sum())


def _unit_at_most(sums: Floats, side: Side, slots: int) -> float:
    """The pairs of a unit: sum_u r(u) c(u) / T is no more than the largest r(u) or c(u). Sound: r is the load, scaled,
    and what differs, of which a unit has at most the S largest values."""
    scale = float(sums.sum() / side.load.sum())
    other = np.maximum(np.sort(sums - scale * side.load)[-slots:], 0.0).sum()
    return float(min(scale * side.most + other, np.sort(sums)[-slots:].sum()))
