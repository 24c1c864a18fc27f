"""Queries, through Ray, to a cluster that another process serves."""

from __future__ import annotations

from typing import Any

import ray

from tercet.cluster import bounded
from tercet.cluster import ray_runtime as runtime
from tercet.cluster.launcher import actor_name
from tercet.cluster.reconcile import GATEWAY
from tercet.cluster.run_file import wait_gone
from tercet.errors import ClusterError
from tercet.placement.roles import Node

ANSWER_TIMEOUT_S = 10.0


def nodes(address: str) -> list[Node]:
    """The nodes of the Ray at `address`. Raises ClusterError."""
    with runtime.joined(address):
        return bounded.call("asking Ray for its nodes", ANSWER_TIMEOUT_S, runtime.nodes)


def refuse_second(cluster: str) -> None:
    """Raises ClusterError if the Ray that this process has joined already holds a cluster of that name."""
    if cluster in clusters():
        raise ClusterError(f"a cluster named {cluster} already runs in this Ray; serve this one with --set name=OTHER")


def status(name: str | None, address: str) -> dict[str, Any]:
    """The gateway's status (`GatewayActor.health`), with its cluster's `name`. Raises ClusterError if there is none."""
    with runtime.joined(address):
        found = pick(name, address)
        return dict(ask(found, "health"), name=found)


def down(name: str | None, address: str, timeout_s: float) -> str:
    """Have a cluster drained and ended. -> its name, once it is gone. Raises ClusterError if it is not in time."""
    with runtime.joined(address):
        found = pick(name, address)
        ask(found, "request_stop")
        wait_gone(found, lambda: found not in clusters(), timeout_s)
        return found


def clusters() -> list[str]:
    """Names of the clusters that have any actor in this Ray."""
    named = bounded.call("asking Ray for its actors", ANSWER_TIMEOUT_S, ray.util.list_named_actors, True)
    return sorted({a["name"].partition(":")[0] for a in named if a["namespace"] == runtime.NAMESPACE})


def pick(name: str | None, address: str) -> str:
    """The cluster of that name, or the only one. Raises ClusterError."""
    known = clusters()
    if name is None and len(known) == 1:
        return known[0]
    if name in known:
        return name
    which = f"no cluster named {name}" if name else "say by --name which cluster:" if known else "no cluster"
    raise ClusterError(f"{which} in the Ray at {address}" + (f" (there: {', '.join(known)})" if known else ""))


def ask(cluster: str, method: str, *args: object) -> Any:
    """Call a method of the cluster's gateway. Raises ClusterError."""
    return bounded.call(f"asking the gateway of {cluster}", 2 * ANSWER_TIMEOUT_S, _call, cluster, method, *args)


def _call(cluster: str, method: str, *args: object) -> Any:
    try:
        gateway = ray.get_actor(actor_name(cluster, GATEWAY), namespace=runtime.NAMESPACE)
        return ray.get(getattr(gateway, method).remote(*args), timeout=ANSWER_TIMEOUT_S)
    except (ValueError, ray.exceptions.RayError) as error:
        reason = str(error).splitlines()[0]
        raise ClusterError(f"the gateway of {cluster} does not answer: {reason}; is it just starting?") from error
