"""Gives a worker another role in a cluster that another process serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tercet.cluster import asking
from tercet.errors import from_wire


@dataclass(frozen=True)
class RoleSet:
    """How a worker got its role. how: `in_place` or `restarted`. `str` says it in a line."""

    cluster: str
    worker: str
    role: str
    how: str
    seconds: float
    drain_s: float  # of them

    def __str__(self) -> str:
        where = "in its process" if self.how == "in_place" else "in a new process"
        took = f"after {self.seconds:.2f} s, {self.drain_s:.2f} s of them to drain"
        return f"cluster {self.cluster}: {self.worker} serves as {self.role}, {where}, {took}"


def set_role(name: str | None, address: str, worker: str, role: str, timeout_s: float) -> RoleSet:
    """Return once the worker serves in that role.

    Raises SpecError or ClusterError if that cannot be, what the worker met on its way, and ClusterError naming what is
    missing on a timeout.
    """
    late, change = f"{worker} does not serve as {role}", {"worker": worker, "role": role}
    done = asking.ask(name, address, change, lambda s, ask_id: missing(s, ask_id, worker, role), late, timeout_s)
    switch = done.after["switches"][done.ask_id]
    return RoleSet(done.cluster, worker, role, switch["how"], switch["seconds"], switch["drain_s"])


def missing(status: Mapping[str, Any], ask_id: str, worker: str, role: str) -> str:
    """What is still missing; empty if nothing is. Pure. Raises the controller's answer if that is an error, and why the
    worker does not serve in that role if it never will."""
    if waits_for := asking.unanswered(status, ask_id):
        return waits_for
    switch = status["switches"].get(ask_id)
    if switch is None:
        member = status["members"].get(worker, {"state": "gone", "reason": ""})
        return f"{worker} is {member['state']} {member['reason']}".strip()
    if "code" in switch:
        raise from_wire(switch["code"], switch["message"])
    used = status["workers"].get(worker)
    is_new = used is not None and used["role"] == role and used["load"] is None
    return f"{worker} is not in use yet" if is_new else ""
