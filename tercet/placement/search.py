"""The search for a node of every rank of every replica that is to be placed. Pure.

Replicas of a role are spread: a node with fewer of its ranks is tried first, then the one with more free CPU. The ranks
of one replica are packed (`groups.spreads`). If that leads nowhere the search steps back, so that a placement is found
whenever there is one (within MAX_DEAD_ENDS).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tercet.core import Role
from tercet.placement.groups import spreads

if TYPE_CHECKING:
    from tercet.placement.roles import Assignment, Node

MAX_DEAD_ENDS = 20_000
EPSILON = 1e-6  # fractions of a CPU do not add up exactly


@dataclass(frozen=True)
class Replica:
    """One that has no place yet."""

    worker_id: str
    role: Role
    labels: Mapping[str, str]
    needs: Mapping[str, float]  # of a rank
    ranks: int
    tensor: int  # consecutive ranks that are best on one node

    def may_use(self, node: Node) -> bool:
        return all(node.labels.get(k) == v for k, v in self.labels.items())


class Search:
    """Depth-first search over (replica, nodes of its ranks); what is known to fail is not tried twice."""

    def __init__(self, order: Sequence[Replica], nodes: Sequence[Node], stay: Sequence[Assignment]) -> None:
        """order: who is placed first. stay: who has a place already."""
        self.deepest = 0  # how many were placed at once
        self._dead_ends = 0
        self._order = order
        self._left = _left(order)
        self._nodes = nodes
        self._free = [dict(n.resources) for n in nodes]
        self._placed: list[tuple[int, ...]] = []  # nodes of the ranks of order[i]
        self._of_role: Counter[tuple[Role, int]] = Counter()  # (role, node) -> ranks there
        self._failed: set[object] = set()
        users = {replica.role: replica for replica in order}.values()
        self._kinds = [(tuple(r.may_use(node) for r in users), tuple(sorted(node.resources))) for node in nodes]
        numbers = {n.node_id: i for i, n in enumerate(nodes)}
        for worker in stay:
            # A node that is not there has died, and Ray has found its ranks another one.
            self._take(worker, [numbers[n.node_id] for n in worker.nodes if n.node_id in numbers])

    def run(self) -> dict[str, tuple[Node, ...]] | None:
        """-> worker id -> node of each rank; None if no placement was found."""
        most = MAX_DEAD_ENDS if self._has_enough() else 0
        untried = [self._candidates()]  # of order[0], order[1] ... as deep as the search is now
        while len(self._placed) < len(self._order):
            chosen = next(untried[-1], None)
            if chosen is not None:
                self._put(chosen)
                untried.append(self._candidates())
            elif self._placed and self._dead_ends < most:
                self._dead_ends += 1
                self._failed.add(self._state())
                untried.pop()
                self._take_back()
            else:
                return None
            self.deepest = max(self.deepest, len(self._placed))
        return {
            replica.worker_id: tuple(self._nodes[i] for i in placed)
            for replica, placed in zip(self._order, self._placed, strict=True)
        }

    def _has_enough(self) -> bool:
        """Whether all nodes together do: if not, no way has to be tried but the one that the error tells of."""
        for kind in {kind for replica in self._order for kind in replica.needs}:
            needed = sum(replica.ranks * replica.needs.get(kind, 0.0) for replica in self._order)
            if needed > sum(free.get(kind, 0.0) + EPSILON for free in self._free):
                return False
        return True

    def _state(self) -> object:
        """Nodes that are usable for the same and have as much free are one as good as the other."""
        free = (tuple(round(free[kind], 6) for kind in sorted(free)) for free in self._free)
        return len(self._placed), tuple(sorted(zip(self._kinds, free, strict=True)))

    def _candidates(self) -> Iterator[tuple[int, ...]]:
        """Nodes for the ranks of the next replica, the best first; none if this state is known to fail."""
        if len(self._placed) == len(self._order) or self._state() in self._failed:
            return iter(())
        replica = self._order[len(self._placed)]
        usable = [i for i, node in enumerate(self._nodes) if replica.may_use(node)]
        usable.sort(key=lambda i: (self._of_role[replica.role, i], -self._free[i].get("CPU", 0.0)))
        rooms = [self._room(replica, i) for i in usable]
        if self._dead_ends and sum(rooms) < self._left[len(self._placed)]:
            return iter(())  # not before the first dead end, since the error tells how far that descent came
        ways = spreads(rooms, replica.ranks, replica.tensor)
        return (tuple(usable[at] for at in way) for way in ways)

    def _room(self, replica: Replica, node: int) -> int:
        """Ranks of its role that the node still has room for, as far as there are any."""
        free = self._free[node]
        held = ((free.get(kind, 0.0) + EPSILON) / amount for kind, amount in replica.needs.items())
        return max(0, int(min([self._left[len(self._placed)], *held])))

    def _put(self, nodes: tuple[int, ...]) -> None:
        replica = self._order[len(self._placed)]
        self._placed.append(nodes)
        self._take(replica, nodes)

    def _take_back(self) -> None:
        nodes = self._placed.pop()
        self._take(self._order[len(self._placed)], nodes, -1)

    def _take(self, replica: Replica | Assignment, nodes: Sequence[int], sign: int = 1) -> None:
        for node in nodes:
            self._of_role[replica.role, node] += sign
            for kind, amount in replica.needs.items():
                self._free[node][kind] -= sign * amount


def _left(order: Sequence[Replica]) -> list[int]:
    """Of each replica the ranks of its role that are to be placed from it on."""
    counted: Counter[Role] = Counter()
    found = []
    for replica in reversed(order):
        counted[replica.role] += replica.ranks
        found.append(counted[replica.role])
    return found[::-1]
