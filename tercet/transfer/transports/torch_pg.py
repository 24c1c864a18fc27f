"""`torch.distributed` point to point: a two-rank gloo group for each data link. (NCCL between GPUs and HCCL on Ascend
are other backends of the same calls; they are not built, since transfers reach KV only in host memory.)

Copies: into the library's buffers and out of them, besides the packing. It has no one-sided write, so units always
travel packed: the library fills a staging buffer of the receiver and never sees the cache. So a cancel is exact.
Pumping: the receiver's reader thread, while it lands. gloo closes a pair for good at its first timeout or failure, so
the link then ends and a new one gets a new group; it notices a dead peer when its socket closes, a stopped one after
the lease. Neither the store at which a group meets nor the group checks the cluster's token: for trusted networks only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tercet.errors import ProtocolViolation
from tercet.transfer.links.channel import Channel
from tercet.transfer.transports.contract import Inlet, LinkContext, Outlet, Parcel, Transport

if TYPE_CHECKING:
    from tercet.transfer.transports.torch_group import Group


class TorchTransport(Transport):
    name = "torch"
    pack_below = float("inf")  # always packed

    def __init__(self) -> None:
        # Imported neither with this module, which would slow every start by seconds, nor with the first link, which
        # must connect within the lease.
        from tercet.transfer.transports.torch_group import Group

        self._group: type[Group] = Group

    @classmethod
    def missing(cls) -> str | None:
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_gloo_available()):
            return "this build of torch has no torch.distributed with gloo"
        return None

    def inlet(self, context: LinkContext) -> Inlet:
        return _TorchInlet(self._group.at_receiver(context))

    def outlet(self, context: LinkContext) -> Outlet:
        return _TorchOutlet(self._group.at_sender(context))


class _TorchInlet(Inlet):
    def __init__(self, group: Group) -> None:
        self._group: Group | None = group
        self.blob = group.address

    def connected(self) -> None:
        assert self._group is not None
        self._group.meet()

    def land(self, channel: Channel, payload: int, views: Sequence[memoryview]) -> None:
        if payload:
            raise ProtocolViolation("DATA over torch.distributed carries no bytes on the link itself")
        assert self._group is not None
        for view in views:
            self._group.receive(view)

    def pass_over(self, channel: Channel, payload: int, num_bytes: int) -> None:
        self.land(channel, payload, [memoryview(bytearray(num_bytes))])

    def fence(self) -> bool:
        self._group = None
        return True


class _TorchOutlet(Outlet):
    def __init__(self, group: Group) -> None:
        group.meet()
        self._group: Group | None = group

    def write(self, channel: Channel, parcel: Parcel) -> None:
        channel.send(parcel.message)
        assert self._group is not None
        for view in parcel.views:
            self._group.send(view)

    def close(self) -> None:
        self._group = None
