"""Whether a member's ports still serve, checked from outside its process by a new connection to each.

The process itself cannot tell: a server that no longer accepts connections still serves its open streams.
"""

from __future__ import annotations

import http.client
import socket
import ssl
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tercet.cluster import bounded
from tercet.core import WorkerInfo
from tercet.errors import WorkerLost
from tercet.tls import PeerTls
from tercet.wire import knock, listening

if TYPE_CHECKING:
    from tercet.roles.gateway.gateway import GatewayInfo

_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104, compared, not bound

Asked = tuple[str, Callable[[str, float], str], str]  # name, check, address


async def ask_ports(info: WorkerInfo | GatewayInfo, timeout_s: float, tls: PeerTls | None = None) -> None:
    """Ask every port, one after the other. tls: of workers. Raises WorkerLost naming the first that does not answer in
    `timeout_s`."""
    for name, ask, where in _ports(info, tls):
        fault = await bounded.wait(f"asking the {name} port at {where}", 2 * timeout_s, ask, where, timeout_s)
        if fault:
            raise WorkerLost(f"its {name} port at {where} does not answer new connections: {fault}")


def _ports(info: WorkerInfo | GatewayInfo, tls: PeerTls | None) -> Iterator[Asked]:
    if not isinstance(info, WorkerInfo):
        yield "HTTP", _http, info.http_url
        yield "gRPC", _speaks_tls if info.http_url.startswith("https:") else _grpc, info.grpc_address
        return
    grpc, tcp = (_grpc, _tcp) if tls is None else (partial(_speaks_tls, tls=tls),) * 2
    yield "gRPC", grpc, info.rpc_address
    if info.transfer_endpoint:
        from tercet.transfer.transports.contract import Endpoint  # only now: numpy
        from tercet.transfer.transports.group_endpoint import GroupEndpoint

        for rank in filter(None, GroupEndpoint.decode(info.transfer_endpoint).ranks):  # none of one that is lost
            for address in Endpoint.decode(rank).tcp:
                yield "transfer", tcp, address


def _http(url: str, timeout_s: float) -> str:
    """Any answer will do, 503 included. -> what went wrong; empty if nothing did."""
    parts = urlsplit(url)
    host, port = _reachable(parts.hostname or ""), parts.port
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(host, port, timeout=timeout_s, context=_unchecked())
    try:
        connection.request("GET", "/health", headers={"Connection": "close"})
        connection.getresponse().read()
    except (OSError, http.client.HTTPException) as error:
        return _told(error)
    finally:
        connection.close()
    return ""


def _grpc(address: str, timeout_s: float) -> str:
    """Any status will do: a worker has no health service, and answers so."""
    answer = knock.ask(listening.address(*_split(address)), timeout_s)
    return f"{answer.status}: {answer.details}" if answer.silent else ""


def _tcp(address: str, timeout_s: float) -> str:
    """The acceptor sends first: a CHALLENGE."""
    try:
        with socket.create_connection(_split(address), timeout_s) as connection:
            return "" if connection.recv(1) else "it closes them"
    except OSError as error:
        return _told(error)


def _speaks_tls(address: str, timeout_s: float, tls: PeerTls | None = None) -> str:
    """Whoever listens sends first: SETTINGS, or a CHALLENGE. tls: None: of a port whose name is unknown here."""
    context, name = (_unchecked(), None) if tls is None else (tls.client(), tls.name)
    try:
        with (
            socket.create_connection(_split(address), timeout_s) as bare,
            context.wrap_socket(bare, server_hostname=name) as secured,
        ):
            return "" if secured.recv(1) else "it closes them"
    except OSError as error:
        return _told(error)


def _unchecked() -> ssl.SSLContext:
    """For our own gateway: that it answers is asked, not who it is."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return _reachable(host.strip("[]")), int(port)


def _reachable(host: str) -> str:
    return _LOOPBACK.get(host, host)


def _told(error: Exception) -> str:
    return str(error) or type(error).__name__
