"""What `tercet doctor` checks: whether this machine can run what a spec may ask for, one line each."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from tercet.devices import DEVICES, Device
from tercet.errors import UnsupportedSpec
from tercet.kernels.native.library import library
from tercet.kernels.native.trial import missing
from tercet.kernels.triton import trial
from tercet.transfer.transports.table import ALL

EXTRAS = {"nixl", "ucx"}  # what `make extras` installs


@dataclass(frozen=True)
class Finding:
    name: str
    good: bool
    told: str


def findings() -> list[Finding]:
    """Every transport, accelerator and kind of compute kernels, and the kernel features that they need."""
    return [
        *(_transport(cls.name, cls.missing()) for cls in ALL),
        *(_accelerator(device) for device in DEVICES.values() if device.kind != "cpu"),
        _native_kernels(),
        *(_triton_kernels(device) for device in DEVICES.values() if device.kernels == "triton"),
        _can("memfd", lambda: os.close(os.memfd_create("tercet-doctor")), "no worker can start: its KV lies in one"),
        _can("pidfd", _open_pidfd, "shm cannot be used; set transfer.transport to tcp"),
    ]


def _transport(name: str, missing: str | None) -> Finding:
    if missing is not None and name in EXTRAS:
        missing += "; or, in a checkout, `make extras`"
    return Finding(f"transport {name}", missing is None, missing or "can be used")


def _accelerator(device: Device) -> Finding:
    try:
        held = device.memory_bytes()
    except UnsupportedSpec as error:
        return Finding(f"accelerator {device.kind}", False, str(error).removeprefix(f"accelerator {device.kind}: "))
    return Finding(f"accelerator {device.kind}", True, f"can be used, with {held / 2**30:.0f} GiB")


def _triton_kernels(device: Device) -> Finding:
    """Compiles them if there is a device."""
    try:
        reason = trial.missing(device.torch_device())
    except UnsupportedSpec:
        reason = f"no {device.kind.upper()} is here"
    return Finding("kernels triton", reason is None, reason or f"can be used on a {device.kind.upper()}")


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
