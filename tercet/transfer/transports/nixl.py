"""NIXL: one-sided writes from the prefill cache into the decode cache, each with a notification (UCX below: RDMA, TCP,
shared memory). One agent per data link on each side, named by a uuid, so a restarted peer is never taken for its
predecessor. The message goes first, on the channel, then the write; so the receiver pumps only during a write.

Copies: none on RDMA; over TCP and shared memory UCX copies into its buffers and out of them. Pumping: both ends must
call into the library while a write is under way, at first without a pause, then with a sleep that grows (there is no
descriptor to wait for); an idle link does nothing. The user may set UCX_TLS; by default it is
`^cma,cuda_ipc,knem,xpmem`, see `_direct`.

Cancel: releasing a request does not stop its write (measured); only destroying the destination's agent does, and only
where that agent or its network card places the bytes. By CMA, KNEM, XPMEM or UCX's own CUDA IPC the writer's process
copies into ours, with or without our agent: there `fence` answers False, and only the writer's word ends a ticket.

`nixl_gpu` is the same between GPUs' memories. NIXL knows nothing of a GPU's streams, so the link's thread waits for the
layers before it asks for the write; and a fence waits for what our agent has asked of the GPU before it was destroyed.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import select
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from tercet.errors import PeerDown, ProtocolViolation, TercetError
from tercet.transfer.links.channel import Channel
from tercet.transfer.memory.device import DeviceRegion, Gpu, KvRegion, Mark
from tercet.transfer.memory.pack import Memory
from tercet.transfer.transports.contract import Inlet, LinkContext, Outlet, Parcel, Transport, library_errors

BUILDS = ("nixl_cu12", "nixl_cu13")  # the same library for two versions of CUDA; the first one that can be loaded
INSTALL = "pip install --no-deps nixl nixl-cu12, or nixl-cu13 beside a torch for CUDA 13"
SPIN_S = 10e-3  # most writes are over by then; each sleep would stall them, since only these calls drive the library
LOOKS = 32  # at the library, between two checks of clock and channel
NAP_S = (20e-6, 500e-6)  # sleep between two checks after SPIN_S: the shortest and the longest
DIRECT = {"cma", "cuda_ipc", "knem", "xpmem"}  # UCX transports by which one process copies into another's memory
DIRECT_ALIASES = DIRECT | {"all", "cuda", "shm", "sm"}
EMULATES = "UCX_RNDV_THRESH"  # with it UCX 1.23 writes by messages, whose answer to a peer that is gone is fatal (009)
log = logging.getLogger(__name__)


class NixlTransport(Transport):
    name = "nixl"
    one_sided = True
    packs = False

    @classmethod
    def missing(cls) -> str | None:
        try:
            _library()
        except (ImportError, OSError) as error:
            return f"the nixl library: {error}; {INSTALL}"
        return None

    def inlet(self, context: LinkContext) -> Inlet:
        return _NixlInlet(context)

    def outlet(self, context: LinkContext) -> Outlet:
        return _NixlOutlet(context)


class NixlGpuTransport(NixlTransport):
    name = "nixl_gpu"
    in_device_memory = True

    @classmethod
    def missing(cls) -> str | None:
        from tercet.transfer.memory.cuda import missing  # only now: torch

        return super().missing() or missing()


@dataclass(frozen=True)
class _Place:
    """Where a cache lies, as NIXL is told."""

    kind: str
    number: int  # of the device
    address: int
    gpu: Gpu | None = None

    @classmethod
    def of(cls, region: KvRegion) -> _Place:
        if isinstance(region, DeviceRegion):
            return cls(region.gpu.kind, region.gpu.number, region.memory, region.gpu)
        return cls("DRAM", 0, _address(region.memory))

    @classmethod
    def told(cls, told: Sequence[Any]) -> _Place:
        """The peer's. Raises ValueError, TypeError."""
        kind, number, address = told
        if [type(each) for each in told] != [str, int, int]:
            raise TypeError(f"no place of a cache: {told!r:.80}")
        return cls(kind, number, address)

    def enter(self) -> None:
        if self.gpu is not None:
            self.gpu.enter()


