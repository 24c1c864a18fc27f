"""How the ranks of a group find each other: rank 0 says where, all build the same.

store    a TCPStore of torch at rank 0, by which its process groups meet. Only where a group needs one
memory   of rank 0's host, one area for each tensor group: its ranks there sum through it
"""

from __future__ import annotations

import mmap
import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # torch's stubs lack them

from tercet.devices import device_of
from tercet.distributed.collectives import Alone, Collectives, HostCollectives, TorchCollectives
from tercet.distributed.place import Place
from tercet.distributed.ranks import Ranks
from tercet.distributed.stages import Stages
from tercet.errors import WorkerLost
from tercet.kernels.native.communicator import SPINS, NativeCommunicator, communicator_bytes


@dataclass(frozen=True)
class Venue:
    store: str  # host:port
    together: tuple[int, ...]  # ranks of the host of rank 0, where all kernels are native; those that share memory
    cores: int  # of that host; ranks that share a core do not spin


def tensor_area(place: Place, venue: Venue) -> tuple[int, int] | None:
    """Where in the shared memory the place's tensor group has its area: (offset, bytes); None if it has none."""
    if place.tensor == 1 or not set(place.tensor_group) <= {*venue.together}:
        return None
    size = -(-communicator_bytes(place.tensor) // mmap.PAGESIZE) * mmap.PAGESIZE
    return place.tensor_group.start // place.tensor * size, size


def shared_memory(place: Place, venue: Venue) -> int | None:
    """A file descriptor of zeros for all areas; None if there are none. Rank 0 makes it."""
    areas = [tensor_area(place.of(rank), venue) for rank in venue.together]
    ends = [offset + size for offset, size in filter(None, areas)]
    if not ends:
        return None
    fd = os.memfd_create("tercet-ranks", os.MFD_CLOEXEC)
    os.ftruncate(fd, max(ends))
    return fd


def new_store(host: str) -> TCPStore:
    """On a free port of `host` alone; by default it would listen on every address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family)
    port, fd = listener.getsockname()[1], listener.detach()  # the store closes it
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=fd, use_libuv=False)


def ranks_of(
    place: Place, venue: Venue, memory: int | None, host: str, device: torch.device, timeout_s: float
) -> Ranks:
    """memory: the file descriptor of `shared_memory`, which is closed. host: of this rank, for its sockets. Blocks
    until the others do the same. Raises WorkerLost."""
    area = tensor_area(place, venue)
    try:
        tensor: Collectives = Alone()
        if area is not None and memory is not None:
            tensor = _through_memory(place, venue, memory, area, timeout_s)
        elif place.tensor > 1:
            tensor = TorchCollectives(_group(place.tensor_group, place, venue, host, device, timeout_s))
        whole = range(place.ranks)
        stages = Stages(place, _group(whole, place, venue, host, device, timeout_s)) if place.pipeline > 1 else None
    except RuntimeError as error:  # torch has no narrower one
        raise WorkerLost(f"rank {place.rank} did not meet the others: {error}") from error
    finally:
        if memory is not None:
            os.close(memory)
    return Ranks(place, tensor, stages)


def _through_memory(
    place: Place, venue: Venue, memory: int, area: tuple[int, int], timeout_s: float
) -> HostCollectives:
    offset, size = area
    view = memoryview(mmap.mmap(memory, size, offset=offset))
    spins = SPINS if len(venue.together) <= venue.cores else 0
    communicator = NativeCommunicator(view, place.tensor_rank, place.tensor, timeout_s, spins=spins)
    return HostCollectives(communicator, place.tensor_rank, place.tensor)


def _group(
    ranks: range, place: Place, venue: Venue, host: str, device: torch.device, timeout_s: float
) -> dist.ProcessGroup:
    """Raises RuntimeError."""
    backend, limit = device_of(device).collectives, timedelta(seconds=timeout_s)
    at, _, port = venue.store.rpartition(":")
    store = TCPStore(at, int(port), is_master=False, timeout=limit, use_libuv=False)
    if backend == "gloo":  # by itself it would choose an address of this host by its name
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stubs lack it
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = limit
        own = PrefixStore(f"{ranks.start}-{ranks.stop}", store)
        return dist.ProcessGroupGloo(own, ranks.index(place.rank), len(ranks), options)  # type: ignore[return-value]  # likewise
    if not dist.is_initialized():
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.ranks, timeout=limit)
    made: dist.ProcessGroup = dist.new_group([*ranks], use_local_synchronization=True)
    return made
