"""Ports that stop serving while their process looks well: each kind is found from outside and named."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
from collections.abc import AsyncIterator, Iterator

import pytest

from tercet.cluster.ports import ask_ports
from tercet.core import Load, Role, WorkerInfo
from tercet.errors import WorkerLost
from tercet.roles.gateway.gateway import GatewayInfo
from tercet.transfer.mover.acceptor import Acceptor
from tercet.transfer.transports.contract import Endpoint, MoverConfig
from tercet.transfer.transports.group_endpoint import GroupEndpoint
from tercet.wire.worker_server import WorkerServer
from tests.fakes.gateway import running
from tests.fakes.router import FakeRouter
from tests.field.test_worker_links import TOKEN, Idle


@contextlib.contextmanager
def silent() -> Iterator[str]:
    """A port at which the kernel still takes connections, and nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@contextlib.contextmanager
def closed() -> Iterator[str]:
    with silent() as address:
        pass
    yield address


@pytest.fixture
async def gateway() -> AsyncIterator[GatewayInfo]:
    router = FakeRouter()
    router.missing = ["decode"]  # its /health is 503, which is an answer
    async with running(router) as (_, info):
        yield info


@pytest.fixture
def acceptor() -> Iterator[Acceptor]:
    """The transfer port of a decode worker."""
    acceptor = Acceptor(MoverConfig("decode-0", "model", TOKEN, 10.0, 2.0, True), lambda channel, hello: None)
    yield acceptor
    acceptor.stop()


@pytest.fixture
async def worker(acceptor) -> AsyncIterator[WorkerInfo]:
    server = WorkerServer(Idle(), Load, TOKEN)
    unix, tcp = acceptor.listen("127.0.0.1")
    endpoint = Endpoint("decode-0", 1, "host", unix, tcp, ["tcp"]).encode()
    yield WorkerInfo("decode-0", Role.DECODE, 1, await server.start("127.0.0.1"), endpoint, "")
    await server.stop()


async def test_members_that_serve_answer(gateway, worker, acceptor):
    await ask_ports(gateway, 5.0)
    await ask_ports(worker, 5.0)
    await ask_ports(dataclasses.replace(worker, transfer_endpoint=""), 5.0)
    degraded = GroupEndpoint(1, 1, 2, (worker.transfer_endpoint, "")).encode()  # one rank is lost
    await ask_ports(dataclasses.replace(worker, transfer_endpoint=degraded), 5.0)
    assert not acceptor.refused()


@pytest.mark.parametrize("fault", [silent, closed])
@pytest.mark.parametrize(("field", "name"), [("http_url", "HTTP"), ("grpc_address", "gRPC")])
async def test_a_port_of_the_gateway_is_named(gateway, field, name, fault):
    with fault() as address:
        broken = dataclasses.replace(gateway, **{field: f"http://{address}" if name == "HTTP" else address})
        with pytest.raises(WorkerLost, match=rf"its {name} port at .*{address} does not answer new connections: ."):
            await ask_ports(broken, 0.5)


@pytest.mark.parametrize("fault", [silent, closed])
async def test_the_grpc_port_of_a_worker_is_named(worker, fault):
    with fault() as address, pytest.raises(WorkerLost, match=f"its gRPC port at {address} does not answer"):
        await ask_ports(dataclasses.replace(worker, rpc_address=address), 0.5)


@pytest.mark.parametrize("fault", [silent, closed])
async def test_the_transfer_port_of_a_worker_is_named(worker, fault):
    with fault() as address:
        endpoint = Endpoint("decode-0", 1, "host", "unix", [address], ["tcp"]).encode()
        broken = dataclasses.replace(worker, transfer_endpoint=endpoint)
        with pytest.raises(WorkerLost, match=f"its transfer port at {address} does not answer"):
            await ask_ports(broken, 0.5)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]"])
async def test_a_gateway_on_all_addresses_is_asked_on_loopback(gateway, host):
    port = gateway.grpc_address.rpartition(":")[2]
    on_all = dataclasses.replace(gateway, grpc_address=f"{host}:{port}")
    if host == "0.0.0.0":
        await ask_ports(on_all, 5.0)
    else:
        with pytest.raises(WorkerLost, match="gRPC"):  # it listens on IPv4 alone here
            await ask_ports(on_all, 0.5)
