"""The Ray that a cluster runs on: joined, or started here and then ours to stop."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, Self

# Read by Ray when it is imported: no usage report leaves this machine, and accelerators are left as they are.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray

from tercet.cluster.launcher import NAMESPACE
from tercet.errors import ClusterError
from tercet.placement.roles import Node

OBJECT_STORE_BYTES = 80 * 1024 * 1024  # Ray's least is 75 MiB; nothing of ours goes through it
CONNECT_TIMEOUT_S = 3.0
_AUTH_VARIABLES = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}  # any one set: the user decides


class RayRuntime:
    """`with RayRuntime(address, cpus)`: a connection to Ray; a local Ray that it started ends with it.

    cpus: of the Ray to start where none is to join; None: never start one.
    token_path: where to put the token that a Ray started here asks of everyone; None: Ray's own default.
    Raises ClusterError when no Ray answers at the address, or a local one cannot start.
    """

    def __init__(self, address: str, cpus: int | None = None, token_path: Path | None = None) -> None:
        self._wanted = address
        self._cpus = cpus
        self._token_path = token_path
        self.is_ours = False

    def __enter__(self) -> Self:
        address = resolve_address(self._wanted)
        self.is_ours = address is None
        options = {"address": address} if address else self._local()
        try:
            ray.init(**options, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
        except KeyboardInterrupt:
            ray.shutdown(wait_for_processes=True)
            raise
        except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
            reason = " ".join(str(error).split())
            hint = "; if it asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH" if address else ""
            raise ClusterError(f"Ray at {address or 'this machine'} cannot be used: {reason}{hint}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        ray.shutdown(wait_for_processes=True)

    def _local(self) -> dict[str, Any]:
        if self._cpus is None:
            raise ClusterError("no Ray runs on this machine; give the --address of one, as host:port")
        if self._token_path is not None and not _AUTH_VARIABLES & os.environ.keys():
            self._token_path.write_text(secrets.token_hex(32))
            os.environ["RAY_AUTH_TOKEN_PATH"] = str(self._token_path)  # else Ray leaves one in the user's home
        return {
            "address": "local",
            "num_cpus": self._cpus,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }

    @property
    def address(self) -> str:
        """host:port by which another process can join."""
        return str(ray.get_runtime_context().gcs_address)

    def nodes(self) -> list[Node]:
        """The live nodes, this process's own first."""
        own = ray.get_runtime_context().get_node_id()
        alive = [n for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]
        return [_node(n) for n in sorted(alive, key=lambda n: (n["NodeID"] != own, n["NodeID"]))]


def resolve_address(wanted: str) -> str | None:
    """The Ray to join, as ray.init takes it, or None to start one.

    auto: RAY_ADDRESS (as `ray job submit` sets it), else the Ray that `ray start` left running here, else none.
    Raises ClusterError if an address that was asked for by name does not answer.
    """
    if wanted == "local":
        return None
    named = os.environ.get("RAY_ADDRESS", "") if wanted == "auto" else wanted
    if named == "local":
        return None
    if named in {"", "auto"}:
        found = _address_file()
        # The file outlives a Ray that was killed: only an address that answers counts.
        # Ray is told `auto`, since only then it takes the token that `ray start` took.
        return "auto" if found and _answers(found) else None
    _check_form(named)
    if not _answers(named):
        raise ClusterError(f"no Ray answers at {named}; start one with `ray start --head`, or set ray.address: local")
    return named


def _check_form(address: str) -> None:
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdigit():
        raise ClusterError(f"Ray address {address!r}: want host:port of its GCS, such as 127.0.0.1:6379")


def _address_file() -> str | None:
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # noqa: S108, where Ray puts it
    try:
        return (Path(folder) / "ray" / "ray_current_cluster").read_text().strip() or None
    except OSError:
        return None


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError, OverflowError):
        return False
    return True


def _node(found: dict[str, Any]) -> Node:
    amounts = {kind: found["Resources"].get(kind, 0.0) for kind in ("CPU", "GPU", "NPU")}
    return Node(found["NodeID"], found["NodeManagerAddress"], found["Labels"], {k: v for k, v in amounts.items() if v})
