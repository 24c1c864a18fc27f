"""The exchange of tokens between the ranks that hold a model's experts, and what both ways of doing it share.

T rows of this rank's batch   E hidden size   k slots of a token   M rows received   N rows sent, own ones included

Every rank takes part in every exchange, with zero rows, too, and in the same order:

    received, handle = exchange.dispatch(x, slots, weights, layer)
    y = experts.forward(received.x, received.slots, received.weights)
    x = exchange.combine(y, handle)

A row goes once to each distinct rank that holds one of its slots, and comes back from there as one row. Received rows
are ordered by source rank, then by their order there. `combine` adds in float32, rank after rank, so its result does
not depend on who is fast. The verbs follow DeepEP's buffer.

`CollectiveExchange` uses torch.distributed; `DirectExchange` uses sockets of its own and survives the loss of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tercet.errors import InternalError, ProtocolViolation
from tercet.kernels.moe import ELSEWHERE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUTING_BYTES = 8  # of a row and slot on a wire: its number within the rank as int32, its weight as float32


@dataclass(frozen=True)
class Received:
    """What the experts of this rank have to compute."""

    x: Tensor  # [M, E]
    slots: Tensor  # [M, k] int64, numbered within this rank, or ELSEWHERE
    weights: Tensor  # [M, k] float32


@dataclass(frozen=True)
class Routes:
    """Which rows go to which rank."""

    rows: Tensor  # [N] int64, rows of the batch, ordered by destination, then by row
    counts: list[int]  # of each destination

    @property
    def bounds(self) -> list[slice]:
        """Of each destination, within N."""
        return bounds_of(self.counts)


@dataclass(frozen=True)
class Handle:
    """What `combine` needs to know of its `dispatch`."""

    routes: Routes
    sources: list[int]  # rows received from each rank
    num_rows: int  # T
    like: Tensor  # [0, E], of x's dtype and device
    layer: int
    number: int = 0  # of the exchange
    attempt: int = 0

    def check(self, y: Tensor) -> None:
        """Raises InternalError unless y is one row for each that was received."""
        if y.shape != (sum(self.sources), self.like.shape[1]) or y.dtype != self.like.dtype:
            raise InternalError(
                f"layer {self.layer}: combine got {y.dtype} {list(y.shape)}; "
                f"dispatch gave {self.like.dtype} {[sum(self.sources), self.like.shape[1]]}"
            )


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank has sent to other ranks."""

    rows: int = 0
    routing: int = 0  # slots and weights
    headers: int = 0  # and counts

    @property
    def total(self) -> int:
        return self.rows + self.routing + self.headers

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.rows + other.rows, self.routing + other.routing, self.headers + other.headers)

    def __sub__(self, other: Sent) -> Sent:
        return Sent(self.rows - other.rows, self.routing - other.routing, self.headers - other.headers)


class Exchange(Protocol):
    """For one thread. Errors are TransferErrors, besides InternalError for tensors that do not fit."""

    rank: int
    size: int  # ranks of the exchange
    sent: Sent  # since it was made
    sent_to: list[int]  # of `sent.total`, to each rank

    @property
    def active(self) -> tuple[bool, ...]:
        """Which ranks take part; for `ExpertMap.choose`."""

    def dispatch(self, x: Tensor, slots: Tensor, weights: Tensor, layer: int = 0) -> tuple[Received, Handle]:
        """x [T, E]; slots [T, k] int64, physical ones; weights [T, k] float32; layer: of the model."""

    def combine(self, y: Tensor, handle: Handle) -> Tensor:
        """y [M, E] -> [T, E], for each row of the batch the sum of the rows that the ranks made of it."""

    def without(self, ranks: Sequence[int]) -> None:
        """Go on without these ranks, which are lost."""

    def close(self) -> None: ...