class _NixlInlet(Inlet):
    def __init__(self, context: LinkContext) -> None:
        self._timeout_s = context.timeout_s
        self._agent = _Agent(context)
        self._number = 0  # of the last write that was waited for
        self._landed: set[bytes] = set()  # notifications that came before they were waited for
        here = self._agent.here
        self.blob = msgpack.packb([self._agent.metadata(), [here.kind, here.number, here.address]])

    def land(self, channel: Channel, payload: int, views: Sequence[memoryview]) -> None:
        if payload:
            raise ProtocolViolation("DATA over nixl carries no bytes on the channel")
        self._number += 1
        with library_errors("nixl broke"):
            self._agent.here.enter()
            _pump(channel, self._timeout_s, self._has_landed)
        self._landed.remove(_name_of(self._number))

    def pass_over(self, channel: Channel, payload: int, num_bytes: int) -> None:
        self.land(channel, payload, ())  # the writer has placed the bytes anyway; only its word ends the ticket

    def fence(self) -> bool:
        self._agent.close()
        gpu = self._agent.here.gpu
        try:
            if gpu is not None:
                gpu.settle()
        except RuntimeError:
            log.exception("what NIXL has asked of the GPU may not have ended; only the writer's word ends its tickets")
            return False
        return not _direct(os.environ.get("UCX_TLS", "all"))

    def _has_landed(self) -> bool:
        self._landed.update(self._agent.notifications())
        return _name_of(self._number) in self._landed


class _NixlOutlet(Outlet):
    def __init__(self, context: LinkContext) -> None:
        self._timeout_s = context.timeout_s
        try:
            metadata, there = msgpack.unpackb(context.blob)
            self._there = _Place.told(there)
        except (ValueError, TypeError) as error:
            raise ProtocolViolation(f"no nixl agent in the WELCOME: {error}") from error
        self._agent = _Agent(context)
        self._number = 0  # of the last write
        try:
            with library_errors("no stream on the GPU to wait for layers"):
                self._stream = gpu.stream() if (gpu := self._agent.here.gpu) is not None else None
            self._agent.meet(metadata)
        except TercetError:
            self._agent.close()
            raise

    def write(self, channel: Channel, parcel: Parcel) -> None:
        assert parcel.scatter is None, "nixl writes from the cache itself"
        self._number += 1
        try:
            self._wait_for(parcel.after)
            channel.send(parcel.message)
            self._agent.write(channel, parcel, self._there, _name_of(self._number), self._timeout_s)
        except TercetError:
            self._agent.close()  # the source is about to be reused, so nothing may read it from here on
            raise

    def _wait_for(self, layers: Sequence[Mark]) -> None:
        """Until they are computed: the library reads memory as soon as it is asked to."""
        if self._stream is not None:
            with library_errors("the GPU failed before KV could be written"):
                self._stream.wait(layers)
                self._stream.synchronise()

    def close(self) -> None:
        self._agent.close()


