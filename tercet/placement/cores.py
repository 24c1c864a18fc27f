"""Which cores a worker's compute threads are pinned to: the role's `cpu_affinity`, divided among a node's workers."""

from __future__ import annotations

import os
from collections.abc import Sequence
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
    done: list[Assignment] = []
    for worker in workers:
        others = [w for w in (*done, *workers) if w is not worker and w.node.node_id == worker.node.node_id]
        done.append(worker if worker.cores else replace(worker, cores=_share(spec, worker, others)))
    return done


def refuse_missing_cores(role: Role, cores: Sequence[int]) -> None:
    """Raises UnsupportedSpec for a core that this process may not use."""
    here = os.sched_getaffinity(0)
    missing = sorted({*cores} - here)
    if missing:
        wanted, usable = f"roles.{role}.cpu_affinity: core {missing[0]}", ", ".join(map(str, sorted(here)))
        raise UnsupportedSpec(f"{wanted} is not here; this process may use {usable}; name some of those")


def _share(spec: ClusterSpec, worker: Assignment, others: Sequence[Assignment]) -> tuple[int, ...]:
    role = spec.roles[worker.role]
    if role.cpu_affinity is None:
        return ()
    owners = {core: other for other in others for core in other.cores}
    shares = [tuple(role.cpu_affinity[at : at + role.threads]) for at in range(0, len(role.cpu_affinity), role.threads)]
    free = next((share for share in shares if not owners.keys() & set(share)), None)
    if free is None:
        cores = "core" if role.threads == 1 else f"{role.threads} cores"
        whose = ", ".join(f"{core} by {owners[core].worker_id} ({owners[core].role})" for core in sorted(owners))
        raise ClusterError(
            f"roles.{worker.role}.cpu_affinity: {role.cpu_affinity} has no {cores} left for "
            f"{worker.worker_id} on {worker.node.address}; taken there: {whose}"
        )
    return free
