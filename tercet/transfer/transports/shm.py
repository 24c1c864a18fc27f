"""Shared memory on one host: the writer maps the decode worker's cache (a memfd passed over an abstract Unix socket)
and copies into it; DATA says what has landed.

Copies: one, source cache to destination cache. Cancel: the receiver cannot fence a mapping, so a granted ticket is
quiesced by the writer's word (ABORT, ABORT_ACK, WRITTEN, GOODBYE) or by its death, proven by a pidfd that was opened
while the connection was open. Nothing has to be pumped or polled: waits block in the kernel.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

import numpy as np

from tercet.errors import ProtocolViolation
from tercet.transfer.links.channel import Channel
from tercet.transfer.links.wires import vet_unix
from tercet.transfer.transports.contract import Inlet, LinkContext, Outlet, Parcel, Transport


class ShmTransport(Transport):
    name = "shm"
    one_sided = True
    fenceable = False
    one_host = True

    def inlet(self, context: LinkContext) -> Inlet:
        return _ShmInlet(context)

    def outlet(self, context: LinkContext) -> Outlet:
        return _ShmOutlet(context)


class _ShmInlet(Inlet):
    def __init__(self, context: LinkContext) -> None:
        self.death_fd = vet_unix(context.channel.sock)
        self.fds = [context.host_region.fd]
        self.blob = context.host_region.num_bytes.to_bytes(8, "big")

    def land(self, channel: Channel, payload: int, views: Sequence[memoryview]) -> None:
        if payload:
            raise ProtocolViolation("DATA over shared memory carries no bytes")

    def fence(self) -> bool:
        return False


class _ShmOutlet(Outlet):
    def __init__(self, context: LinkContext) -> None:
        if len(context.fds) != 1:
            raise ProtocolViolation(f"WELCOME over shared memory carries {len(context.fds)} descriptors, not 1")
        num_bytes = int.from_bytes(context.blob, "big")
        try:
            if os.fstat(context.fds[0]).st_size != num_bytes:  # touching memory beyond its end would be a SIGBUS
                raise ValueError(f"it is not {num_bytes} bytes long")
            self._memory: memoryview | None = memoryview(mmap.mmap(context.fds[0], num_bytes))
        except (OSError, ValueError, OverflowError) as error:
            raise ProtocolViolation(f"the peer's KV cache cannot be mapped: {error}") from error
        # Touch every page now, or the first requests take the page faults: 16,000 of them for 64 MiB. By numpy and not
        # by MAP_POPULATE, which would keep every other thread from running, for seconds.
        np.frombuffer(self._memory, dtype=np.uint8)[:: mmap.PAGESIZE].max()

    def write(self, channel: Channel, parcel: Parcel) -> None:
        assert self._memory is not None
        assert isinstance(parcel.source, memoryview)
        if parcel.scatter is not None:
            parcel.scatter(self._memory)
        else:  # by numpy, which releases the GIL for large copies
            source, target = (np.frombuffer(memory, dtype=np.uint8) for memory in (parcel.source, self._memory))
            for src, dst, size in parcel.runs:
                target[dst : dst + size] = source[src : src + size]
        channel.send(parcel.message)

    def close(self) -> None:
        self._memory = None  # else the peer's cache would stay mapped until a garbage collection
