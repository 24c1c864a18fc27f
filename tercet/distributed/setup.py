"""How the ranks of a group find each other: rank 0 says where, all build the same.

store    a TCPStore of torch at rank 0, by which its process groups meet. Only where a group needs one
memory   of rank 0's host, one area for each tensor group: its ranks there sum through it
"""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # torch's stubs lack them

from tercet.devices import device_of
from tercet.distributed.collective_exchange import CollectiveExchange
from tercet.distributed.collectives import Alone, Collectives, HostCollectives, TorchCollectives
from tercet.distributed.direct_exchange import DirectExchange
from tercet.distributed.exchange import Exchange
from tercet.distributed.expert_map import ExpertMap
from tercet.distributed.meeting import Group, Meeting
from tercet.distributed.place import Place
from tercet.distributed.ranks import Ranks
from tercet.distributed.spread import Spread
from tercet.distributed.stages import Stages
from tercet.errors import TransferError, WorkerLost
from tercet.kernels.native.communicator import SPINS, NativeCommunicator, communicator_bytes


@dataclass(frozen=True)
class Venue:
    store: str  # host:port
    together: tuple[int, ...]  # ranks of the host of rank 0, where all kernels are native; those that share memory
    cores: int  # of that host; ranks that share a core do not spin
    exchanges: tuple[str, ...]  # where each rank's exchange listens; empty for a rank that comes back


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


class Setup:
    """One rank's way into its group."""

    def __init__(
        self, place: Place, host: str, device: torch.device, timeout_s: float, experts: ExpertMap | None, group: Group
    ) -> None:
        """host: of this rank, for its sockets. timeout_s: of a sum, and of what else ranks wait for each other.
        experts: where they lie, if each rank has some of them whole. group: what the ranks of its exchange agree on."""
        self.place, self._host, self._device, self._timeout_s = place, host, device, timeout_s
        self._experts, self._placement = experts, 0
        self._meeting: Meeting | None = None
        if experts is not None and device.type == "cpu":
            self._meeting = Meeting(group, place.rank - place.stage_group.start, host)

    @property
    def exchange(self) -> str:
        """Where this rank's exchange listens; empty: it has none of its own."""
        return "" if self._meeting is None else self._meeting.endpoint

    def place_anew(self, epoch: int, rows: bytes, shares: Mapping[int, Sequence[Sequence[int]]]) -> None:
        """How experts lie since the group started. epoch: of the placement; rows: its phy2log, int64, of all layers;
        shares: as `ExpertMap.with_shares`. Raises ClusterError."""
        assert self._experts is not None, "none can have moved"
        phy2log = torch.frombuffer(bytearray(rows), dtype=torch.int64).view(-1, self._experts.phy2log.shape[1])
        placed = ExpertMap(phy2log, self._experts.experts, self._experts.slots_per_rank)
        self._experts, self._placement = placed.with_shares(shares), epoch

    def ranks(self, venue: Venue, memory: int | None) -> Ranks:
        """memory: the file descriptor of `shared_memory`, which is closed. Blocks until the others do the same. Raises
        WorkerLost."""
        place = self.place
        try:
            tensor, whole = self._tensor(venue, memory), range(place.ranks)
            stages = Stages(place, self._group(whole, venue)) if place.pipeline > 1 else None
            spread = None
            if self._experts is not None:
                spread = Spread(place, self._experts, self._exchange(venue), self._placement)
        except (RuntimeError, TransferError) as error:  # torch has no narrower one
            raise WorkerLost(f"rank {place.rank} did not meet the others: {error}") from error
        finally:
            if memory is not None:
                os.close(memory)
        return Ranks(place, tensor, stages, spread)

    def _tensor(self, venue: Venue, memory: int | None) -> Collectives:
        place, area = self.place, tensor_area(self.place, venue)
        if area is None or memory is None:
            return Alone() if place.tensor == 1 else TorchCollectives(self._group(place.tensor_group, venue))
        offset, size = area
        view = memoryview(mmap.mmap(memory, size, offset=offset))
        spins = SPINS if len(venue.together) <= venue.cores else 0
        communicator = NativeCommunicator(view, place.tensor_rank, place.tensor, self._timeout_s, spins=spins)
        return HostCollectives(communicator, place.tensor_rank, place.tensor)

    def _exchange(self, venue: Venue) -> Exchange:
        """Links of their own between CPUs, which survive the loss of a rank; else torch's all-to-all."""
        assert self._experts is not None
        if self._meeting is None:
            return CollectiveExchange(self._group(self.place.stage_group, venue), self._experts.slots_per_rank)
        direct = DirectExchange(self._meeting, self._timeout_s)
        if not venue.exchanges:  # it comes back, and links up once it has loaded its share
            return direct
        there = [venue.exchanges[rank] for rank in self.place.stage_group]
        direct.connect({rank: endpoint for rank, endpoint in enumerate(there) if rank != direct.rank})
        return direct

    def _group(self, ranks: range, venue: Venue) -> dist.ProcessGroup:
        """Raises RuntimeError."""
        backend, limit, place = device_of(self._device).collectives, timedelta(seconds=self._timeout_s), self.place
        at, _, port = venue.store.rpartition(":")
        store = TCPStore(at, int(port), is_master=False, timeout=limit, use_libuv=False)
        if backend == "gloo":  # by itself it would choose an address of this host by its name
            options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stubs lack it
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._host)]
            options._timeout = limit
            own = PrefixStore(f"{ranks.start}-{ranks.stop}", store)
            return dist.ProcessGroupGloo(own, ranks.index(place.rank), len(ranks), options)  # type: ignore[return-value]  # likewise
        if not dist.is_initialized():
            dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.ranks, timeout=limit)
        made: dist.ProcessGroup = dist.new_group([*ranks], use_local_synchronization=True)
        return made
