"""What `tercet doctor` checks: whether this machine can run what a spec may ask for, one line each."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from tercet.kernels.native.library import library
from tercet.kernels.native.trial import missing
from tercet.transfer.transports.table import ALL

EXTRAS = {"nixl", "ucx"}  # what `make extras` installs


@dataclass(frozen=True)
class Finding:
    name: str
    good: bool
    told: str


def findings() -> list[Finding]:
    """Every transport, the kernel features that they need, and the compute kernels."""
    found = [_transport(cls.name, cls.missing()) for cls in ALL]
    return [
        *found,
        _native_kernels(),
        _can("memfd", lambda: os.close(os.memfd_create("tercet-doctor")), "no worker can start: its KV lies in one"),
        _can("pidfd", _open_pidfd, "shm cannot be used; set transfer.transport to tcp"),
    ]


def _transport(name: str, missing: str | None) -> Finding:
    if missing is not None and name in EXTRAS:
        missing += "; or, in a checkout, `make extras`"
    return Finding(f"transport {name}", missing is None, missing or "can be used")


def _native_kernels() -> Finding:
    """Compiles them if that was not done yet."""
    reason = missing()
    if reason is not None:
        return Finding("kernels native", False, f"{reason}: torch's are used, which are slower")
    return Finding("kernels native", True, f"can be used, compiled for {library().instructions().decode()}")


def _open_pidfd() -> None:
    os.close(os.pidfd_open(os.getpid()))


def _can(name: str, attempt: Callable[[], None], otherwise: str) -> Finding:
    try:
        attempt()
    except OSError as error:
        return Finding(name, False, f"{error.strerror}: {otherwise}")
    return Finding(name, True, "the kernel allows it")
