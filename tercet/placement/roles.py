"""Which nodes each worker of a cluster runs on. Pure: a spec and nodes in, a placement out.

Replicas of a role are spread, the ranks of one are packed (`search.py`). Who runs already stays where it is; only who
is added is placed.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from tercet.core import Role
from tercet.errors import ClusterError, SpecError
from tercet.placement.cores import pinned
from tercet.placement.search import Replica, Search
from tercet.spec import ClusterSpec, RoleSpec


@dataclass(frozen=True)
class Node:
    """A Ray node as placement sees it. Resources are in Ray's names: CPU, GPU, NPU."""

    node_id: str
    address: str
    labels: Mapping[str, str] = field(default_factory=dict)
    resources: Mapping[str, float] = field(default_factory=dict)  # name -> amount in all


@dataclass(frozen=True)
class Assignment:
    """One replica and the nodes of its ranks."""

    worker_id: str  # e.g. worker-1; it says nothing of the role
    role: Role
    nodes: tuple[Node, ...]  # of rank 0, 1 ...
    labels: Mapping[str, str]  # of the pool: what any node that takes a place must carry
    needs: Mapping[str, float]  # of a rank: Ray resource -> amount
    rank_cores: tuple[tuple[int, ...], ...] = ()  # for the compute threads of rank 0, 1 ... of its node; empty: any

    @property
    def node(self) -> Node:
        """Of rank 0, which the rest of the cluster talks to."""
        return self.nodes[0]

    @property
    def cores(self) -> tuple[int, ...]:
        """Of rank 0."""
        return self.cores_of(0)

    @property
    def ranks_on(self) -> dict[str, tuple[int, ...]]:
        """Node id -> the ranks there, in the order of the first of them."""
        found: dict[str, tuple[int, ...]] = {}
        for rank, node in enumerate(self.nodes):
            found[node.node_id] = (*found.get(node.node_id, ()), rank)
        return found

    def cores_of(self, rank: int) -> tuple[int, ...]:
        return self.rank_cores[rank] if self.rank_cores else ()


@dataclass(frozen=True)
class Placement:
    gateway: Node
    workers: tuple[Assignment, ...]  # of each role the oldest first

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Every node that something runs on, once, the gateway's first."""
        used = (self.gateway, *(node for w in self.workers for node in w.nodes))
        return tuple({n.node_id: n for n in used}.values())


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
    """Assign every rank of every replica to a node; the gateway goes to nodes[0], the node of whoever asks.

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
    order = sorted(replicas, key=lambda r: (sum(map(r.may_use, nodes)), -r.ranks * sum(r.needs.values())))
    search = Search(order, nodes, stay)
    chosen = search.run()
    if chosen is None:
        raise ClusterError(_full(order, search.deepest, nodes, stay))
    placement = placed(spec, nodes[0], [*stay, *(_assign(r, chosen[r.worker_id]) for r in replicas)])
    _refuse_split_loopback(spec, placement)
    return placement


def placed(spec: ClusterSpec, gateway: Node, workers: Sequence[Assignment]) -> Placement:
    """workers: of each role the oldest first; those without cores get theirs. Raises ClusterError if there are none."""
    order = list(spec.roles)
    return Placement(gateway, tuple(sorted(pinned(spec, workers), key=lambda w: order.index(w.role))))


def needs_of(wanted: RoleSpec) -> dict[str, float]:
    """Ray resource -> amount, of a rank."""
    amounts = {"CPU": wanted.cpus, "GPU": float(wanted.gpus), "NPU": float(wanted.npus)}
    return {kind: amount for kind, amount in amounts.items() if amount}


def local_node(spec: ClusterSpec) -> Node:
    """What a Ray started here would be: this machine's GPUs, and its CPUs, or what the spec needs if that is more.

    CPUs of Ray are a count for placement, so a small machine can hold a large spec; its workers then share cores.
    """
    needed = sum(replica.ranks * replica.needs.get("CPU", 0.0) for replica in _replicas(spec))
    cpus, gpus = float(max(os.cpu_count() or 1, math.ceil(needed))), len(list(Path("/dev").glob("nvidia[0-9]*")))
    return Node("local", "this machine", {}, {"CPU": cpus} | ({"GPU": float(gpus)} if gpus else {}))


def _replicas(
    spec: ClusterSpec, stay: Sequence[Assignment] = (), taken: Collection[str] = frozenset()
) -> list[Replica]:
    """Those that the spec wants beside `stay`."""
    names = (name for name in map("worker-{}".format, itertools.count()) if name not in taken)
    found: list[Replica] = []
    for role, wanted in spec.roles.items():
        needs, labels, parallelism = needs_of(wanted), spec.pools[wanted.pool].labels, wanted.parallelism
        sizes = parallelism.ranks, parallelism.tensor
        missing = wanted.replicas - sum(w.role is role for w in stay)
        found += [Replica(next(names), role, labels, needs, *sizes) for _ in range(missing)]
    return found


def _assign(replica: Replica, nodes: tuple[Node, ...]) -> Assignment:
    return Assignment(replica.worker_id, replica.role, nodes, replica.labels, replica.needs)


def _refuse_split_loopback(spec: ClusterSpec, placement: Placement) -> None:
    addresses = sorted({n.address for n in placement.nodes})
    if spec.network.host == "loopback" and len(addresses) > 1:
        raise ClusterError(
            f"network.host: loopback reaches one machine only, but the workers are placed on {', '.join(addresses)}; "
            "set network.host: node"
        )


def _nowhere(replica: Replica, nodes: Sequence[Node]) -> str:
    labels = ",".join(f"{k}={v}" for k, v in replica.labels.items())
    return (
        f"roles.{replica.role}: no node carries the labels {labels} of its pool; start one with "
        f"`ray start --labels {labels}`; the nodes are {_described(nodes)}"
    )


def _absent(replica: Replica, kind: str, nodes: Sequence[Node]) -> str:
    return (
        f"roles.{replica.role}: {replica.worker_id} needs {_amounts({kind: replica.needs[kind]})}, and no node "
        f"of its pool has any that Ray sees; the nodes are {_described(nodes)}"
    )


def _full(order: Sequence[Replica], stuck: int, nodes: Sequence[Node], stay: Sequence[Assignment]) -> str:
    replica = order[stuck]
    before: list[Replica | Assignment] = [*stay, *order[:stuck]]
    mine = [n for n in nodes if replica.may_use(n)]
    others = _amounts({k: sum(_ranks_of(r) * r.needs.get(k, 0.0) for r in before) for k in replica.needs})
    each = f" for each of {replica.ranks} ranks" if replica.ranks > 1 else ""
    return (
        f"roles.{replica.role}: {replica.worker_id} needs {_amounts(replica.needs)}{each}, beside {others} for the "
        f"{len(before)} placed before it, but the nodes of its pool have {_described(mine)}; "
        f"lower roles.*.cpus or replicas, or add nodes"
    )


def _ranks_of(worker: Replica | Assignment) -> int:
    return worker.ranks if isinstance(worker, Replica) else len(worker.nodes)


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
