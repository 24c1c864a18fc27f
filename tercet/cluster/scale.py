"""Changes the number of workers of a role in a cluster that another process serves.

    this process --request_scale--> gateway --health, each poll--> controller   replaces its target, or says why not
    this process <-----health------ gateway <----note, each change----'         answer, target, members

The gateway only relays these and may be replaced, so a request, which has an id, is repeated until the controller has
answered it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Any

from tercet.cluster import ray_runtime, remote
from tercet.errors import ClusterError, from_wire

POLL_S = 0.2


def scale(name: str | None, address: str, role: str, replicas: int, timeout_s: float) -> str:
    """Return a summary once the role has exactly that many workers, all in use.

    Raises SpecError or ClusterError if that cannot be, and ClusterError naming what is missing on a timeout.
    """
    with ray_runtime.joined(address):
        found = remote.pick(name, address)
        before = _members_of(remote.ask(found, "health"), role)
        ask_id, deadline = secrets.token_hex(8), time.monotonic() + timeout_s
        while True:
            status, fault = _look(found, ask_id, role, replicas)
            waits_for = fault or missing(status, ask_id, role, replicas)
            if not waits_for:
                return told(found, role, before, _members_of(status, role))
            if not time.monotonic() <= deadline:  # also if it is nan
                late = f"{role} does not have {replicas} workers after {timeout_s:g} s: {waits_for}"
                raise ClusterError(f"{late}; `tercet status` shows the target and what still goes on")
            time.sleep(POLL_S)


def _look(cluster: str, ask_id: str, role: str, replicas: int) -> tuple[dict[str, Any], str]:
    """-> (status, why there is none). Raises ClusterError if the cluster has ended."""
    try:
        remote.ask(cluster, "request_scale", ask_id, role, replicas)
        return remote.ask(cluster, "health"), ""
    except ClusterError as error:  # its gateway is being replaced
        if cluster not in remote.clusters():
            raise ClusterError(f"cluster {cluster} has ended meanwhile") from error
        return {}, str(error)


def missing(status: Mapping[str, Any], ask_id: str, role: str, replicas: int) -> str:
    """What is still missing; empty if nothing is. Pure. Raises the controller's answer if that is an error, and
    ClusterError if a later request has set another number."""
    answer = status["answers"].get(ask_id)
    if answer is None:
        return "the controller has not answered yet"
    if answer:
        raise from_wire(answer["code"], answer["message"])
    if status["target"][role] != replicas:
        raise ClusterError(f"another `tercet scale` came meanwhile: {role} is now to have {status['target'][role]}")
    members = _members_of(status, role)
    late = [f"{m} is {w['state']} {w['reason']}".strip() for m, w in members.items() if w["state"] != "live"]
    served = {m for m, worker in status["workers"].items() if worker["load"] is not None}
    late += [f"{m} is not in use yet" for m, w in members.items() if w["state"] == "live" and m not in served]
    if not late and len(members) != replicas:
        return f"it has {len(members)}"
    return "; ".join(late)


def told(cluster: str, role: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    went = sorted(before.keys() - after.keys())
    came = sorted(m for m in after if m not in before or before[m]["epoch"] != after[m]["epoch"])
    changes = [f"{', '.join(names)} {word}" for names, word in ((came, "came"), (went, "went")) if names]
    workers = "1 worker" if len(after) == 1 else f"{len(after)} workers"
    return f"cluster {cluster}: {role} has {workers} ({'; '.join(changes) or 'as before'})"


def _members_of(status: Mapping[str, Any], role: str) -> dict[str, Any]:
    return {m: worker for m, worker in status["members"].items() if worker["role"] == role}
