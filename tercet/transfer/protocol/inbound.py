"""The receiving half of the KV handover: a state machine without I/O, threads or clocks of its own. This is the table
of its tickets; what happens to one of them is in incoming.py.

Four facts are kept apart. OpDone is the sender's. The receiver's are `Complete` (units landed and verified = units
granted, of every source), `ReceiveFailed(cause)`, and `Quiesced`: proof that no further write can land. A caller frees
blocks on Complete or Quiesced and on nothing else. Proof is, for each source, one of
  * no write is possible: nothing was granted, or the transport places bytes at the receiver (tcp) and no landing is
    under way;
  * the writer's word: ABORT, ABORT_ACK, GOODBYE or WRITTEN from the writer, after which it writes no more;
  * the writer's end (`peer_dead`): its death, or a link that this side has fenced.
A timeout is never proof.

Messages may come in any order, twice or late; those that name no live ticket are counted in `dropped`. Methods return
effects for the caller to carry out, in order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from tercet.core import Ticket
from tercet.errors import PeerDown, TercetError, from_wire
from tercet.transfer.protocol.arrivals import Landing
from tercet.transfer.protocol.effects import PeerKey, Send
from tercet.transfer.protocol.incoming import InboundEffect, Incoming, Source, Terms
from tercet.transfer.protocol.messages import Abort, AbortAck, Data, Goodbye, Heartbeat, Message, Offer, Reject, Written


class Inbound:
    """All tickets of one decode worker. Not thread-safe: the mover holds a lock around each call."""

    def __init__(self, epoch: int, lease_s: float) -> None:
        self.epoch = epoch
        self.dropped: Counter[str] = Counter()  # message name -> how many named no live ticket
        self.corrupt = 0  # units that landed with a wrong digest
        self.progress = 0  # grows as tickets advance, here or at their writers
        self._lease_s = lease_s
        self._tickets: dict[Ticket, Incoming] = {}
        self._offers: dict[Ticket, dict[PeerKey, Source]] = {}  # that came before admission
        self._expected: set[Ticket] = set()  # that will be admitted once there is room

    # ---- the decode worker's verbs

    def admit(
        self, ticket: Ticket, first_block: int, blocks: Sequence[int], now: float, sources: int = 1
    ) -> list[InboundEffect]:
        """Open a ticket: `blocks` are leased to it until Complete or Quiesced names it. sources: how many peers will
        offer it, each a part of the layers and heads; if the last offer leaves a hole, the ticket fails at once."""
        assert ticket not in self._tickets, f"{ticket} admitted twice"
        self.progress += 1
        self._expected.discard(ticket)
        incoming = Incoming(ticket, first_block, blocks, sources, self._lease_s, now, self.progress)
        self._tickets[ticket] = incoming
        offers = self._offers.pop(ticket, {}).values()
        return [effect for source in offers for effect in self._after(incoming, incoming.offer(source, now))]

    def expect(self, ticket: Ticket) -> None:
        """It will be admitted once there is room. Its writers hear that, with the progress of the others."""
        self._expected.add(ticket)

    def dismiss(self, ticket: Ticket, error: TercetError) -> list[InboundEffect]:
        """An expected ticket will not be admitted: answer its OFFERs that have come with an ABORT."""
        self._expected.discard(ticket)
        aborts = Abort(ticket, error.code(), str(error))
        return [Send(peer, aborts) for peer in self._offers.pop(ticket, {})]

    def refuse(self, ticket: Ticket, reason: str) -> list[InboundEffect]:
        """Answer the OFFERs of this ticket that have come with a REJECT."""
        return [Send(peer, Reject(ticket, reason)) for peer in self._offers.pop(ticket, {})]

    def cancel(self, ticket: Ticket, error: TercetError) -> list[InboundEffect]:
        """Give up a ticket. Quiesced follows, now or when it is proven."""
        incoming = self._tickets.get(ticket)
        return self._after(incoming, incoming.fail(error)) if incoming else []

    def live(self) -> list[Ticket]:
        return list(self._tickets)

    # ---- what comes from the peer

    def on_message(self, peer: PeerKey, terms: Terms, message: Message, now: float) -> list[InboundEffect]:
        match message:
            case Offer(ticket, num_units):
                return self._on_offer(ticket, Source(peer, terms, num_units, now + self._lease_s), now)
            case Heartbeat():
                return self._on_heartbeat(peer, message, now)
            case Goodbye():
                return self.peer_dead(peer)
            case Abort(ticket) if peer in self._offers.get(ticket, {}):
                del self._offers[ticket][peer]
                return []
            case Written(ticket) | Abort(ticket) | AbortAck(ticket):
                incoming = self._tickets.get(ticket)
                source = incoming.sources.get(peer) if incoming else None
                if incoming and source:
                    return self._after(incoming, self._on_word(incoming, source, message, now))
        self.dropped[type(message).__name__] += 1
        return []

    def begin_landing(self, peer: PeerKey, data: Data) -> Landing | None:
        """Where the bytes of a DATA go, or None if its bytes must not be placed. Every non-None answer is followed by
        `end_landing`; until then the ticket is not quiesced."""
        incoming = self._tickets.get(data.ticket)
        landing = incoming.begin_landing(peer, data) if incoming else None
        if landing is None:
            self.dropped["Data"] += 1
        return landing

    def end_landing(self, peer: PeerKey, data: Data, good: NDArray[np.bool_] | None, now: float) -> list[InboundEffect]:
        """The bytes of `data` are placed; good: whether each (layer, unit) matches its digest. None: it was cut off."""
        self.progress += 1
        incoming = self._tickets[data.ticket]
        if good is not None and not incoming.failed:
            self.corrupt += good.size - int(good.sum())
        return self._after(incoming, incoming.end_landing(peer, data, good, now))

    def peer_down(self, peer: PeerKey) -> list[InboundEffect]:
        """The connection is gone. For a one-sided writer that is no proof; see `peer_dead`."""
        self._keep_offers(lambda source: source.peer != peer)
        effects: list[InboundEffect] = []
        for incoming in self._of(peer):
            error = PeerDown(f"the prefill worker of {incoming.ticket.request_id} is gone")
            effects += self._after(incoming, incoming.fail(error))
        return effects

    def peer_dead(self, peer: PeerKey) -> list[InboundEffect]:
        """No write of the peer can land any more: it said so, its process is proven dead, or its link is fenced."""
        return [e for t in self._of(peer) for e in self._after(t, t.writer_done(t.sources[peer]))]

    def tick(self, now: float) -> list[InboundEffect]:
        """Fail tickets that have not heard from a writer, or not advanced, for a lease; forget stale offers."""
        self._keep_offers(lambda source: source.expires >= now)
        return [e for incoming in list(self._tickets.values()) for e in self._after(incoming, incoming.tick(now))]

    def heartbeats(self) -> list[InboundEffect]:
        """One HEARTBEAT per peer, naming the live tickets that it serves, and those expected that it has offered, with
        their marks; and once more the ABORT of each failed ticket whose writer has not answered."""
        by_peer: dict[PeerKey, Heartbeat] = {}
        effects: list[InboundEffect] = []
        for incoming in self._tickets.values():
            effects += incoming.aborts()
            for source in () if incoming.failed else incoming.sources.values():
                heartbeat = by_peer.setdefault(source.peer, Heartbeat([], []))
                heartbeat.tickets.append(incoming.ticket)
                heartbeat.marks.append(incoming.mark_for(source))
        for ticket in self._expected:
            for peer in self._offers.get(ticket, {}):
                heartbeat = by_peer.setdefault(peer, Heartbeat([], []))
                heartbeat.tickets.append(ticket)
                heartbeat.marks.append(self.progress)
        return effects + [Send(peer, heartbeat) for peer, heartbeat in by_peer.items()]

    # ---- transitions

    def _after(self, incoming: Incoming, effects: list[InboundEffect]) -> list[InboundEffect]:
        """Forget the ticket, if it is over now."""
        if incoming.over:
            self._tickets.pop(incoming.ticket, None)
        return effects

    def _of(self, peer: PeerKey) -> list[Incoming]:
        return [t for t in self._tickets.values() if peer in t.sources]

    def _on_offer(self, ticket: Ticket, source: Source, now: float) -> list[InboundEffect]:
        incoming = self._tickets.get(ticket)
        if incoming is not None:
            return self._after(incoming, incoming.offer(source, now))
        if ticket.epoch != self.epoch:
            self.dropped["Offer"] += 1
            return [Send(source.peer, Reject(ticket, f"this worker is at epoch {self.epoch}, not {ticket.epoch}"))]
        self._offers.setdefault(ticket, {})[source.peer] = source
        return []

    def _on_word(
        self, incoming: Incoming, source: Source, message: Written | Abort | AbortAck, now: float
    ) -> list[InboundEffect]:
        match message:
            case Abort(_, code, reason):
                return incoming.writer_done(source, from_wire(code, reason))
            case AbortAck():
                return incoming.writer_done(source)
            case Written() if not incoming.failed and source.written is None:
                return incoming.written(source, message, now)
        self.dropped["Written"] += 1
        return []

    def _on_heartbeat(self, peer: PeerKey, heartbeat: Heartbeat, now: float) -> list[InboundEffect]:
        for ticket, mark in zip(heartbeat.tickets, heartbeat.marks, strict=True):
            incoming, offers = self._tickets.get(ticket), self._offers.get(ticket, {})
            if incoming is not None and peer in incoming.sources and not incoming.failed:
                self.progress += mark > incoming.sources[peer].peer_mark
                incoming.heartbeat(incoming.sources[peer], mark, now)
            elif peer in offers:
                offers[peer].expires = now + self._lease_s
            else:
                self.dropped["Heartbeat"] += 1
        return []

    def _keep_offers(self, good: Callable[[Source], bool]) -> None:
        kept = {t: {peer: s for peer, s in offers.items() if good(s)} for t, offers in self._offers.items()}
        self._offers = {ticket: offers for ticket, offers in kept.items() if offers}
