"""Which node each worker of a cluster runs on. Pure: a spec and nodes in, a placement out.

Replicas of a role are spread: a node with fewer of them is tried first, then the one with more free CPU. If that
leads nowhere the search steps back, so that a placement is found whenever there is one (within MAX_DEAD_ENDS).
Who runs already stays where it is; only who is added is placed.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from tercet.core import Role
from tercet.errors import ClusterError, SpecError
from tercet.placement.cores import pinned
from tercet.spec import ClusterSpec, RoleSpec

MAX_DEAD_ENDS = 20_000
EPSILON = 1e-6  # fractions of a CPU do not add up exactly


@dataclass(frozen=True)
class Node:
    """A Ray node as placement sees it. Resources are in Ray's names: CPU, GPU, NPU."""

    node_id: str
    address: str
    labels: Mapping[str, str] = field(default_factory=dict)
    resources: Mapping[str, float] = field(default_factory=dict)  # name -> amount in all


@dataclass(frozen=True)
class Assignment:
    """One replica and its node."""

    worker_id: str  # e.g. worker-1; it says nothing of the role
    role: Role
    node: Node
    labels: Mapping[str, str]  # of the pool: what any node that takes its place must carry
    needs: Mapping[str, float]  # Ray resource -> amount
    cores: tuple[int, ...] = ()  # of the node, for its compute threads; empty: any


@dataclass(frozen=True)
class Placement:
    gateway: Node
    workers: tuple[Assignment, ...]  # of each role the oldest first

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Every node that something runs on, once, the gateway's first."""
        used = (self.gateway, *(w.node for w in self.workers))
        return tuple({n.node_id: n for n in used}.values())


@dataclass(frozen=True)
class _Replica:
    worker_id: str
    role: Role
    labels: Mapping[str, str]
    needs: Mapping[str, float]

    def may_use(self, node: Node) -> bool:
        return all(node.labels.get(k) == v for k, v in self.labels.items())


def role_of(spec: ClusterSpec, name: str) -> Role:
    """Raises SpecError if the cluster has no such role."""
    if name not in spec.roles:
        known = ", ".join(spec.roles)
        raise SpecError(f"topology {spec.topology} has no role {name}; the roles of {spec.name} are {known}")
    return Role(name)


def scaled(spec: ClusterSpec, role: str, replicas: int) -> ClusterSpec:
    """The spec with another number of replicas of a role. Raises SpecError naming what is wrong with it."""
    wanted_role = role_of(spec, role)
    if replicas < 1:
        what = "image" if wanted_role is Role.ENCODE else "request"
        raise SpecError(
            f"{role} cannot have {replicas} workers: without one no {what} can be served; `tercet down` ends all"
        )
    try:
        wanted = RoleSpec.model_validate({**dict(spec.roles[wanted_role]), "replicas": replicas})
        return ClusterSpec.model_validate({**dict(spec), "roles": {**spec.roles, wanted_role: wanted}})
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise SpecError(f"{role} cannot have {replicas} workers: {reason}") from error


def plan(
    spec: ClusterSpec, nodes: Sequence[Node], kept: Sequence[Assignment] = (), taken: Collection[str] = ()
) -> Placement:
    """Assign every replica to a node; the gateway goes to nodes[0], the node of whoever asks.

    kept: who runs already, of each role the oldest first; those that are too many are left out. taken: ids that nobody
    new may have.
    Raises ClusterError naming the first replica that fits nowhere, what it needs and what each node has; and for a
    placement over several addresses when workers listen on loopback, or one node's workers that want the same cores.
    """
    assert nodes, "a Ray cluster has at least one node"
    stay = [w for role, wanted in spec.roles.items() for w in [k for k in kept if k.role is role][: wanted.replicas]]
    replicas = _replicas(spec, stay, {*taken, *(w.worker_id for w in kept)})
    for replica in replicas:
        if not any(replica.may_use(node) for node in nodes):
            raise ClusterError(_nowhere(replica, nodes))
        for kind in replica.needs:
            if not any(node.resources.get(kind) for node in nodes if replica.may_use(node)):
                raise ClusterError(_absent(replica, kind, nodes))
    # The hardest first: few nodes carry its labels, or it needs much.
    order = sorted(replicas, key=lambda r: (sum(map(r.may_use, nodes)), -sum(r.needs.values())))
    chosen = _Search(order, nodes, stay).run()
    placement = placed(spec, nodes[0], [*stay, *(_assign(r, chosen[r.worker_id]) for r in replicas)])
    _refuse_split_loopback(spec, placement)
    return placement