def check_batch(x: Tensor, slots: Tensor, weights: Tensor, layer: int, num_slots: int) -> None:
    """Raises InternalError for what `dispatch` does not take."""
    if layer < 0:
        raise InternalError(f"dispatch for layer {layer}; layers count from 0")
    if x.ndim != 2 or not x.shape[1] or x.dtype not in DTYPES:
        raise InternalError(f"dispatch takes rows [T, E] of {DTYPES}, not {x.dtype} {list(x.shape)}")
    wanted = (torch.int64, torch.float32, len(x))
    if slots.ndim != 2 or slots.shape != weights.shape or (slots.dtype, weights.dtype, len(slots)) != wanted:
        raise InternalError(
            f"for {len(x)} rows dispatch takes int64 slots and float32 weights [{len(x)}, k], "
            f"not {slots.dtype} {list(slots.shape)} and {weights.dtype} {list(weights.shape)}"
        )
    first, last = _ends(slots)
    if first < 0 or last >= num_slots:
        raise InternalError(f"slots from {first} to {last}; there are {num_slots}")


def routes_of(slots: Tensor, slots_per_rank: int, size: int) -> Routes:
    """slots [T, k] int64 -> each row once for each distinct rank that holds one of its slots."""
    needed = torch.zeros((size, len(slots)), dtype=torch.bool, device=slots.device)
    needed[slots // slots_per_rank, torch.arange(len(slots), device=slots.device).unsqueeze(1)] = True
    return Routes(needed.nonzero()[:, 1], needed.sum(1).tolist())


def routing_on_wire(slots: Tensor, weights: Tensor, routes: Routes, slots_per_rank: int) -> tuple[Tensor, Tensor]:
    """slots [T, k] int64, weights [T, k] -> for each row that is sent, [N, k] int32, its slots as they are numbered
    within its destination, ELSEWHERE for those of other ranks; and [N, k] float32, its weights."""
    counts = torch.tensor(routes.counts, device=slots.device)
    firsts = torch.arange(0, len(counts) * slots_per_rank, slots_per_rank, device=slots.device)
    within = slots[routes.rows] - firsts.repeat_interleave(counts).unsqueeze(1)
    here = (within >= 0) & (within < slots_per_rank)
    return within.where(here, ELSEWHERE).int(), weights[routes.rows]


def check_received(slots: Tensor, slots_per_rank: int) -> None:
    """Raises ProtocolViolation for slots that this rank does not have."""
    first, last = _ends(slots)
    if first < ELSEWHERE or last >= slots_per_rank:
        raise ProtocolViolation(f"rows came for slots from {first} to {last}; this rank has {slots_per_rank}")


def _ends(slots: Tensor) -> tuple[int, int]:
    """The lowest and the highest number; 0 and -1 if there is none."""
    if not slots.numel():
        return 0, -1
    lowest, highest = slots.aminmax()
    return int(lowest), int(highest)


def bounds_of(counts: Sequence[int]) -> list[slice]:
    """Counts of neighbouring pieces -> where each lies."""
    ends = [sum(counts[: place + 1]) for place in range(len(counts))]
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


def sum_of_ranks(back: Tensor, handle: Handle) -> Tensor:
    """back [N, E], what the ranks made of the rows that went to them -> [T, E]."""
    total = torch.zeros((handle.num_rows, back.shape[1]), dtype=torch.float32, device=back.device)
    for piece in handle.routes.bounds:  # rank after rank: within one no row comes twice, so the order is fixed
        total.index_add_(0, handle.routes.rows[piece], back[piece].float())
    return total.to(back.dtype)


def expected_bytes(slots: Sequence[Tensor], rank: int, slots_per_rank: int, row_bytes: int, header_bytes: int) -> Sent:
    """What `rank` sends in one exchange, dispatch and combine. slots: [T, k] of each rank that takes part;
    header_bytes: what the exchange says to each other rank besides."""
    counts = [routes_of(each, slots_per_rank, len(slots)).counts for each in slots]
    away = sum(count for to, count in enumerate(counts[rank]) if to != rank)
    home = sum(each[rank] for source, each in enumerate(counts) if source != rank)
    routing = away * slots[rank].shape[1] * ROUTING_BYTES
    return Sent((away + home) * row_bytes, routing, (len(slots) - 1) * header_bytes)
