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

MAX_DEAD_ENDS = 50_000
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
        self._order = order
        self._nodes = nodes
        self._free = [dict(n.resources) for n in nodes]
        self._placed: list[tuple[int, ...]] = []  # nodes of the ranks of order[i]
        self._of_role: Counter[tuple[Role, int]] = Counter()  # (role, node) -> ranks there
        self._failed: set[tuple[object, ...]] = set()
        numbers = {n.node_id: i for i, n in enumerate(nodes)}
        for worker in stay:
            # A node that is not there has died, and Ray has found its ranks another one.
            self._take(worker, [numbers[n.node_id] for n in worker.nodes if n.node_id in numbers])

    def run(self) -> dict[str, tuple[Node, ...]] | None:
        """-> worker id -> node of each rank; None if no placement was found."""
        untried = [self._candidates()]  # of order[0], order[1] ... as deep as the search is now
        dead_ends = 0
        while len(self._placed) < len(self._order):
            chosen = next(untried[-1], None)
            if chosen is not None:
                self._put(chosen)
                untried.append(self._candidates())
            elif self._placed and dead_ends < MAX_DEAD_ENDS:
                dead_ends += 1
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

    def _state(self) -> tuple[object, ...]:
        return (len(self._placed), *(tuple(round(free[k], 6) for k in sorted(free)) for free in self._free))

    def _candidates(self) -> Iterator[tuple[int, ...]]:
        """Nodes for the ranks of the next replica, the best first; none if this state is known to fail."""
        if len(self._placed) == len(self._order) or self._state() in self._failed:
            return iter(())
        replica = self._order[len(self._placed)]
        usable = [i for i, node in enumerate(self._nodes) if replica.may_use(node)]
        usable.sort(key=lambda i: (self._of_role[replica.role, i], -self._free[i].get("CPU", 0.0)))
        ways = spreads([self._room(replica, i) for i in usable], replica.ranks, replica.tensor)
        return (tuple(usable[at] for at in way) for way in ways)

    def _room(self, replica: Replica, node: int) -> int:
        """Ranks of it that the node still has room for; more than it has do not count."""
        free = self._free[node]
        held = ((free.get(kind, 0.0) + EPSILON) / amount for kind, amount in replica.needs.items())
        return int(min([replica.ranks, *held]))

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