def placed(spec: ClusterSpec, gateway: Node, workers: Sequence[Assignment]) -> Placement:
    """workers: of each role the oldest first; those without cores get theirs. Raises ClusterError if there are none."""
    order = list(spec.roles)
    return Placement(gateway, tuple(sorted(pinned(spec, workers), key=lambda w: order.index(w.role))))


def needs_of(wanted: RoleSpec) -> dict[str, float]:
    """Ray resource -> amount, of a replica."""
    amounts = {"CPU": wanted.cpus, "GPU": float(wanted.gpus), "NPU": float(wanted.npus)}
    return {kind: amount for kind, amount in amounts.items() if amount}


def local_node(spec: ClusterSpec) -> Node:
    """What a Ray started here would be: this machine's GPUs, and its CPUs, or what the spec needs if that is more.

    CPUs of Ray are a count for placement, so a small machine can hold a large spec; its workers then share cores.
    """
    needed = sum(replica.needs.get("CPU", 0.0) for replica in _replicas(spec))
    cpus, gpus = float(max(os.cpu_count() or 1, math.ceil(needed))), len(list(Path("/dev").glob("nvidia[0-9]*")))
    return Node("local", "this machine", {}, {"CPU": cpus} | ({"GPU": float(gpus)} if gpus else {}))


def _replicas(
    spec: ClusterSpec, stay: Sequence[Assignment] = (), taken: Collection[str] = frozenset()
) -> list[_Replica]:
    """Those that the spec wants beside `stay`."""
    names = (name for name in map("worker-{}".format, itertools.count()) if name not in taken)
    found: list[_Replica] = []
    for role, wanted in spec.roles.items():
        needs, labels = needs_of(wanted), spec.pools[wanted.pool].labels
        missing = wanted.replicas - sum(w.role is role for w in stay)
        found += [_Replica(next(names), role, labels, needs) for _ in range(missing)]
    return found


def _assign(replica: _Replica, node: Node) -> Assignment:
    return Assignment(replica.worker_id, replica.role, node, replica.labels, replica.needs)


