"""TCP: the bytes follow their DATA on the channel, sent from the source cache by vectored I/O and received straight
into the destination blocks; or packed, where that makes few large pieces of many small ones.

Copies: one into the kernel, one out; packed: one more on each side, which a digest takes anyway. Cancel is exact: the
receiver places the bytes, so a ticket that is over is quiet as soon as no landing is under way. Nothing has to be
pumped. Silent peers are noticed by TCP_USER_TIMEOUT and keepalive (transfer/links/wires.py), not by the kernel's
defaults.
"""

from __future__ import annotations

from collections.abc import Sequence

from tercet.errors import ProtocolViolation
from tercet.transfer.links.channel import Channel
from tercet.transfer.transports.contract import Inlet, LinkContext, Outlet, Parcel, Transport


class TcpTransport(Transport):
    name = "tcp"
    takes_tls = True
    links = 2  # one link's threads pack and digest while the other's bytes are in flight

    def inlet(self, context: LinkContext) -> Inlet:
        return _TcpInlet()

    def outlet(self, context: LinkContext) -> Outlet:
        return _TcpOutlet()


class _TcpInlet(Inlet):
    def land(self, channel: Channel, payload: int, views: Sequence[memoryview]) -> None:
        expected = sum(map(len, views))
        if payload != expected:
            raise ProtocolViolation(f"DATA carries {payload} bytes, not {expected}")
        channel.receive_into(views)

    def fence(self) -> bool:
        return True


class _TcpOutlet(Outlet):
    def write(self, channel: Channel, parcel: Parcel) -> None:
        channel.send(parcel.message, parcel.views)
