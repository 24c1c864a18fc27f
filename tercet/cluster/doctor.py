"""What `tercet doctor` checks: whether this machine can run what a spec may ask for, or one spec, one line each."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tercet.cluster.doctor_links import measured
from tercet.cluster.preflight import bind
from tercet.core import PairState
from tercet.devices import DEVICES, Device
from tercet.errors import TercetError, TransferError, UnsupportedSpec
from tercet.kernels.native.library import library
from tercet.kernels.native.trial import missing
from tercet.kernels.triton import trial
from tercet.models.sources import is_local, locate
from tercet.roles.gateway.keys import by_digest, read_keys
from tercet.spec import ClusterSpec, ListenSpec
from tercet.tls import GatewayTls, PeerTls
from tercet.transfer.transports.contract import Transport
from tercet.transfer.transports.table import ALL
from tercet.transfer.transports.tcp import TcpTransport
from tercet.wire.listening import address, is_loopback, listen_error

EXTRAS = {"nixl", "ucx"}  # what `make extras` installs


PACKAGES = ("tercet", "torch", "ray", "grpcio", "transformers", "triton")


@dataclass(frozen=True)
class Finding:
    name: str
    good: bool
    told: str


def findings() -> list[Finding]:
    """Versions; every transport, with its speed here, accelerator and kind of compute kernels; and the kernel features
    that they need."""
    return [
        _versions(),
        _machine(),
        *(_transport(cls) for cls in ALL),
        *(_accelerator(device) for device in DEVICES.values() if device.kind != "cpu"),
        _native_kernels(),
        *(_triton_kernels(device) for device in DEVICES.values() if device.kernels == "triton"),
        _can("memfd", lambda: os.close(os.memfd_create("tercet-doctor")), "no worker can start: its KV lies in one"),
        _can("pidfd", _open_pidfd, "shm cannot be used; set transfer.transport to tcp"),
    ]


def of_spec(spec: ClusterSpec) -> list[Finding]:
    """What this machine has of what the spec names, and who would listen where."""
    return [
        _can_say("model", lambda: _model(spec)),
        *(_can_say(f"gateway.{name}", partial(_port, spec, name)) for name in ("http", "grpc")),
        *([_can_say("gateway.api_keys", partial(_keys, path))] if (path := spec.gateway.api_keys) else []),
        *([_can_say("gateway.tls", partial(_tls, spec))] if spec.gateway.tls else []),
        *([_can_say("network.tls", partial(_peer_tls, spec))] if spec.network.tls else []),
        Finding("workers", True, _where_workers_listen(spec)),
        Finding("Ray", True, _where_ray_listens(spec)),
    ]


def _can_say(name: str, attempt: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, attempt())
    except TercetError as error:
        return Finding(name, False, str(error))


def _versions() -> Finding:
    told = [f"{name} {_version(name)}" for name in PACKAGES]
    return Finding("versions", True, f"{', '.join(told)}, Python {platform.python_version()}, {platform.release()}")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _machine() -> Finding:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Finding("machine", True, f"{len(os.sched_getaffinity(0))} CPUs for this process, {memory:.0f} GiB of memory")


def _transport(kind: type[Transport]) -> Finding:
    name, missing = f"transport {kind.name}", kind.missing()
    if missing is not None:
        return Finding(name, False, missing + ("; or, in a checkout, `make extras`" if kind.name in EXTRAS else ""))
    if kind.in_device_memory:
        return Finding(name, True, "can be used")
    try:
        pair = measured(kind())
    except TransferError as error:
        return Finding(name, False, f"is installed, and moves nothing here: {error}")
    return Finding(name, True, f"can be used: {_speed(pair)}")


def _speed(pair: PairState) -> str:
    return f"{pair.bandwidth / 1e9:.1f} GB/s, {pair.latency_s * 1e6:.0f} us, within this machine and one process"


def _model(spec: ClusterSpec) -> str:
    source = spec.model.source
    if not is_local(spec.model):
        return f"{source} is not here: it would be fetched when the cluster starts"
    path = locate(spec.model)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    count = "1 file" if len(files) == 1 else f"{len(files)} files"
    return f"{path}, {sum(file.stat().st_size for file in files) / 1e9:.2f} GB in {count}"


def _port(spec: ClusterSpec, name: str) -> str:
    listen: ListenSpec = getattr(spec.gateway, name)
    try:
        bind(listen)
    except OSError as error:
        raise listen_error(listen.host, listen.port, error, f"gateway.{name}") from error
    who = "this machine alone" if is_loopback(listen.host) else "whoever reaches it"
    keys, tls = ("a key" if spec.gateway.api_keys else "no key"), ("TLS" if spec.gateway.tls else "no TLS")
    return f"{address(listen.host, listen.port)} is free; for {who}, with {keys} and {tls}"


def _keys(path: str) -> str:
    return f"{path} has {len(by_digest(read_keys(Path(path)), path))} keys"


def _tls(spec: ClusterSpec) -> str:
    assert spec.gateway.tls is not None
    GatewayTls(spec.gateway.tls, ())
    return f"{spec.gateway.tls.certificate} and its key can be used"


def _peer_tls(spec: ClusterSpec) -> str:
    wanted = spec.network.tls
    assert wanted is not None
    speed = _speed(measured(TcpTransport(), PeerTls(wanted)))
    return (
        f"{wanted.certificate} and its key can be used; peers are {wanted.name}, by {wanted.ca}; TCP with it: {speed}"
    )


def _where_workers_listen(spec: ClusterSpec) -> str:
    where = "on loopback" if spec.network.host == "loopback" else "on the address of their Ray node"
    secured = "behind the cluster's secret and TLS" if spec.network.tls else "behind the cluster's secret, without TLS"
    return f"listen {where}, on free ports, {secured}"


def _where_ray_listens(spec: ClusterSpec) -> str:
    if spec.ray.address == "local":
        return "is started with the cluster, on loopback, and takes a token"
    if spec.ray.address == "auto":
        return "one that this user runs here is joined and listens as it was started; else one is started on loopback"
    return f"the one at {spec.ray.address} is joined and listens as it was started"


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