class _Search:
    """Depth-first search over (replica, node); what is known to fail is not tried twice."""

    def __init__(self, order: Sequence[_Replica], nodes: Sequence[Node], stay: Sequence[Assignment]) -> None:
        self._order = order
        self._stay = stay
        self._nodes = nodes
        self._free = [dict(n.resources) for n in nodes]
        self._placed: list[int] = []  # node of order[i]
        self._of_role: Counter[tuple[Role, int]] = Counter()  # (role, node) -> replicas there
        self._failed: set[tuple[object, ...]] = set()
        self._deepest = 0
        numbers = {n.node_id: i for i, n in enumerate(nodes)}
        for worker in stay:
            if worker.node.node_id in numbers:  # else its node has died, and Ray has found it another one
                self._take(worker, numbers[worker.node.node_id])

    def run(self) -> dict[str, Node]:
        untried = [self._candidates()]  # of order[0], order[1] ... as deep as the search is now
        while len(self._placed) < len(self._order):
            self._deepest = max(self._deepest, len(self._placed))
            node = next(untried[-1], None)
            if node is not None:
                self._put(node)
                untried.append(self._candidates())
            elif self._placed and len(self._failed) < MAX_DEAD_ENDS:
                self._failed.add(self._state())
                untried.pop()
                self._take_back()
            else:
                raise ClusterError(_full(self._order, self._deepest, self._nodes, self._stay))
        return {r.worker_id: self._nodes[i] for r, i in zip(self._order, self._placed, strict=True)}

    def _state(self) -> tuple[object, ...]:
        return (len(self._placed), *(tuple(round(free[k], 6) for k in sorted(free)) for free in self._free))

    def _candidates(self) -> Iterator[int]:
        """Nodes for the next replica, the best first; none if this state is known to fail."""
        if len(self._placed) == len(self._order) or self._state() in self._failed:
            return iter(())
        replica = self._order[len(self._placed)]
        fits = [i for i, node in enumerate(self._nodes) if replica.may_use(node) and self._fits(replica, i)]
        return iter(sorted(fits, key=lambda i: (self._of_role[replica.role, i], -self._free[i].get("CPU", 0.0))))

    def _fits(self, replica: _Replica, node: int) -> bool:
        return all(self._free[node].get(kind, 0.0) + EPSILON >= amount for kind, amount in replica.needs.items())

    def _put(self, node: int) -> None:
        replica = self._order[len(self._placed)]
        self._placed.append(node)
        self._take(replica, node)

    def _take(self, replica: _Replica | Assignment, node: int) -> None:
        self._of_role[replica.role, node] += 1
        for kind, amount in replica.needs.items():
            self._free[node][kind] -= amount

    def _take_back(self) -> None:
        node = self._placed.pop()
        replica = self._order[len(self._placed)]
        self._of_role[replica.role, node] -= 1
        for kind, amount in replica.needs.items():
            self._free[node][kind] += amount


def _refuse_split_loopback(spec: ClusterSpec, placement: Placement) -> None:
    addresses = sorted({n.address for n in placement.nodes})
    if spec.network.host == "loopback" and len(addresses) > 1:
        raise ClusterError(
            f"network.host: loopback reaches one machine only, but the workers are placed on {', '.join(addresses)}; "
            "set network.host: node"
        )


def _nowhere(replica: _Replica, nodes: Sequence[Node]) -> str:
    labels = ",".join(f"{k}={v}" for k, v in replica.labels.items())
    return (
        f"roles.{replica.role}: no node carries the labels {labels} of its pool; start one with "
        f"`ray start --labels {labels}`; the nodes are {_described(nodes)}"
    )


def _absent(replica: _Replica, kind: str, nodes: Sequence[Node]) -> str:
    return (
        f"roles.{replica.role}: {replica.worker_id} needs {_amounts({kind: replica.needs[kind]})}, and no node "
        f"of its pool has any that Ray sees; the nodes are {_described(nodes)}"
    )


def _full(order: Sequence[_Replica], stuck: int, nodes: Sequence[Node], stay: Sequence[Assignment]) -> str:
    replica = order[stuck]
    before: list[_Replica | Assignment] = [*stay, *order[:stuck]]
    mine = [n for n in nodes if replica.may_use(n)]
    others = _amounts({k: sum(r.needs.get(k, 0.0) for r in before) for k in replica.needs})
    return (
        f"roles.{replica.role}: {replica.worker_id} needs {_amounts(replica.needs)}, beside {others} for the "
        f"{len(before)} placed before it, but the nodes of its pool have {_described(mine)}; "
        f"lower roles.*.cpus or replicas, or add nodes"
    )


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources[k]:g} {k}" for k in ("CPU", "GPU", "NPU") if k in resources) or "nothing"


def _described(nodes: Sequence[Node]) -> str:
    plain = [dataclasses.replace(n, labels=own_labels(n)) for n in nodes]
    return "; ".join(
        f"{n.address} ({_amounts(n.resources)}{''.join(f', {k}={v}' for k, v in n.labels.items())})" for n in plain
    )


def own_labels(node: Node) -> dict[str, str]:
    """A node's labels without those that Ray puts on every node."""
    return {k: v for k, v in node.labels.items() if not k.startswith("ray.io/")}
