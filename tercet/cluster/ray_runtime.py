"""This process's connection to a Ray. These functions may block for long, so call them through `bounded`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import ray

from tercet.cluster import bounded
from tercet.cluster.home import GCS
from tercet.cluster.ray_address import resolve
from tercet.errors import ClusterError
from tercet.placement.roles import Node

NAMESPACE = "tercet"
CONNECT_TIMEOUT_S = 30.0
DISCONNECT_TIMEOUT_S = 5.0


def connect(address: str) -> None:
    """Join the Ray at host:port. Raises ClusterError."""
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split())
        hint = "if it asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
        raise ClusterError(f"Ray at {address} cannot be used: {reason}; {hint}") from error


def disconnect() -> None:
    ray.shutdown()


@contextlib.contextmanager
def joined(wanted: str) -> Iterator[str]:
    """A connection for a short visit. -> the host:port that `wanted` led to. Raises ClusterError if no Ray is there."""
    passed_over: list[str] = []
    address = resolve(wanted, passed_over.append)
    if address is None:
        why = "".join(f"; {line}" for line in passed_over)
        raise ClusterError(f"no Ray runs on this machine; give the --address of one, as host:port{why}")
    bounded.call(f"joining the Ray at {address}", CONNECT_TIMEOUT_S, connect, address)
    try:
        yield address
    finally:
        with contextlib.suppress(ClusterError):  # the end of this process leaves it, too
            bounded.call("leaving Ray", DISCONNECT_TIMEOUT_S, disconnect)


def nodes() -> list[Node]:
    """The live nodes, this process's own first."""
    own = ray.get_runtime_context().get_node_id()
    alive = [n for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]
    return [_node(n) for n in sorted(alive, key=lambda n: (n["NodeID"] != own, n["NodeID"]))]


def log_folder() -> str:
    """Where the processes of this Ray write their logs on this node. Ray has no public API for it before 2.60."""
    node: Any = ray._private.worker._global_node
    return str(node.get_logs_dir_path())


def servers(gcs_address: str) -> dict[str, str]:
    """The servers of Ray that this process depends on: name -> host:port."""
    own = ray.get_runtime_context().get_node_id()
    node = next(n for n in ray.nodes() if n["NodeID"] == own)  # type: ignore[no-untyped-call]
    address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
    return {GCS: gcs_address, "the Ray node of this process": address}


def _node(found: dict[str, Any]) -> Node:
    amounts = {kind: found["Resources"].get(kind, 0.0) for kind in ("CPU", "GPU", "NPU")}
    return Node(found["NodeID"], found["NodeManagerAddress"], found["Labels"], {k: v for k, v in amounts.items() if v})
