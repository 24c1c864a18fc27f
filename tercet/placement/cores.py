"""Which cores a worker's compute threads are pinned to: the role's `cpu_affinity`, divided among a node's workers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tercet.core import Role
from tercet.errors import ClusterError, UnsupportedSpec
from tercet.spec import ClusterSpec

if TYPE_CHECKING:
    from tercet.placement.roles import Assignment


def pinned(spec: ClusterSpec, workers: Sequence[Assignment]) -> list[Assignment]:
    """The workers with their cores; one that has some keeps them. Raises ClusterError if a node's workers want more
    cores than their role names, or the same ones."""
    owners: dict[tuple[str, int], Assignment] = {}  # (node id, core) -> whose it is
    for worker in workers:
        _own(owners, worker)
    wants = {role for role, wanted in spec.roles.items() if wanted.cpu_affinity is not None}
    return [w if w.rank_cores or w.role not in wants else _with_cores(spec, w, owners) for w in workers]


def refuse_missing_cores(role: Role, cores: Sequence[int]) -> None:
    """Raises UnsupportedSpec for a core that this process may not use."""
    here = os.sched_getaffinity(0)
    missing = sorted({*cores} - here)
    if missing:
        wanted, usable = f"roles.{role}.cpu_affinity: core {missing[0]}", ", ".join(map(str, sorted(here)))
        raise UnsupportedSpec(f"{wanted} is not here; this process may use {usable}; name some of those")


def _own(owners: dict[tuple[str, int], Assignment], worker: Assignment) -> None:
    for rank, node in enumerate(worker.nodes):
        owners.update({(node.node_id, core): worker for core in worker.cores_of(rank)})


def _with_cores(spec: ClusterSpec, worker: Assignment, owners: dict[tuple[str, int], Assignment]) -> Assignment:
    """The next free share of its node's for each rank, in order."""
    found = worker
    for rank, node in enumerate(worker.nodes):
        there = {core: owner for (node_id, core), owner in owners.items() if node_id == node.node_id}
        found = replace(found, rank_cores=(*found.rank_cores, _share(spec, worker, rank, there)))
        owners.update({(node.node_id, core): worker for core in found.rank_cores[rank]})
    return found


def _share(spec: ClusterSpec, worker: Assignment, rank: int, owners: Mapping[int, Assignment]) -> tuple[int, ...]:
    """owners: core of the rank's node -> whose it is."""
    role = spec.roles[worker.role]
    listed = role.cpu_affinity or []
    shares = [tuple(listed[at : at + role.threads]) for at in range(0, len(listed), role.threads)]
    free = next((share for share in shares if not owners.keys() & set(share)), None)
    if free is None:
        cores = "core" if role.threads == 1 else f"{role.threads} cores"
        whose = ", ".join(f"{core} by {owners[core].worker_id} ({owners[core].role})" for core in sorted(owners))
        which = f"rank {rank} of " if len(worker.nodes) > 1 else ""
        raise ClusterError(
            f"roles.{worker.role}.cpu_affinity: {listed} has no {cores} left for "
            f"{which}{worker.worker_id} on {worker.nodes[rank].address}; taken there: {whose}"
        )
    return free
