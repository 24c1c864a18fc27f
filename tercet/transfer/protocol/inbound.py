"""The receiving half of the KV handover: a state machine without I/O, threads or clocks of its own.

    admit ──OFFER/GRANT──> granted ──DATA*, WRITTEN─> Complete
      │                       │  └──corrupt: RESEND──┘
      └──cancel, lease, ABORT─┴──────────────────> Failed(cause) ... Quiesced

Four facts are kept apart. OpDone is the sender's. Here: `Complete` (units landed and verified = units granted),
`ReceiveFailed(cause)`, and `Quiesced`: proof that no further write can land. A caller frees blocks on Complete or
Quiesced and on nothing else. Proof is one of
  * no write is possible: nothing was granted, or the transport places bytes at the receiver (tcp) and no landing is
    under way;
  * the writer's word: ABORT, ABORT_ACK, GOODBYE or WRITTEN from the writer, after which it writes no more;
  * the writer's end (`peer_dead`): its death, or a link that this side has fenced.
A timeout is never proof.

Messages may come in any order, twice or late; what names no ticket of ours is counted in `dropped`. Methods return
effects for the caller to carry out, in order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tercet.core import Ticket
from tercet.errors import DigestMismatch, LeaseExpired, PeerDown, TercetError, TransferError, from_wire
from tercet.transfer.memory.layout import Pair
from tercet.transfer.protocol.arrivals import Arrivals, Landing
from tercet.transfer.protocol.effects import Cut, PeerKey, Send
from tercet.transfer.protocol.messages import (
    Abort,
    AbortAck,
    Data,
    Goodbye,
    Grant,
    Heartbeat,
    Message,
    Offer,
    Reject,
    Release,
    Resend,
    Written,
)

MAX_RESENDS = 8  # of one ticket; a link that corrupts more than that is broken


@dataclass(frozen=True)
class Terms:
    """What a connection agreed on."""

    pair: Pair
    one_sided: bool  # the writer places the bytes, so it must say or be shown to have stopped
    fenceable: bool  # closing our end of the link proves that nothing lands any more


@dataclass(frozen=True)
class Noted:
    """The note of the role that sends has come; the KV may still be landing."""

    ticket: Ticket
    note: bytes


@dataclass(frozen=True)
class Complete:
    ticket: Ticket
    num_bytes: int
    transfer_s: float  # everything pushed until the last byte had landed


@dataclass(frozen=True)
class ReceiveFailed:
    ticket: Ticket
    error: TercetError


@dataclass(frozen=True)
class Quiesced:
    """verified: how many of the granted blocks, from the first on, hold all layers of their tokens, verified."""

    ticket: Ticket
    verified: int = 0


InboundEffect = Send | Cut | Noted | Complete | ReceiveFailed | Quiesced


@dataclass
class _Offered:
    peer: PeerKey
    terms: Terms
    num_units: int
    expires: float


@dataclass
class _Receiving:
    ticket: Ticket
    first_block: int
    blocks: tuple[int, ...]  # destination blocks, empty on a full prefix hit
    expires: float  # unless the writer is heard of before
    advanced: float  # when it last did
    mark: int = 0  # grows as it advances, for the writer to see
    peer_mark: int = 0
    offer: _Offered | None = None  # set by OFFER; GRANT has been sent
    arrivals: Arrivals | None = None  # with it
    resends: int = 0
    written: Written | None = None
    written_at: float = 0.0
    failed: bool = False
    abort: Abort | None = None  # what the writer was told then
    writer_done: bool = False  # proof by word or end

    def advance(self, now: float) -> None:
        self.advanced = now
        self.mark += 1

    @property
    def peer(self) -> PeerKey | None:
        return self.offer.peer if self.offer else None

    @property
    def granted_bytes(self) -> int:
        return self.arrivals.num_cells * self._unit_bytes if self.arrivals else 0

    @property
    def landed_bytes(self) -> int:
        return self.arrivals.num_landed * self._unit_bytes if self.arrivals else 0

    @property
    def _unit_bytes(self) -> int:
        assert self.offer is not None
        return self.offer.terms.pair.unit_bytes

    @property
    def landing(self) -> bool:
        return self.arrivals is not None and self.arrivals.any_landing


class Inbound:
    """All tickets of one decode worker. Not thread-safe: the mover holds a lock around each call."""

    def __init__(self, epoch: int, lease_s: float) -> None:
        self.epoch = epoch
        self.dropped: Counter[str] = Counter()  # message name -> how many named no live ticket
        self.corrupt = 0  # units that landed with a wrong digest
        self._lease_s = lease_s
        self._tickets: dict[Ticket, _Receiving] = {}
        self._offers: dict[Ticket, _Offered] = {}  # came before admission

    # ---- the decode worker's verbs

    def admit(self, ticket: Ticket, first_block: int, blocks: Sequence[int], now: float) -> list[InboundEffect]:
        """Open a ticket: `blocks` are leased to it until Complete or Quiesced names it."""
        assert ticket not in self._tickets, f"{ticket} admitted twice"
        inbound = _Receiving(ticket, first_block, tuple(blocks), expires=now + self._lease_s, advanced=now)
        self._tickets[ticket] = inbound
        offer = self._offers.pop(ticket, None)
        return self._grant(inbound, offer, now) if offer else []

    def refuse(self, ticket: Ticket, reason: str) -> list[InboundEffect]:
        """Answer the ticket's OFFER, if it came, with REJECT."""
        offer = self._offers.pop(ticket, None)
        return [Send(offer.peer, Reject(ticket, reason))] if offer else []

    def cancel(self, ticket: Ticket, error: TercetError) -> list[InboundEffect]:
        """Give a ticket up. Quiesced follows, now or when it is proven."""
        inbound = self._tickets.get(ticket)
        return self._fail(inbound, error) if inbound else []

    def live(self) -> list[Ticket]:
        return list(self._tickets)

    # ---- what comes from the peer

    def on_message(self, peer: PeerKey, terms: Terms, message: Message, now: float) -> list[InboundEffect]:
        match message:
            case Offer(ticket, num_units):
                return self._on_offer(ticket, _Offered(peer, terms, num_units, now + self._lease_s), now)
            case Written(ticket):
                return self._on_written(ticket, peer, message, now)
            case Abort(ticket, code, reason):
                return self._on_abort(ticket, peer, from_wire(code, reason))
            case AbortAck(ticket):
                return self._on_writer_done(ticket, peer)
            case Heartbeat():
                return self._on_heartbeat(peer, message, now)
            case Goodbye():
                return [e for t in self._of(peer) for e in self._on_writer_done(t.ticket, peer)]
        self.dropped[type(message).__name__] += 1
        return []

    def begin_landing(self, peer: PeerKey, data: Data) -> Landing | None:
        """Where the bytes of a DATA go, or None if its bytes must not be placed. Every non-None answer is followed by
        `end_landing`; until then the ticket is not quiesced."""
        inbound = self._tickets.get(data.ticket)
        known = inbound is not None and inbound.peer == peer and not inbound.failed
        landing = inbound.arrivals.begin(data) if known and inbound and inbound.arrivals else None
        if landing is None:
            self.dropped["Data"] += 1
        return landing

    def end_landing(self, data: Data, good: NDArray[np.bool_] | None, now: float) -> list[InboundEffect]:
        """The bytes of `data` stand; good: whether each (layer, unit) has its digest. None: it was cut off."""
        inbound = self._tickets[data.ticket]
        assert inbound.arrivals is not None
        inbound.arrivals.end(data, good)
        if inbound.failed:
            return self._settle(inbound)
        inbound.advance(now)
        if good is not None and not good.all():
            return self._fetch_again(inbound, inbound.arrivals, data, good)
        return self._complete_if_all_landed(inbound, now)

    def peer_down(self, peer: PeerKey) -> list[InboundEffect]:
        """The connection is gone. For a one-sided writer that is no proof; see `peer_dead`."""
        self._offers = {t: offer for t, offer in self._offers.items() if offer.peer != peer}
        effects: list[InboundEffect] = []
        for inbound in self._of(peer):
            effects += self._fail(inbound, PeerDown(f"the prefill worker of {inbound.ticket.request_id} is gone"))
        return effects

    def peer_dead(self, peer: PeerKey) -> list[InboundEffect]:
        """Nothing of the peer can land any more: its process is proven dead, or its link is fenced."""
        return [e for t in self._of(peer) for e in self._on_writer_done(t.ticket, peer)]

    def tick(self, now: float) -> list[InboundEffect]:
        """Fail what has heard nothing from its writer, or has not advanced, for a lease; forget stale offers."""
        self._offers = {t: offer for t, offer in self._offers.items() if offer.expires >= now}
        effects: list[InboundEffect] = []
        for inbound in list(self._tickets.values()):
            if not inbound.failed and min(inbound.expires, inbound.advanced + self._lease_s) < now:
                effects += self._fail(inbound, self._expired(inbound, now))
            if inbound.ticket in self._tickets and inbound.expires < now and inbound.offer:
                can_end_it = inbound.landing or inbound.offer.terms.fenceable
                effects += [Cut(inbound.offer.peer)] if can_end_it else []
        return effects

    def _expired(self, inbound: _Receiving, now: float) -> LeaseExpired:
        name = inbound.ticket.request_id
        if inbound.expires < now:
            return LeaseExpired(f"no word of {name} from its prefill worker for {self._lease_s} s")
        landed = f"{inbound.landed_bytes} of {inbound.granted_bytes} KV bytes have landed"
        return LeaseExpired(f"the handover of {name} has not advanced for {self._lease_s} s: {landed}")

    def heartbeats(self) -> list[InboundEffect]:
        """One HEARTBEAT a peer, naming the live tickets that it serves and how far they are; and once more the ABORT of
        each ticket that waits for the writer's word."""
        by_peer: dict[PeerKey, list[_Receiving]] = {}
        effects: list[InboundEffect] = []
        for inbound in self._tickets.values():
            if inbound.peer is not None and inbound.abort is not None:
                effects.append(Send(inbound.peer, inbound.abort))
            elif inbound.peer is not None:
                by_peer.setdefault(inbound.peer, []).append(inbound)
        for peer, tickets in by_peer.items():
            effects.append(Send(peer, Heartbeat([t.ticket for t in tickets], [t.mark for t in tickets])))
        return effects

    # ---- transitions

    def _of(self, peer: PeerKey) -> list[_Receiving]:
        return [t for t in self._tickets.values() if t.peer == peer]

    def _on_offer(self, ticket: Ticket, offer: _Offered, now: float) -> list[InboundEffect]:
        inbound = self._tickets.get(ticket)
        if inbound is not None:
            return self._grant(inbound, offer, now) if inbound.offer is None and not inbound.failed else []
        if ticket.epoch != self.epoch:
            self.dropped["Offer"] += 1
            return [Send(offer.peer, Reject(ticket, f"this worker is at epoch {self.epoch}, not {ticket.epoch}"))]
        self._offers[ticket] = offer
        return []

    def _grant(self, inbound: _Receiving, offer: _Offered, now: float) -> list[InboundEffect]:
        inbound.offer = offer
        inbound.advance(now)
        pair, blocks = offer.terms.pair, inbound.blocks
        per_block = pair.dst.block_size // pair.unit
        first_unit = inbound.first_block * per_block
        missing = max(0, offer.num_units - first_unit)
        if -(-missing // per_block) != len(blocks):
            inbound.writer_done = True  # it was granted nothing
            error = TransferError(f"the offer of {offer.num_units} units does not fit {len(blocks)} blocks")
            return self._fail(inbound, error)
        inbound.arrivals = Arrivals(pair, blocks, missing)
        return [Send(offer.peer, Grant(inbound.ticket, first_unit, list(blocks)))]

    def _on_written(self, ticket: Ticket, peer: PeerKey, written: Written, now: float) -> list[InboundEffect]:
        inbound = self._tickets.get(ticket)
        if inbound is None or inbound.peer != peer or inbound.failed or inbound.written is not None:
            self.dropped["Written"] += 1
            return []
        if written.num_bytes != inbound.granted_bytes:
            inbound.writer_done = inbound.resends == 0
            counted = f"{written.num_bytes} KV bytes were written, {inbound.granted_bytes} were granted"
            return self._fail(inbound, TransferError(f"the handover of {ticket.request_id} is not whole: {counted}"))
        inbound.advance(now)
        inbound.written, inbound.written_at = written, now
        inbound.writer_done = inbound.resends == 0  # it was its last write, but for what it was asked for
        noted = [Noted(ticket, written.note)] if written.note else []
        return [*noted, *self._complete_if_all_landed(inbound, now)]

    def _fetch_again(
        self, inbound: _Receiving, arrivals: Arrivals, data: Data, good: NDArray[np.bool_]
    ) -> list[InboundEffect]:
        """Ask for exactly the units whose digest was wrong."""
        wrong = np.argwhere(~good).tolist()
        self.corrupt += len(wrong)
        if inbound.resends + len(wrong) > MAX_RESENDS:
            return self._fail(inbound, DigestMismatch(f"the KV of {inbound.ticket.request_id} keeps arriving corrupt"))
        assert inbound.peer is not None
        inbound.writer_done = False
        effects: list[InboundEffect] = []
        for layer, unit in wrong:
            inbound.resends += 1
            at = (data.layer + layer, data.index + unit)
            arrivals.ask_again(*at, inbound.resends)
            effects.append(Send(inbound.peer, Resend(inbound.ticket, inbound.resends, *at)))
        return effects

    def _complete_if_all_landed(self, inbound: _Receiving, now: float) -> list[InboundEffect]:
        written = inbound.written
        if written is None or inbound.arrivals is None or not inbound.arrivals.all_landed:
            return []
        assert inbound.offer is not None
        del self._tickets[inbound.ticket]
        return [
            Complete(inbound.ticket, inbound.granted_bytes, written.transfer_s + now - inbound.written_at),
            Send(inbound.offer.peer, Release(inbound.ticket)),
        ]

    def _on_abort(self, ticket: Ticket, peer: PeerKey, error: TercetError) -> list[InboundEffect]:
        self._offers.pop(ticket, None)
        inbound = self._tickets.get(ticket)
        if inbound is None or inbound.peer != peer:
            self.dropped["Abort"] += 1
            return []
        inbound.writer_done = True
        return self._fail(inbound, error)

    def _on_writer_done(self, ticket: Ticket, peer: PeerKey) -> list[InboundEffect]:
        inbound = self._tickets.get(ticket)
        if inbound is None or inbound.peer != peer:
            self.dropped["AbortAck"] += 1
            return []
        inbound.writer_done = True
        return self._fail(inbound, PeerDown(f"the prefill worker gave {ticket.request_id} up"))

    def _on_heartbeat(self, peer: PeerKey, heartbeat: Heartbeat, now: float) -> list[InboundEffect]:
        for ticket, mark in zip(heartbeat.tickets, heartbeat.marks, strict=True):
            inbound = self._tickets.get(ticket)
            if inbound is not None and inbound.peer == peer and not inbound.failed:
                inbound.expires = now + self._lease_s
                if mark > inbound.peer_mark:
                    inbound.peer_mark, inbound.advanced = mark, now  # and no mark of ours: two echoes would never end
            elif ticket in self._offers:
                self._offers[ticket].expires = now + self._lease_s
            else:
                self.dropped["Heartbeat"] += 1
        return []

    def _fail(self, inbound: _Receiving, error: TercetError) -> list[InboundEffect]:
        if inbound.failed:
            return self._settle(inbound)
        inbound.failed = True
        effects: list[InboundEffect] = [ReceiveFailed(inbound.ticket, error)]
        if inbound.peer is not None:
            inbound.abort = Abort(inbound.ticket, error.code(), str(error))
            effects.append(Send(inbound.peer, inbound.abort))
        return effects + self._settle(inbound)

    def _settle(self, inbound: _Receiving) -> list[InboundEffect]:
        """Quiesced, if it is proven for this failed ticket."""
        writer_may_write = inbound.offer is not None and inbound.offer.terms.one_sided and not inbound.writer_done
        if inbound.landing or writer_may_write or self._tickets.pop(inbound.ticket, None) is None:
            return []
        return [Quiesced(inbound.ticket, inbound.arrivals.verified_blocks() if inbound.arrivals else 0)]
