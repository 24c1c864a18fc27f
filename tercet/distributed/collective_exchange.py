"""The exchange of tokens by torch.distributed: gloo between CPUs, NCCL between GPUs, HCCL between NPUs.

T rows of this rank's batch   E hidden size   k slots of a token   M rows received   N rows sent, own ones included
B bytes of a row on the wire: k weights float32, k slots int32, then E numbers of the row's dtype

Dispatch is an all-to-all of counts and one of rows, combine one of rows. What stays on this rank is copied, not sent.
A collective ends only when every rank of the group has come, and a group that has lost a rank is of no use any more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from tercet.distributed.exchange import (
    ROUTING_BYTES,
    Handle,
    Received,
    Routes,
    Sent,
    check_batch,
    check_received,
    routes_of,
    routing_on_wire,
    sum_of_ranks,
)
from tercet.errors import PeerDown, ProtocolViolation, UnsupportedSpec

COUNTS = ("rows", "layer", "bytes of a row")  # what each rank says to each other one first, int64 each
HEADER_BYTES = 8 * len(COUNTS)


class CollectiveExchange:
    """For one thread. The group's own timeout is the deadline of each call."""

    def __init__(self, group: dist.ProcessGroup, slots_per_rank: int) -> None:
        self.rank, self.size = group.rank(), group.size()
        self.sent, self.sent_to = Sent(), [0] * self.size
        self._group = group
        self._slots_per_rank = slots_per_rank

    @property
    def active(self) -> tuple[bool, ...]:
        """All ranks of the group."""
        return (True,) * self.size

    def dispatch(self, x: Tensor, slots: Tensor, weights: Tensor, layer: int = 0) -> tuple[Received, Handle]:
        """x [T, E]; slots [T, k] int64, physical ones; weights [T, k] float32; layer: of the model. Raises PeerDown if
        the group fails, ProtocolViolation if the ranks are not at the same layer."""
        check_batch(x, slots, weights, layer, self.size * self._slots_per_rank)
        routes = routes_of(slots, self._slots_per_rank, self.size)
        wire = self._packed(x, slots, weights, routes)
        sources = self._swap_counts(routes.counts, layer, wire)
        received = self._unpacked(self._swap(wire, routes.counts, sources), x, slots.shape[1])
        row_bytes, routing_bytes = x.shape[1] * x.element_size(), slots.shape[1] * ROUTING_BYTES
        for rank, count in enumerate(routes.counts):
            self._count(rank, Sent(count * row_bytes, count * routing_bytes, HEADER_BYTES))
        return received, Handle(routes, sources, len(x), x.new_empty((0, x.shape[1])), layer)

    def combine(self, y: Tensor, handle: Handle) -> Tensor:
        """y [M, E] -> [T, E]. Raises PeerDown if the group fails."""
        handle.check(y)
        back = self._swap(_bytes_of(y), handle.sources, handle.routes.counts)
        for rank, count in enumerate(handle.sources):
            self._count(rank, Sent(rows=count * y.shape[1] * y.element_size()))
        return sum_of_ranks(back.view(y.dtype), handle)

    def _count(self, rank: int, sent: Sent) -> None:
        if rank != self.rank:
            self.sent += sent
            self.sent_to[rank] += sent.total

    def without(self, ranks: Sequence[int]) -> None:
        """Raises UnsupportedSpec: a process group cannot go on without a rank."""
        raise UnsupportedSpec(f"a collective exchange cannot go on without ranks {list(ranks)}; a direct one can")

    def close(self) -> None:
        """The group is its maker's to end."""

    def _packed(self, x: Tensor, slots: Tensor, weights: Tensor, routes: Routes) -> Tensor:
        """-> [N, B] uint8, ordered by destination."""
        within, shares = routing_on_wire(slots, weights, routes, self._slots_per_rank)
        return torch.cat([_bytes_of(part) for part in (shares, within, x[routes.rows])], 1)

    def _unpacked(self, wire: Tensor, x: Tensor, k: int) -> Received:
        """wire [M, B] uint8."""
        weights, slots, rows = wire[:, : 4 * k], wire[:, 4 * k : 8 * k], wire[:, 8 * k :]
        numbers = slots.contiguous().view(torch.int32).long()
        check_received(numbers, self._slots_per_rank)
        return Received(rows.contiguous().view(x.dtype), numbers, weights.contiguous().view(torch.float32))

    def _swap_counts(self, counts: list[int], layer: int, wire: Tensor) -> list[int]:
        """-> rows to come from each rank."""
        ours = torch.tensor([[count, layer, wire.shape[1]] for count in counts], device=wire.device)
        theirs = torch.empty_like(ours)
        with self._named("counts"):
            self._group.alltoall_base(theirs, ours, [], []).wait()
        found: list[list[int]] = theirs.tolist()
        for rank, (_, *other) in enumerate(found):
            if other != [layer, wire.shape[1]]:
                raise ProtocolViolation(
                    f"rank {rank} is at layer {other[0]} with rows of {other[1]} bytes on the wire, "
                    f"rank {self.rank} at layer {layer} with {wire.shape[1]}"
                )
        return [rows for rows, *_ in found]

    def _swap(self, out: Tensor, counts: list[int], sources: list[int]) -> Tensor:
        """out [sum of counts, bytes] uint8 -> [sum of sources, bytes]. Backends copy this rank's own rows."""
        into = out.new_empty((sum(sources), out.shape[1]))
        with self._named("rows"):
            self._group.alltoall_base(into, out, sources, counts).wait()
        return into

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise PeerDown(f"rank {self.rank}: the all-to-all of {what} failed: {error}") from error


def _bytes_of(rows: Tensor) -> Tensor:
    """[rows, numbers] -> [rows, bytes] uint8. Flat in between: torch gives an axis of one number any stride."""
    return rows.reshape(-1).view(torch.uint8).view(len(rows), rows.shape[1] * rows.element_size())
