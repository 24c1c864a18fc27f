"""What is said of a spec before Ray is started."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace

import pytest

from tercet.cluster import preflight
from tercet.cluster.serve import serve
from tercet.cluster.signals import Signals
from tercet.core import Role
from tercet.errors import ClusterError, SpecError, UnsupportedSpec
from tercet.kernels.native import trial
from tercet.spec import ClusterSpec, GatewaySpec, ListenSpec, ModelSpec, RaySpec, RoleSpec, TransferSpec
from tercet.transfer.transports.ucx import UcxTransport
from tests.tiny import CONTEXT, tiny_model


def spec_of(**more) -> ClusterSpec:
    free = GatewaySpec(http=ListenSpec(port=0), grpc=ListenSpec(port=0))
    return ClusterSpec(**{"roles": {role: RoleSpec() for role in (Role.PREFILL, Role.DECODE)}, "gateway": free} | more)


@pytest.mark.parametrize("name", ["http", "grpc"])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::", "0.0.0.0", "localhost"])
def test_a_port_in_use_is_named(name, host):
    family = socket.AF_INET6 if host == "::1" else socket.AF_INET
    with socket.create_server(("::1" if host == "::1" else "127.0.0.1", 0), family=family) as taken:
        port = taken.getsockname()[1]
        gateway = GatewaySpec(
            **{"http": ListenSpec(port=0), "grpc": ListenSpec(port=0)} | {name: ListenSpec(host=host, port=port)}
        )
        wanted = f"port {port} on {host} is in use; free it or set gateway.{name}.port"
        with pytest.raises(ClusterError, match=wanted):
            preflight.check(spec_of(gateway=gateway), print)


def test_a_shorter_model_is_said_to_be():
    told: list[str] = []
    preflight.check(spec_of(model=ModelSpec(source=tiny_model(), max_context=8192)), told.append)
    assert told == [f"model.max_context is 8192, but the model has {CONTEXT} positions: {CONTEXT} are served"]
    preflight.check(spec_of(model=ModelSpec(source=tiny_model(), max_context=16)), told.append)
    assert len(told) == 1


def roles_with(**decode) -> dict[Role, RoleSpec]:
    return {Role.PREFILL: RoleSpec(), Role.DECODE: RoleSpec(**decode)}


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (
            {"roles": roles_with(cpu_affinity=[60000])},
            r"roles.decode.cpu_affinity: core 60000 is not here; .* name some",
        ),
        ({"roles": roles_with(kernels="native")}, r"roles.decode.kernels: native: there is no C\+\+ compiler /nope"),
        (
            {"model": ModelSpec(dtype="gguf")},
            r"model.dtype: gguf takes native kernels: there is no C\+\+ compiler /nope",
        ),
    ],
)
def test_serve_needs_no_ray_to_miss_what_workers_need(wanted, said, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tercet.cluster.serve.LocalRay", None)
    monkeypatch.setattr(trial, "missing", lambda: "there is no C++ compiler /nope; install g++")
    with pytest.raises(UnsupportedSpec, match=said):
        serve(spec_of(ray=RaySpec(address="local"), **wanted), Signals(print), print, print, print)


def test_serve_needs_no_ray_to_miss_a_transport(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(UcxTransport, "missing", classmethod(lambda cls: "no ucxx; pip install it"))
    monkeypatch.setattr("tercet.cluster.serve.LocalRay", None)
    wanted = spec_of(ray=RaySpec(address="local"), transfer=TransferSpec(transport="ucx"))
    with pytest.raises(SpecError, match="ucx cannot be used here: no ucxx; pip install it"):
        serve(wanted, Signals(print), print, print, print)


def test_a_driver_that_kills_who_asks_it_is_named():
    device = SimpleNamespace(kind="gpu", memory_bytes=os.abort)
    with pytest.raises(UnsupportedSpec, match="accelerator: gpu: the process that asked for its memory died"):
        preflight._memory_of(device)
