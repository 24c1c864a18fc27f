"""Every transport, in order of preference, and which of them this process can use."""

from __future__ import annotations

from tercet.errors import SpecError
from tercet.transfer.transports.contract import Transport
from tercet.transfer.transports.cuda_ipc import CudaIpcTransport
from tercet.transfer.transports.nixl import NixlGpuTransport, NixlTransport
from tercet.transfer.transports.shm import ShmTransport
from tercet.transfer.transports.tcp import TcpTransport
from tercet.transfer.transports.torch_pg import TorchTransport
from tercet.transfer.transports.ucx import UcxTransport

ALL: tuple[type[Transport], ...] = (
    CudaIpcTransport,
    ShmTransport,
    NixlTransport,
    NixlGpuTransport,
    TcpTransport,
    UcxTransport,
    TorchTransport,
)
AUTO = "auto"
BY_NAME = frozenset({"nixl", "nixl_gpu", "cuda_ipc"})  # not part of `auto`; why: decisions 009 and 015


def missing(name: str) -> str | None:
    """Why a named transport cannot be used here; None if it can."""
    return _of_name(name).missing()


def usable(name: str, *, tls: bool = False) -> list[Transport]:
    """The transports that `name` allows and that are installed. tls: what leaves the host must be encrypted. Raises
    SpecError if a named one is not: no other is silently used instead."""
    if name == AUTO:
        fitting = (cls for cls in ALL if cls.name not in BY_NAME and (keeps_secret(cls.name) or not tls))
        return [cls() for cls in fitting if cls.missing() is None]
    if (why := missing(name)) is not None:
        raise SpecError(f"transfer.transport: {name} cannot be used here: {why}")
    return [_of_name(name)()]


def keeps_secret(name: str) -> bool:
    """Whether what it moves never leaves the host, or goes through TLS."""
    return name == AUTO or _of_name(name).one_host or _of_name(name).takes_tls


def in_device_memory(name: str) -> bool:
    """Where a GPU's worker has the KV that transfers read and write: in its own memory, or in a copy in the host's
    (engine/kv_cache.py). Under `auto` in the host's, since it is chosen before any peer is known."""
    return name != AUTO and _of_name(name).in_device_memory


def _of_name(name: str) -> type[Transport]:
    return next(cls for cls in ALL if cls.name == name)
