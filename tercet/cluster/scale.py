"""Changes the number of workers of a role in a cluster that another process serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tercet.cluster import asking
from tercet.errors import ClusterError


@dataclass(frozen=True)
class Scaled:
    """What a role has now. came: also those that started anew. `str` says it in a line."""

    cluster: str
    role: str
    workers: list[str]
    came: list[str]
    went: list[str]

    def __str__(self) -> str:
        changes = [f"{', '.join(names)} {word}" for names, word in ((self.came, "came"), (self.went, "went")) if names]
        workers = "1 worker" if len(self.workers) == 1 else f"{len(self.workers)} workers"
        return f"cluster {self.cluster}: {self.role} has {workers} ({'; '.join(changes) or 'as before'})"


def scale(name: str | None, address: str, role: str, replicas: int, timeout_s: float) -> Scaled:
    """Return once the role has exactly that many workers, all in use.

    Raises SpecError or ClusterError if that cannot be, and ClusterError naming what is missing on a timeout.
    """
    late = f"{role} does not have {replicas} workers"
    change = {"role": role, "replicas": replicas}
    done = asking.ask(name, address, change, lambda s, ask_id: missing(s, ask_id, role, replicas), late, timeout_s)
    return scaled(done.cluster, role, _members_of(done.before, role), _members_of(done.after, role))


def missing(status: Mapping[str, Any], ask_id: str, role: str, replicas: int) -> str:
    """What is still missing; empty if nothing is. Pure. Raises the controller's answer if that is an error, and
    ClusterError if a later request has set another number."""
    if waits_for := asking.unanswered(status, ask_id):
        return waits_for
    if status["target"][role] != replicas:
        raise ClusterError(f"another request came meanwhile: {role} is now to have {status['target'][role]}")
    members = _members_of(status, role)
    late = [f"{m} is {w['state']} {w['reason']}".strip() for m, w in members.items() if w["state"] != "live"]
    served = {m for m, worker in status["workers"].items() if worker["load"] is not None}
    late += [f"{m} is not in use yet" for m, w in members.items() if w["state"] == "live" and m not in served]
    if not late and len(members) != replicas:
        return f"it has {len(members)}"
    return "; ".join(late)


def scaled(cluster: str, role: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Scaled:
    came = sorted(m for m in after if m not in before or before[m]["epoch"] != after[m]["epoch"])
    return Scaled(cluster, role, sorted(after), came, sorted(before.keys() - after.keys()))


def _members_of(status: Mapping[str, Any], role: str) -> dict[str, Any]:
    return {m: worker for m, worker in status["members"].items() if worker["role"] == role}
