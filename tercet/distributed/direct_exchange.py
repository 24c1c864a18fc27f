"""The exchange of tokens over links of its own, without collectives: it survives the loss of a rank.

T rows of this rank's batch   E hidden size   k slots of a token   M rows received   N rows sent, own ones included

Each rank has a link to each other one. Rows go from x to the links in the order of destinations, and from the links
into their places in what is received, with no pass that gathers or permutes them between (FUSCO, arXiv:2512.22036,
fuses that pass into the transfer likewise).

When a rank is lost, every survivor hears it from its own links (RankLost), and they go on together:

    without([rank])              nothing is sent to it or awaited from it
    resume(attempt, number)      the same at every rank; frames of earlier attempts are dropped and counted
    rejoin(rank, endpoint)       at every survivor, while the restarted rank is in join(survivors); then `resume` at all
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tercet.distributed.exchange import (
    DTYPES,
    ROUTING_BYTES,
    Handle,
    Received,
    Routes,
    Sent,
    bounds_of,
    check_batch,
    check_received,
    routes_of,
    routing_on_wire,
    sum_of_ranks,
)
from tercet.distributed.frames import HEADER, Frame, Kind
from tercet.distributed.link import Link
from tercet.distributed.meeting import Meeting
from tercet.distributed.pump import await_frames, await_payloads
from tercet.errors import InternalError, ProtocolViolation, RankLost, TransferError

HEADER_BYTES = 2 * HEADER.size  # of an exchange, to each other rank
Payloads = dict[int, list[memoryview]]  # rank -> where the payload lies that goes to it or comes from it


class DirectExchange:
    """For one thread. `timeout_s`: how long an awaited rank may be silent, also while it computes."""

    def __init__(self, meeting: Meeting, timeout_s: float) -> None:
        self.rank, self.size = meeting.rank, meeting.group.size
        self.sent, self.sent_to = Sent(), [0] * self.size
        self.number, self.attempt = 0, 0  # of the next exchange
        self._meeting = meeting
        self._slots_per_rank = meeting.group.slots_per_rank
        self._timeout_s = timeout_s
        self._links: dict[int, Link] = {}  # rank -> link, ascending
        self._broken = ""  # why the exchange has to be resumed

    @property
    def active(self) -> tuple[bool, ...]:
        """Which ranks take part, this one included."""
        return tuple(rank == self.rank or rank in self._links for rank in range(self.size))

    @property
    def dropped(self) -> int:
        """Frames of earlier attempts that came on the links that stand."""
        return sum(link.dropped for link in self._links.values())

    def connect(self, endpoints: Mapping[int, str]) -> None:
        """Link up with all ranks named (rank -> its `Meeting.endpoint`), each of which does the same. Raises RankLost
        for one that does not come within the timeout."""
        for rank in sorted(endpoints):
            if rank < self.rank:
                self.rejoin(rank, endpoints[rank])
        self.join([rank for rank in endpoints if rank > self.rank])

    def join(self, ranks: Sequence[int]) -> None:
        """Wait until these ranks have linked up with this one. Raises RankLost as `connect`, and for one that is cut
        meanwhile, once the others are there."""
        lost: RankLost | None = None
        for rank in sorted(ranks):
            try:
                self._add(self._meeting.arrival(rank, self._timeout_s))
            except RankLost as error:
                lost = error
        if lost is not None:
            raise lost

    def rejoin(self, rank: int, endpoint: str) -> None:
        """Link up with a rank that is in `connect` or `join`. Raises RankLost if it cannot be reached, PeerMismatch if
        it is of another group."""
        self._add(self._meeting.dial(rank, endpoint))

    def without(self, ranks: Sequence[int]) -> None:
        """Take these ranks out: nothing is sent to them or awaited from them any more."""
        for rank in ranks:
            if rank in self._links:
                self._links.pop(rank).close()

    def cut(self, rank: int) -> None:
        """From any thread: whoever waits for this rank gets RankLost."""
        if (link := self._links.get(rank)) is not None:
            link.cut()
        self._meeting.give_up(rank)

    def resume(self, attempt: int, number: int) -> None:
        """Go on with exchange `number`, after a loss or with a new rank, at all ranks alike."""
        if attempt <= self.attempt:
            raise InternalError(f"attempt {attempt} must be above {self.attempt}, which frames on the way may be of")
        self.attempt, self.number, self._broken = attempt, number, ""

    def close(self) -> None:
        """End all links and the meeting."""
        self.without(list(self._links))
        self._meeting.stop()

    def dispatch(self, x: Tensor, slots: Tensor, weights: Tensor, layer: int = 0) -> tuple[Received, Handle]:
        """x [T, E]; slots [T, k] int64, physical ones; weights [T, k] float32; layer: of the model. Raises RankLost,
        and ProtocolViolation if a rank is at another exchange."""
        check_batch(x, slots, weights, layer, self.size * self._slots_per_rank)
        slots, weights, rows = slots.cpu(), weights.cpu(), x.detach().cpu().contiguous()
        routes = routes_of(slots, self._slots_per_rank, self.size)
        self._check_active(routes)
        wanted = Frame(
            Kind.DISPATCH, self.number, self.attempt, layer, 0, x.shape[1], DTYPES.index(x.dtype), slots.shape[1]
        )
        within, shares = routing_on_wire(slots, weights, routes, self._slots_per_rank)
        bounds = routes.bounds
        out = {rank: _payload(within, shares, rows, routes.rows, bounds[rank]) for rank in self._links}
        counts = self._swap(wanted, routes.counts, out) | {self.rank: routes.counts[self.rank]}
        sources = [counts.get(rank, 0) for rank in range(self.size)]
        here = bounds[self.rank]
        own = (within[here], shares[here], rows[routes.rows[here]])
        received = self._receive(wanted, sources, own)
        self.number += 1
        return _on(received, x.device), Handle(
            routes, sources, len(x), x.new_empty((0, x.shape[1])), layer, wanted.number, self.attempt
        )

    def combine(self, y: Tensor, handle: Handle) -> Tensor:
        """y [M, E] -> [T, E]. Raises as `dispatch`."""
        handle.check(y)
        if handle.attempt != self.attempt:
            raise InternalError(f"a handle of attempt {handle.attempt}; this is attempt {self.attempt}")
        rows, width, counts = y.detach().cpu().contiguous(), y.shape[1], handle.routes.counts
        wanted = Frame(Kind.COMBINE, handle.number, handle.attempt, handle.layer, 0, width, DTYPES.index(y.dtype))
        back = rows.new_empty((sum(counts), width))
        homes, places = bounds_of(handle.sources), handle.routes.bounds
        back[places[self.rank]] = rows[homes[self.rank]]
        came = self._swap(wanted, handle.sources, {rank: [bytes_of(rows[homes[rank]])] for rank in self._links})
        self._check_counts(wanted, came, counts)
        self._land(wanted, {rank: [bytes_of(back[places[rank]])] for rank in self._links})
        return sum_of_ranks(back, handle).to(y.device)

    def _check_active(self, routes: Routes) -> None:
        for rank, (count, active) in enumerate(zip(routes.counts, self.active, strict=True)):
            if count and not active:
                raise RankLost(f"{count} rows go to rank {rank}, which is out; choose slots of active ranks", rank)

    def _check_counts(self, wanted: Frame, came: Mapping[int, int], counts: Sequence[int]) -> None:
        with self._breaks():
            for rank, count in came.items():
                if count != counts[rank]:
                    raise ProtocolViolation(f"rank {rank} returned {count} rows of {counts[rank]} in {wanted}")

    def _receive(self, wanted: Frame, sources: list[int], own: tuple[Tensor, Tensor, Tensor]) -> Received:
        """The payloads of a dispatch, and this rank's own (slots, weights, rows) in their place between them."""
        slots, weights, rows = (part.new_empty((sum(sources), part.shape[1])) for part in own)
        bounds = bounds_of(sources)
        for whole, part in zip((slots, weights, rows), own, strict=True):
            whole[bounds[self.rank]] = part
        places = {rank: [bytes_of(whole[bounds[rank]]) for whole in (slots, weights, rows)] for rank in self._links}
        self._land(wanted, places)
        numbers = slots.long()
        with self._breaks():
            check_received(numbers, self._slots_per_rank)
        return Received(rows, numbers, weights)

    def _swap(self, wanted: Frame, counts: Sequence[int], out: Payloads) -> dict[int, int]:
        """Send each rank its count of rows, and wait for the headers of all. -> rank -> rows to come from it."""
        with self._breaks():
            for rank, link in self._links.items():
                frame = replace(wanted, rows=counts[rank])
                link.send([memoryview(frame.encode()), *out[rank]])
                sent = Sent(frame.rows * frame.row_bytes, frame.rows * frame.k * ROUTING_BYTES, HEADER.size)
                self.sent += sent
                self.sent_to[rank] += sent.total
            links = list(self._links.values())
            await_frames(links, wanted, self._timeout_s)
            return {link.rank: link.frame.rows for link in links if link.frame}

    def _land(self, wanted: Frame, into: Payloads) -> None:
        with self._breaks():
            for rank, link in self._links.items():
                link.take(into[rank])
            await_payloads(list(self._links.values()), wanted, self._timeout_s)

    @contextlib.contextmanager
    def _breaks(self) -> Iterator[None]:
        """After an error the exchange has to be resumed. What other ranks were being sent they get in full."""
        if self._broken:
            raise InternalError(f"this exchange was broken off, so it has to be resumed: {self._broken}")
        try:
            yield
        except TransferError as error:
            self._broken = str(error)
            for link in self._links.values():
                link.keep_unsent()
            raise

    def _add(self, link: Link) -> None:
        self.without([link.rank])
        self._links = dict(sorted({**self._links, link.rank: link}.items()))


def bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous tensor's memory."""
    assert tensor.is_contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _payload(within: Tensor, shares: Tensor, x: Tensor, rows: Tensor, piece: slice) -> list[memoryview]:
    """Of a DISPATCH: slots, weights and rows that go to one rank; rows [N]: of x; piece: of N."""
    return [bytes_of(within[piece]), bytes_of(shares[piece]), *row_views(x, rows[piece])]


def row_views(x: Tensor, rows: Tensor) -> list[memoryview]:
    """The memory of these rows of x [T, E], neighbouring ones as one; rows: ascending."""
    memory, size = bytes_of(x), x.shape[1] * x.element_size()
    runs: list[tuple[int, int]] = []
    for row in rows.tolist():
        if runs and runs[-1][1] == row:
            runs[-1] = (runs[-1][0], row + 1)
        else:
            runs.append((row, row + 1))
    return [memory[first * size : end * size] for first, end in runs]


def _on(received: Received, device: torch.device) -> Received:
    return Received(received.x.to(device), received.slots.to(device), received.weights.to(device))