class _Agent:
    """A NIXL agent that has the whole region registered. For one thread at a time."""

    def __init__(self, context: LinkContext) -> None:
        if context.is_local:  # UCX reads it when an agent is made; by default it listens on the node's address
            os.environ.setdefault("UCX_NET_DEVICES", "lo")
        with library_errors("no nixl agent"):
            api = _library()
            config = api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
            here = self.here = _Place.of(context.region)
            here.enter()
            self._agent = api.nixl_agent(f"tercet-{uuid.uuid4().hex}", config)
            whole = [(here.address, context.region.num_bytes, here.number, "")]
            self._memory = self._agent.register_memory(whole, here.kind)
        self._peer = ""

    def metadata(self) -> bytes:
        with library_errors("no nixl metadata"):
            return bytes(self._agent.get_agent_metadata())

    def meet(self, metadata: bytes) -> None:
        with library_errors("the decode worker's nixl agent cannot be reached"):
            name = self._agent.add_remote_agent(metadata)
            self._peer = name.decode() if isinstance(name, bytes) else name

    def notifications(self) -> list[bytes]:
        return [note for notes in self._agent.get_new_notifs().values() for note in notes]

    def write(self, channel: Channel, parcel: Parcel, there: _Place, note: bytes, timeout_s: float) -> None:
        """Returns when all bytes have landed there and `note` is on its way."""
        with library_errors("the nixl write failed"):
            self.here.enter()
            source, target = _descriptors(parcel, self.here, there)
            sides = self._agent.get_xfer_descs(source, self.here.kind), self._agent.get_xfer_descs(target, there.kind)
            handle = self._agent.initialize_xfer("WRITE", *sides, self._peer, note)
            if not self._checked(self._agent.transfer(handle)):
                _pump(channel, timeout_s, lambda: self._checked(self._agent.check_xfer_state(handle)))
            self._agent.release_xfer_handle(handle)

    def _checked(self, state: str) -> bool:
        if state == "ERR":
            raise PeerDown("the nixl write failed")
        return state == "DONE"

    def close(self) -> None:
        """End the agent: nothing is read or placed by it any more. Idempotent."""
        agent, self._agent = self._agent, None
        if agent is not None:
            with contextlib.suppress(Exception):  # the peer may be gone; what matters is that the agent ends
                self.here.enter()
                agent.deregister_memory(self._memory)
            self._memory = None


def _library() -> Any:
    """The API module. Raises ImportError or OSError."""
    if EMULATES in os.environ:
        raise OSError(
            f"{EMULATES} is set: UCX then emulates writes, and aborts the receiver if a sender dies; unset it"
        )
    os.environ.setdefault("UCX_TLS", "^" + ",".join(sorted(DIRECT)))
    failures: list[ImportError | OSError] = []
    for build in BUILDS:
        try:
            return importlib.import_module(f"{build}._api")
        except (ImportError, OSError) as error:
            failures.append(error)
    raise failures[0]


def _direct(tls: str) -> bool:
    """Whether UCX_TLS lets a process copy into the memory of another, which destroying the agent does not stop."""
    names = {name.strip() for name in tls.lstrip("^").split(",")}
    return not names >= DIRECT if tls.startswith("^") else bool(names & DIRECT_ALIASES)


def _pump(channel: Channel, timeout_s: float, done: Callable[[], bool]) -> None:
    """Call `done`, which drives the library, until it is true. Raises PeerDown if the channel ends or on a timeout."""
    poller = select.poll()
    poller.register(channel.sock, select.POLLRDHUP)
    began = time.monotonic()
    while True:
        for _ in range(LOOKS):
            if done():
                return
            time.sleep(0)  # let others run
        waited = time.monotonic() - began
        if poller.poll(0):
            raise PeerDown("the transfer connection ended during a nixl write")
        if waited > timeout_s:
            raise PeerDown(f"a nixl write did not end within {timeout_s} s")
        if waited > SPIN_S:
            time.sleep(min(max(waited / 100, NAP_S[0]), NAP_S[1]))


def _descriptors(parcel: Parcel, here: _Place, there: _Place) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """-> [runs, (address, length, device)] of the source and of the destination."""
    source = parcel.source if isinstance(parcel.source, int) else _address(parcel.source)
    runs = np.array(parcel.runs, dtype=np.uint64)
    sides = ((runs[:, 0] + np.uint64(source), here), (runs[:, 1] + np.uint64(there.address), there))
    ours, theirs = (np.stack([at, runs[:, 2], np.full_like(at, place.number)], axis=1) for at, place in sides)
    return ours, theirs


def _address(memory: Memory) -> int:
    return int(np.frombuffer(memory, dtype=np.uint8).ctypes.data)


def _name_of(number: int) -> bytes:
    return number.to_bytes(8, "big")
