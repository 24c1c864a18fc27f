"""Probes a gRPC port: one call over a new connection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import grpc

HEALTH = "/grpc.health.v1.Health/Check"  # the standard service; an empty request asks for the whole server
OPTIONS = [
    ("grpc.enable_http_proxy", 0),  # between our own processes nothing goes through a proxy
    ("grpc.use_local_subchannel_pool", 1),  # a new connection, not one that an earlier channel has left open
]
_SILENT = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}


@dataclass(frozen=True)
class Answer:
    """How a call ended. An error status is an answer too; only without one is the port `silent`."""

    status: str  # in gRPC's words: OK, UNIMPLEMENTED, ...
    reply: bytes = b""  # not decoded
    details: str = ""
    silent: bool = False


@dataclass(frozen=True)
class Certificates:
    """What a port that speaks TLS asks for. PEM."""

    root: bytes
    key: bytes
    chain: bytes


def ask(
    address: str,
    timeout_s: float,
    method: str = HEALTH,
    metadata: Sequence[tuple[str, str]] = (),
    tls: Certificates | None = None,
) -> Answer:
    """Send an empty request to host:port, over a new connection that is closed again."""
    with _channel(address, tls) as channel:
        try:
            call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(method)
            return Answer("OK", call(b"", timeout=timeout_s, metadata=tuple(metadata)))
        except grpc.RpcError as error:
            code = error.code()
            return Answer(code.name, details=error.details() or "", silent=code in _SILENT)


def _channel(address: str, tls: Certificates | None) -> grpc.Channel:
    if tls is None:
        return grpc.insecure_channel(address, options=OPTIONS)
    credentials = grpc.ssl_channel_credentials(tls.root, tls.key, tls.chain)
    return grpc.secure_channel(address, credentials, options=OPTIONS)
