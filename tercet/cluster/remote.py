"""Queries, through Ray, to a cluster that another process serves."""

from __future__ import annotations

from typing import Any

import ray

from tercet.cluster import bounded
from tercet.cluster import ray_runtime as runtime
from tercet.cluster.launcher import actor_name
from tercet.cluster.reconcile import GATEWAY
from tercet.cluster.run_file import wait_gone
from tercet.errors import ClusterError, TercetError
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


def ask(cluster: str, method: str, *args: object, member: str = GATEWAY) -> Any:
    """Call a method of a member of the cluster. Raises ClusterError, and what the method does."""
    told = f"asking the {member} of {cluster}"
    return bounded.call(told, 2 * ANSWER_TIMEOUT_S, _call, cluster, member, method, *args)


def _call(cluster: str, member: str, method: str, *args: object) -> Any:
    try:
        actor = ray.get_actor(actor_name(cluster, member), namespace=runtime.NAMESPACE)
        return ray.get(getattr(actor, method).remote(*args), timeout=ANSWER_TIMEOUT_S)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, TercetError):
            raise error.cause from error
        raise _silent(cluster, member, error) from error
    except (ValueError, ray.exceptions.RayError) as error:
        raise _silent(cluster, member, error) from error


def _silent(cluster: str, member: str, error: Exception) -> ClusterError:
    reason = str(error).splitlines()[0]
    return ClusterError(f"the {member} of {cluster} does not answer: {reason}; is it just starting?")
