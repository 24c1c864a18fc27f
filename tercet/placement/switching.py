"""A worker that gets another role stays where it is, with what it holds there; the role must fit into that. Pure."""

from __future__ import annotations

from dataclasses import replace

from tercet.core import Role
from tercet.errors import ClusterError, SpecError
from tercet.placement.roles import Assignment, Placement, needs_of, placed, role_of, scaled
from tercet.placement.search import EPSILON
from tercet.spec import ClusterSpec


def switched(spec: ClusterSpec, placement: Placement, worker_id: str, role: str) -> tuple[ClusterSpec, Placement]:
    """The spec and the placement with that worker in another role, as the newest of it.

    Raises SpecError for a worker or a role that there is not, a role that it has already, or the last worker of one;
    ClusterError if the new role does not fit into the worker's place, no cores are left for it, or one of both is of
    several ranks.
    """
    worker = next((w for w in placement.workers if w.worker_id == worker_id), None)
    if worker is None:
        known = ", ".join(f"{w.worker_id} ({w.role})" for w in placement.workers)
        raise SpecError(f"there is no worker {worker_id}; the workers of {spec.name} are {known}")
    wanted = role_of(spec, role)
    if wanted is worker.role:
        raise SpecError(f"it is {role} already")
    _refuse_other_place(spec, worker, wanted)
    fewer = scaled(spec, worker.role, spec.roles[worker.role].replicas - 1)
    changed = scaled(fewer, role, spec.roles[wanted].replicas + 1)
    labels = spec.pools[spec.roles[wanted].pool].labels
    others = [w for w in placement.workers if w is not worker]
    workers = [*others, replace(worker, role=wanted, labels=labels, rank_cores=())]
    return changed, placed(changed, placement.gateway, workers)


def _refuse_other_place(spec: ClusterSpec, worker: Assignment, role: Role) -> None:
    wanted, own = spec.roles[role], spec.roles[worker.role]
    for whose, ranks in ((worker.worker_id, len(worker.nodes)), (f"a worker of {role}", wanted.parallelism.ranks)):
        if ranks > 1:
            raise ClusterError(f"{whose} is a group of {ranks} ranks, which keeps its role; use `tercet scale`")
    pool, own_pool = spec.pools[wanted.pool], spec.pools[own.pool]
    if pool.accelerator != own_pool.accelerator:
        raise ClusterError(
            f"pool {wanted.pool} of {role} is of {pool.accelerator}s, and its own, {own.pool}, of "
            f"{own_pool.accelerator}s"
        )
    for key, value in pool.labels.items():
        if worker.node.labels.get(key) != value:
            raise ClusterError(f"pool {wanted.pool} is of nodes with {key}={value}, which {worker.node.address} is not")
    for kind, amount in needs_of(wanted).items():
        held = worker.needs.get(kind, 0.0)
        if amount > held + EPSILON:
            raise ClusterError(f"{role} takes {amount:g} {kind} of a worker, and it was given {held:g}")
