"""Asks the controller of a cluster that another process serves for a change, and waits until it is made.

    this process --request_change--> gateway --health, each poll--> controller   replaces its target, or says why not
    this process <-----health------- gateway <----note, each change----'         answer, target, members

The gateway only relays these and may be replaced, so a request, which has an id, is repeated until the controller has
answered it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tercet.cluster import ray_runtime, remote
from tercet.errors import ClusterError, from_wire

POLL_S = 0.2
Status = Mapping[str, Any]  # as `GatewayActor.health` gives it


class Changed(NamedTuple):
    cluster: str
    ask_id: str
    before: Status
    after: Status


def ask(
    name: str | None,
    address: str,
    change: Mapping[str, Any],
    missing: Callable[[Status, str], str],
    late: str,
    timeout_s: float,
) -> Changed:
    """Return once the change is made. missing(status, id of the request): what it still waits for; empty: nothing.

    Raises what `missing` does, and ClusterError that begins with `late` on a timeout, or if the cluster has ended.
    """
    with ray_runtime.joined(address):
        found = remote.pick(name, address)
        before, ask_id = remote.ask(found, "health"), secrets.token_hex(8)
        deadline = time.monotonic() + timeout_s
        while True:
            status, fault = _look(found, ask_id, change)
            waits_for = fault or missing(status, ask_id)
            if not waits_for:
                return Changed(found, ask_id, before, status)
            if not time.monotonic() <= deadline:  # also if it is nan
                told = f"{late} after {timeout_s:g} s: {waits_for}"
                raise ClusterError(f"{told}; `tercet status` shows the target and what still goes on")
            time.sleep(POLL_S)


def unanswered(status: Status, ask_id: str) -> str:
    """Empty once the controller has accepted the request. Raises its answer if that is an error. Pure."""
    answer = status["answers"].get(ask_id)
    if answer is None:
        return "the controller has not answered yet"
    if answer:
        raise from_wire(answer["code"], answer["message"])
    return ""


def _look(cluster: str, ask_id: str, change: Mapping[str, Any]) -> tuple[Status, str]:
    """-> (status, why there is none). Raises ClusterError if the cluster has ended."""
    try:
        remote.ask(cluster, "request_change", ask_id, change)
        return remote.ask(cluster, "health"), ""
    except ClusterError as error:  # its gateway is being replaced
        if cluster not in remote.clusters():
            raise ClusterError(f"cluster {cluster} has ended meanwhile") from error
        return {}, str(error)
