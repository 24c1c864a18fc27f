"""What a worker's ranks have counted of their routing, as rows of windows: differences between two looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tercet.distributed.routed import Routed
from tercet.placement.expert_counts import Counts

Longs = NDArray[np.int64]


class Rows(NamedTuple):
    """Of a window."""

    load: Longs  # [S, L, n] of each replica's requests
    computed: Longs  # [L, R] by each rank
    pairs: Longs | None = None  # [L - 1, n, n], if they were asked for


class Look(NamedTuple):
    """At a worker, at one moment."""

    routed: Routed
    pids: list[int]  # of its ranks; 0 for one that is lost
    places: list[str]  # of its ranks: names of nodes

    @property
    def nodes(self) -> int:
        """How many nodes the ranks are on; 1 if they are not laid out node by node, as many on each."""
        ranks, names = self.routed.ranks, self.places[: self.routed.ranks]
        nodes = len({*names})
        each = ranks // nodes
        by_node = all(len({*names[at : at + each]}) == 1 for at in range(0, ranks, each))
        return nodes if len(names) == ranks and ranks % nodes == 0 and by_node else 1


def look_at(routed: Routed, pid: int, node: str, others: Sequence[Mapping[str, Any]]) -> Look:
    """pid, node: of rank 0; others: of ranks 1, 2 ..., as the controller knows them."""
    return Look(routed, [pid, *(other["pid"] for other in others)], [node, *(other["node"] for other in others)])


def rows_between(before: Look, after: Look) -> Rows | None:
    """None: a rank was lost or started anew meanwhile, so that its counts are no differences."""
    if before.pids != after.pids or 0 in after.pids:
        return None
    load, computed = after.routed.load - before.routed.load, after.routed.computed - before.routed.computed
    pairs = None
    if after.routed.pairs is not None and before.routed.pairs is not None:
        pairs = after.routed.pairs - before.routed.pairs
    if min(each.min(initial=0) for each in (load, computed, pairs) if each is not None) < 0:
        return None
    return Rows(load, computed, pairs)


def counts_of(worker: str, look: Look, found: Sequence[Rows], window_s: float) -> Counts:
    its = look.routed
    load, computed = np.array([each.load for each in found]), np.array([each.computed for each in found])
    pairs = [each.pairs for each in found if each.pairs is not None]
    return Counts(
        load,
        computed,
        its.phy2log,
        look.nodes,
        its.top_k,
        its.expert_bytes,
        window_s,
        worker,
        its.shares,
        np.array(pairs) if len(pairs) == len(found) else None,
    )


def of_ranks(counts: Counts, ranks: Sequence[int]) -> Counts:
    """Only these ranks, each a data replica of its own: what they have counted, and their slots. Without shares, which
    are of all ranks."""
    per_rank = counts.phy2log.shape[1] // counts.ranks
    slots = [rank * per_rank + slot for rank in ranks for slot in range(per_rank)]
    load, computed, phy2log = counts.load[:, ranks], counts.computed[:, :, ranks], counts.phy2log[:, slots]
    return Counts(load, computed, phy2log, 1, counts.top_k, counts.expert_bytes, counts.window_s, counts.worker)
