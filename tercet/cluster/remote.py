"""What one process asks of a cluster that another one serves."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import ray

from tercet.cluster import run_file
from tercet.cluster.launcher import NAMESPACE, actor_name
from tercet.cluster.ray_runtime import RayRuntime
from tercet.cluster.reconcile import GATEWAY
from tercet.errors import ClusterError

ANSWER_TIMEOUT_S = 10.0
POLL_S = 0.2


def refuse_second(cluster: str) -> None:
    """Raises ClusterError if this Ray already holds a cluster of that name."""
    if _gateway(cluster) is not None:
        raise ClusterError(f"a cluster named {cluster} already runs in this Ray; serve this one with --set name=OTHER")


def status(name: str | None, address: str | None) -> dict[str, Any]:
    """The gateway's status (`GatewayActor.health`). Raises ClusterError if there is no such cluster."""
    if address is None:
        found = run_file.find(name)
        name, address = found.name, found.ray_address
        if not address:
            raise ClusterError(f"cluster {name} is still starting")
    with RayRuntime(address):
        gateway = _known_gateway(name, address)
        return dict(_answer(gateway.health.remote()), name=name)


def down(name: str | None, address: str | None, timeout_s: float) -> str:
    """Drain and end a cluster; its name once it is gone. Raises ClusterError if it does not go in `timeout_s`."""
    return _down_here(name, timeout_s) if address is None else _down_there(name, address, timeout_s)


def _down_here(name: str | None, timeout_s: float) -> str:
    """A controller on this machine is asked by signal, which reaches it even while its gateway is being replaced."""
    found = run_file.find(name)
    os.kill(found.pid, signal.SIGTERM)
    _wait_gone(found.name, lambda: all(one.pid != found.pid for one in run_file.served()), timeout_s)
    return found.name


def _down_there(name: str | None, address: str, timeout_s: float) -> str:
    with RayRuntime(address):
        known = _clusters() if name is None else [name]
        if len(known) != 1:
            raise ClusterError(
                f"which cluster of the Ray at {address}? say --name (there: {', '.join(known) or 'none'})"
            )
        _answer(_known_gateway(known[0], address).request_stop.remote())
        _wait_gone(known[0], lambda: known[0] not in _clusters(), timeout_s)
        return known[0]


def _wait_gone(name: str, gone: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not gone():
        if time.monotonic() > deadline:
            raise ClusterError(f"cluster {name} was asked to stop but still stands after {timeout_s:g} s")
        time.sleep(POLL_S)


def _clusters() -> list[str]:
    """Names of the clusters that have any actor in this Ray."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return sorted({a["name"].partition(":")[0] for a in named if a["namespace"] == NAMESPACE})


def _known_gateway(name: str | None, address: str) -> Any:
    known = _clusters()
    if name is None and len(known) == 1:
        name = known[0]
    gateway = _gateway(name) if name else None
    if gateway is None:
        wanted = f"no cluster named {name}" if name else "no single cluster"
        raise ClusterError(f"{wanted} in the Ray at {address} (there: {', '.join(known) or 'none'})")
    return gateway


def _gateway(cluster: str) -> Any | None:
    try:
        return ray.get_actor(actor_name(cluster, GATEWAY), namespace=NAMESPACE)
    except ValueError:
        return None


def _answer(ref: Any) -> Any:
    try:
        return ray.get(ref, timeout=ANSWER_TIMEOUT_S)
    except ray.exceptions.RayError as error:
        raise ClusterError(f"the gateway does not answer: {str(error).splitlines()[0]}") from error
