"""CUDA IPC on one host: KV lies in the GPUs' own memory; the writer maps the decode worker's cache, by a handle of the
driver's, and its GPU copies into it, within one GPU or between two that have peer access. DATA says what has landed.

Copies: one, cache to cache, by a stream that waits for the layers it reads and for nothing else of the engine's. It is
over before DATA is sent, so what is said to have landed has. Cancel: as over shared memory, the receiver cannot fence a
mapping, so a granted ticket is quiesced by the writer's word or by its death, proven by a pidfd: a process that is dead
has closed the driver's files, with which its GPU work ends. Nothing has to be pumped: a wait sleeps in the driver.

A GPU is named by its UUID, since its number depends on CUDA_VISIBLE_DEVICES. One that a process does not see can still
be mapped by it (cudaIpcOpenMemHandle). A process cannot open its own handles, and uses its own address instead.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence

import msgpack

from tercet.errors import PeerMismatch, ProtocolViolation
from tercet.transfer.links.channel import Channel
from tercet.transfer.links.wires import vet_unix
from tercet.transfer.memory.layout import Run
from tercet.transfer.transports.contract import Inlet, LinkContext, Outlet, Parcel, Transport, library_errors

BLOB = [int, str, int, int, bytes]  # pid, UUID of the GPU, bytes, address in that process, handle
log = logging.getLogger(__name__)


class CudaIpcTransport(Transport):
    name = "cuda_ipc"
    one_sided = True
    fenceable = False
    one_host = True
    packs = False
    in_device_memory = True

    @classmethod
    def missing(cls) -> str | None:
        from tercet.transfer.memory.cuda import missing  # only now: torch

        return missing()

    def inlet(self, context: LinkContext) -> Inlet:
        return _CudaIpcInlet(context)

    def outlet(self, context: LinkContext) -> Outlet:
        return _CudaIpcOutlet(context)


class _CudaIpcInlet(Inlet):
    def __init__(self, context: LinkContext) -> None:
        region = context.device_region
        with library_errors("the KV cache cannot be shared with other processes"):
            handle = region.gpu.export(region.memory)
        self.blob = msgpack.packb([os.getpid(), region.gpu.uuid, region.num_bytes, region.memory, handle])
        self.death_fd = vet_unix(context.channel.sock)

    def land(self, channel: Channel, payload: int, views: Sequence[memoryview]) -> None:
        if payload:
            raise ProtocolViolation("DATA over CUDA IPC carries no bytes")

    def fence(self) -> bool:
        return False


class _CudaIpcOutlet(Outlet):
    def __init__(self, context: LinkContext) -> None:
        self._region = context.device_region
        self._gpu = self._region.gpu
        pid, uuid, self._num_bytes, address, handle = _unpacked(context.blob)
        self._opened = pid != os.getpid()
        with library_errors("no stream for copies into another worker's GPU memory"):
            self._stream = self._gpu.stream()
        try:
            self._target = self._gpu.open(handle, self._num_bytes, uuid) if self._opened else address
        except RuntimeError as error:
            ours = self._gpu.uuid
            raise PeerMismatch(f"the KV cache on GPU {uuid} cannot be mapped on GPU {ours}: {error}") from error

    def write(self, channel: Channel, parcel: Parcel) -> None:
        assert isinstance(parcel.source, int)
        if any(to + size > self._num_bytes for _, to, size in parcel.runs):
            raise ProtocolViolation(f"a write behind the end of the peer's cache of {self._num_bytes} bytes")
        try:
            with library_errors("the copy into the decode worker's GPU memory failed"):
                self._stream.wait(parcel.after)
                self.copy(parcel.source, parcel.runs)
        finally:
            self._end(channel)
        channel.send(parcel.message)

    def copy(self, source: int, runs: Sequence[Run]) -> None:
        """Have runs copied; they have landed once the stream is synchronised."""
        self._stream.copy(self._target, source, runs)

    def _end(self, channel: Channel) -> None:
        """Returns when every copy has ended. If the driver cannot say so, only the end of this process proves it: so it
        never returns, and the worker is told to be broken, that it may be replaced."""
        try:
            self._stream.synchronise()
        except RuntimeError as error:
            self._region.broken = f"the GPU's driver has failed: {error}"
            log.exception("copies into another worker's GPU memory may not have ended; this link waits for its process")
            channel.shutdown()
            threading.Event().wait()

    def close(self) -> None:
        try:
            if self._opened:
                self._gpu.close(self._target)
        except RuntimeError:
            log.exception("another worker's GPU memory stays mapped until this process ends")


def _unpacked(blob: bytes) -> tuple[int, str, int, int, bytes]:
    try:
        values = msgpack.unpackb(blob)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise ProtocolViolation(f"no CUDA IPC handle in the WELCOME: {error}") from error
    if not isinstance(values, list) or [type(value) for value in values] != BLOB or len(values[-1]) != 64:
        raise ProtocolViolation(f"no CUDA IPC handle in the WELCOME: {values!r:.80}")
    pid, uuid, num_bytes, address, handle = values
    return pid, uuid, num_bytes, address, handle
