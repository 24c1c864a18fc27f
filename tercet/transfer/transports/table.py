"""Every transport, in order of preference, and which of them this process can use."""

from __future__ import annotations

from tercet.errors import SpecError
from tercet.transfer.transports.contract import Transport
from tercet.transfer.transports.nixl import NixlTransport
from tercet.transfer.transports.shm import ShmTransport
from tercet.transfer.transports.tcp import TcpTransport
from tercet.transfer.transports.torch_pg import TorchTransport
from tercet.transfer.transports.ucx import UcxTransport

ALL: tuple[type[Transport], ...] = (ShmTransport, NixlTransport, TcpTransport, UcxTransport, TorchTransport)
AUTO = "auto"
BY_NAME = frozenset({"nixl"})  # not part of `auto`: 1.5.1 stalls now and then while it connects (decision 009)


def missing(name: str) -> str | None:
    """Why a named transport cannot be used here; None if it can."""
    return _of_name(name).missing()


def usable(name: str) -> list[Transport]:
    """The transports that `name` allows and that are installed. Raises SpecError if a named one is not:
    no other is silently used instead."""
    if name == AUTO:
        return [cls() for cls in ALL if cls.name not in BY_NAME and cls.missing() is None]
    if (why := missing(name)) is not None:
        raise SpecError(f"transfer.transport: {name} cannot be used here: {why}")
    return [_of_name(name)()]


def _of_name(name: str) -> type[Transport]:
    return next(cls for cls in ALL if cls.name == name)
