"""TCP: DATA carries its bytes, vectored out of the source cache and received straight into the destination blocks.

Copies: one into the kernel, one out. Cancel is exact: the receiver places the bytes, so a ticket that is over is
fenced as soon as no landing is under way. Silent peers are noticed by TCP_USER_TIMEOUT and keepalive, not by library
defaults of 15 minutes.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

from tercet.errors import PeerDown, ProtocolViolation
from tercet.transfer.channel import Channel
from tercet.transfer.messages import Data, Welcome
from tercet.transfer.region import Region
from tercet.transfer.transport import Target, Transport, accept_welcome

USER_TIMEOUT_MS = 5_000
KEEPALIVE_S = (2, 1, 3)  # idle, interval, probes


class TcpTransport(Transport):
    name = "tcp"
    one_sided = False

    def listen(self, host: str) -> tuple[socket.socket, str]:
        sock = socket.create_server((host, 0), backlog=64)
        bound_host, port = sock.getsockname()[:2]
        return sock, f"{bound_host}:{port}"

    def vet(self, sock: socket.socket) -> int | None:
        _tune(sock)
        return None

    def greet(self, channel: Channel, welcome: Welcome, region: Region) -> None:
        channel.send(welcome)

    def land(self, channel: Channel, payload_bytes: int, region: Region, layer: int, blocks: Sequence[int]) -> None:
        expected = len(blocks) * region.layout.block_bytes
        if payload_bytes != expected:
            raise ProtocolViolation(f"DATA of {len(blocks)} blocks carries {payload_bytes} bytes, not {expected}")
        for view in region.views(layer, blocks):
            channel.receive_into(view)

    def dial(self, address: str, timeout_s: float) -> socket.socket:
        host, port = address.rsplit(":", 1)
        try:
            sock = socket.create_connection((host, int(port)), timeout=timeout_s)
        except OSError as error:
            raise PeerDown(f"no transfer connection to {address}: {error}") from error
        _tune(sock)
        return sock

    def attach(self, channel: Channel) -> Target:
        message, _ = channel.receive()
        return Target(accept_welcome(message))

    def write(
        self, channel: Channel, target: Target, source: Region, data: Data, blocks: Sequence[int], dst: Sequence[int]
    ) -> None:
        channel.send(data, source.views(data.layer, blocks))


def _tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle, interval, probes = KEEPALIVE_S
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, probes)
