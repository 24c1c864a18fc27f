"""The receiving half of the KV handover: a state machine without I/O, threads or clocks of its own.

    admit ──OFFER/GRANT──> granted ──DATA*, COMMIT, digest holds──> Complete, Quiesced
      │                       │
      └──cancel, lease, ABORT─┴──────────────────> Failed(cause) ... Quiesced

Four facts are kept apart. OpDone is the sender's. Here: `Complete` (bytes landed = bytes expected, digest holds),
`Failed(cause)`, and `Quiesced`: proof that no further write can land. A caller frees blocks on Complete or Quiesced
and on nothing else. Proof is one of
  * no write is possible: nothing was granted, or the transport places bytes at the receiver (tcp) and no landing is
    under way;
  * the writer's word: ABORT, ABORT_ACK, GOODBYE or COMMIT from the writer, after which it writes no more;
  * the writer's death (`peer_dead`), which the transport proved.
A timeout is never proof.

Messages may come in any order, twice or late; what names no ticket of ours is counted in `dropped`. Methods return
effects for the caller to carry out, in order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tercet.errors import DigestMismatch, LeaseExpired, PeerDown, TercetError, TransferError, from_wire
from tercet.transfer.digest import MASK
from tercet.transfer.effects import Peer, Send
from tercet.transfer.messages import (
    Abort,
    AbortAck,
    Commit,
    Data,
    Goodbye,
    Grant,
    Heartbeat,
    Message,
    Offer,
    Reject,
    Release,
    Ticket,
)


@dataclass(frozen=True)
class Committed:
    """The first token is known; the KV may still be landing."""

    ticket: Ticket
    commit: Commit


@dataclass(frozen=True)
class Complete:
    ticket: Ticket
    num_bytes: int
    tail_s: float  # COMMIT seen until the last byte had landed


@dataclass(frozen=True)
class Failed:
    ticket: Ticket
    error: TercetError


@dataclass(frozen=True)
class Quiesced:
    ticket: Ticket


@dataclass(frozen=True)
class Cut:
    """Close the connection: its peer is silent in the middle of a landing, and only that ends the landing."""

    peer: Peer


Effect = Send | Cut | Committed | Complete | Failed | Quiesced


@dataclass
class _Inbound:
    ticket: Ticket
    first_block: int
    blocks: tuple[int, ...]  # destination blocks, empty on a full prefix hit
    expires: float
    peer: Peer | None = None  # set by OFFER
    one_sided: bool = False  # the peer writes into our memory itself
    granted: bool = False
    landed: set[tuple[int, int]] = field(default_factory=set)  # (layer, index)
    digest: int = 0
    landing: int = 0  # DATA payloads that are being placed right now
    commit: Commit | None = None
    committed_at: float = 0.0
    failed: bool = False
    writer_done: bool = False  # proof by word or death


class Inbound:
    """All tickets of one decode worker. Not thread-safe: the mover holds a lock around each call."""

    def __init__(self, epoch: int, layers: int, block_bytes: int, lease_s: float, integrity: bool) -> None:
        self.epoch = epoch
        self.dropped: Counter[str] = Counter()  # message name -> how many named no live ticket
        self._layers = layers
        self._block_bytes = block_bytes
        self._lease_s = lease_s
        self._integrity = integrity
        self._tickets: dict[Ticket, _Inbound] = {}
        self._offers: dict[Ticket, tuple[Peer, bool, float]] = {}  # came before admission -> peer, one_sided, expiry

    # ---- the decode worker's verbs

    def admit(self, ticket: Ticket, first_block: int, blocks: Sequence[int], now: float) -> list[Effect]:
        """Open a ticket: `blocks` are leased to it until Complete or Quiesced names it."""
        assert ticket not in self._tickets, f"{ticket} admitted twice"
        inbound = _Inbound(ticket, first_block, tuple(blocks), expires=now + self._lease_s)
        self._tickets[ticket] = inbound
        offer = self._offers.pop(ticket, None)
        return self._grant(inbound, offer[0], offer[1]) if offer else []

    def refuse(self, ticket: Ticket, reason: str) -> list[Effect]:
        """Answer the ticket's OFFER, if it came, with REJECT."""
        offer = self._offers.pop(ticket, None)
        return [Send(offer[0], Reject(ticket, reason))] if offer else []

    def cancel(self, ticket: Ticket, error: TercetError) -> list[Effect]:
        """Give a ticket up. Quiesced follows, now or when it is proven."""
        inbound = self._tickets.get(ticket)
        return self._fail(inbound, error) if inbound else []

    def live(self) -> list[Ticket]:
        return list(self._tickets)

    # ---- what comes from the peer

    def on_message(self, peer: Peer, one_sided: bool, message: Message, now: float) -> list[Effect]:
        match message:
            case Offer(ticket):
                return self._on_offer(peer, one_sided, ticket, now)
            case Commit(ticket):
                return self._on_commit(ticket, peer, message, now)
            case Abort(ticket, code, reason):
                return self._on_abort(ticket, peer, from_wire(code, reason))
            case AbortAck(ticket):
                return self._on_writer_done(ticket, peer)
            case Heartbeat(tickets):
                return self._on_heartbeat(peer, tickets, now)
            case Goodbye():
                return [e for t in self._of(peer) for e in self._on_writer_done(t.ticket, peer)]
        self.dropped[type(message).__name__] += 1
        return []

    def begin_landing(self, peer: Peer, data: Data) -> list[int] | None:
        """Destination blocks of a DATA message, or None if its bytes must not be placed. Every non-None answer is
        followed by `end_landing`; until then the ticket is not quiesced."""
        inbound = self._tickets.get(data.ticket)
        if inbound is None or inbound.peer != peer or inbound.failed or not inbound.granted:
            self.dropped["Data"] += 1
            return None
        if data.layer >= self._layers or data.count < 1 or data.index + data.count > len(inbound.blocks):
            self.dropped["Data"] += 1
            return None
        if any((data.layer, data.index + i) in inbound.landed for i in range(data.count)):
            self.dropped["Data"] += 1  # a duplicate: what is verified is not written again
            return None
        inbound.landing += 1
        return list(inbound.blocks[data.index : data.index + data.count])

    def end_landing(self, data: Data, digests: Sequence[int] | None, now: float) -> list[Effect]:
        """The bytes of `data` stand in memory, with one digest a block; None: the placing was cut off."""
        inbound = self._tickets[data.ticket]
        inbound.landing -= 1
        for offset, digest in enumerate(digests or ()):
            inbound.landed.add((data.layer, data.index + offset))
            inbound.digest = (inbound.digest + digest) & MASK
        if inbound.failed:
            return self._settle(inbound)
        return self._complete_if_all_landed(inbound, now)

    def peer_down(self, peer: Peer, now: float) -> list[Effect]:
        """The connection is gone. For a one-sided writer that is no proof; see `peer_dead`."""
        self._offers = {t: offer for t, offer in self._offers.items() if offer[0] != peer}
        effects: list[Effect] = []
        for inbound in self._of(peer):
            effects += self._fail(inbound, PeerDown(f"the prefill worker of {inbound.ticket.request_id} is gone"))
        return effects

    def peer_dead(self, peer: Peer) -> list[Effect]:
        """The process behind the connection is proven dead."""
        return [e for t in self._of(peer) for e in self._on_writer_done(t.ticket, peer)]

    def tick(self, now: float) -> list[Effect]:
        """Fail what has heard nothing from its writer for a lease; forget stale offers."""
        self._offers = {t: offer for t, offer in self._offers.items() if offer[2] >= now}
        effects: list[Effect] = []
        for inbound in [t for t in self._tickets.values() if t.expires < now]:
            error = LeaseExpired(
                f"no word of {inbound.ticket.request_id} from its prefill worker for {self._lease_s} s"
            )
            if not inbound.failed:
                effects += self._fail(inbound, error)
            if inbound.landing:
                effects.append(Cut(inbound.peer))
        return effects

    def heartbeats(self) -> list[Effect]:
        """One HEARTBEAT a peer, naming the live tickets that it serves."""
        by_peer: dict[Peer, list[Ticket]] = {}
        for inbound in self._tickets.values():
            if inbound.peer is not None and not inbound.failed:
                by_peer.setdefault(inbound.peer, []).append(inbound.ticket)
        return [Send(peer, Heartbeat(tickets)) for peer, tickets in by_peer.items()]

    # ---- transitions

    def _of(self, peer: Peer) -> list[_Inbound]:
        return [t for t in self._tickets.values() if t.peer == peer]

    def _on_offer(self, peer: Peer, one_sided: bool, ticket: Ticket, now: float) -> list[Effect]:
        inbound = self._tickets.get(ticket)
        if inbound is not None:
            return self._grant(inbound, peer, one_sided) if not inbound.granted and not inbound.failed else []
        if ticket.epoch != self.epoch:
            self.dropped["Offer"] += 1
            return [Send(peer, Reject(ticket, f"this worker is at epoch {self.epoch}, not {ticket.epoch}"))]
        self._offers[ticket] = (peer, one_sided, now + self._lease_s)
        return []

    def _grant(self, inbound: _Inbound, peer: Peer, one_sided: bool) -> list[Effect]:
        inbound.peer, inbound.one_sided, inbound.granted = peer, one_sided, True
        return [Send(peer, Grant(inbound.ticket, inbound.first_block, list(inbound.blocks)))]

    def _on_commit(self, ticket: Ticket, peer: Peer, commit: Commit, now: float) -> list[Effect]:
        inbound = self._tickets.get(ticket)
        if inbound is None or inbound.peer != peer or inbound.failed or inbound.commit is not None:
            self.dropped["Commit"] += 1
            return []
        inbound.commit, inbound.committed_at = commit, now
        inbound.writer_done = True  # a writer commits after its last write
        return [Committed(ticket, commit), *self._complete_if_all_landed(inbound, now)]

    def _complete_if_all_landed(self, inbound: _Inbound, now: float) -> list[Effect]:
        commit = inbound.commit
        if commit is None or len(inbound.landed) < len(inbound.blocks) * self._layers or inbound.landing:
            return []
        expected = len(inbound.landed) * self._block_bytes
        if commit.num_bytes != expected:
            return self._fail(inbound, TransferError(f"{expected} KV bytes landed, {commit.num_bytes} were committed"))
        if self._integrity and commit.digest != inbound.digest:
            return self._fail(inbound, DigestMismatch(f"the KV of {inbound.ticket.request_id} arrived corrupt"))
        del self._tickets[inbound.ticket]
        assert inbound.peer is not None
        return [
            Complete(inbound.ticket, expected, now - inbound.committed_at),
            Send(inbound.peer, Release(inbound.ticket)),
        ]

    def _on_abort(self, ticket: Ticket, peer: Peer, error: TercetError) -> list[Effect]:
        self._offers.pop(ticket, None)
        inbound = self._tickets.get(ticket)
        if inbound is None or inbound.peer != peer:
            self.dropped["Abort"] += 1
            return []
        inbound.writer_done = True
        return self._fail(inbound, error)

    def _on_writer_done(self, ticket: Ticket, peer: Peer) -> list[Effect]:
        inbound = self._tickets.get(ticket)
        if inbound is None or inbound.peer != peer:
            self.dropped["AbortAck"] += 1
            return []
        inbound.writer_done = True
        return self._fail(inbound, PeerDown(f"the prefill worker gave {ticket.request_id} up"))

    def _on_heartbeat(self, peer: Peer, tickets: Sequence[Ticket], now: float) -> list[Effect]:
        for ticket in tickets:
            inbound = self._tickets.get(ticket)
            if inbound is not None and inbound.peer == peer:
                inbound.expires = now + self._lease_s
            elif ticket in self._offers:
                self._offers[ticket] = (*self._offers[ticket][:2], now + self._lease_s)
            else:
                self.dropped["Heartbeat"] += 1
        return []

    def _fail(self, inbound: _Inbound, error: TercetError) -> list[Effect]:
        if inbound.failed:
            return self._settle(inbound)
        inbound.failed = True
        effects: list[Effect] = [Failed(inbound.ticket, error)]
        if inbound.peer is not None:
            effects.append(Send(inbound.peer, Abort(inbound.ticket, error.code(), str(error))))
        return effects + self._settle(inbound)

    def _settle(self, inbound: _Inbound) -> list[Effect]:
        """Quiesced, if it is proven for this failed ticket."""
        writer_may_write = inbound.granted and inbound.one_sided and not inbound.writer_done
        if inbound.landing or writer_may_write or self._tickets.pop(inbound.ticket, None) is None:
            return []
        return [Quiesced(inbound.ticket)]
