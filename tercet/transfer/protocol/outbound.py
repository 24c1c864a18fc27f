"""The sending half of the KV handover: a state machine without I/O, threads or clocks of its own. This is the table of
its tickets; what happens to one of them on its way to one destination is in outgoing.py.

`OpDone` says that the source blocks may be reused: no write of the ticket is under way or will begin, whichever
destination it is for. It always comes, once, and last. The links of a peer ask for their next write (`next_write`),
carry it out and report its end (`end_write`), so an ABORT_ACK is sent only when no write can follow: it is the
receiver's proof. The WRITTEN is sent when the last write has ended, whichever link carried it.

A ticket may go to several destinations, each with a part of the layers and heads; their facts are joined (shards.py).

A peer's bandwidth is shared by deadline: the request with the earliest deadline is written first, `MAX_WRITE` bytes at
a time. Waiting layers of the same units are coalesced into one write.

Messages may come in any order, twice or late; those that name no live ticket are counted in `dropped`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from tercet.core import Ticket
from tercet.errors import Overloaded, PeerDown, TercetError, from_wire
from tercet.transfer.memory.layout import Pair
from tercet.transfer.protocol.effects import PeerKey, Send
from tercet.transfer.protocol.facts import SendEvent
from tercet.transfer.protocol.messages import (
    Abort,
    AbortAck,
    Grant,
    Heartbeat,
    Message,
    Offer,
    Reject,
    Release,
    Resend,
)
from tercet.transfer.protocol.outgoing import OutboundEffect, Outgoing, Write
from tercet.transfer.protocol.shards import Cancel, SendJoint

MAX_WRITE = 8 << 20  # bytes: a more urgent request waits for at most one such write per link
MAX_LARGE_WRITE = 64 << 20  # where they move between GPUs, or the peer need not verify them: it is woken less often


class Outbound:
    """All tickets of one prefill worker. Not thread-safe: the mover holds a lock around each call."""

    def __init__(self, lease_s: float) -> None:
        self.dropped: Counter[str] = Counter()
        self.resent = 0  # units that a receiver asked for again
        self._lease_s = lease_s
        self._worked = 0  # writes and tickets that have ended
        self._shards: dict[tuple[Ticket, PeerKey], Outgoing] = {}
        self._joints: dict[Ticket, SendJoint] = {}  # of the shards of each ticket

    # ---- the prefill worker's verbs

    def open(
        self,
        ticket: Ticket,
        pairs: Mapping[PeerKey, Pair],
        num_tokens: int,
        deadline: float,
        now: float,
        max_write: int = MAX_WRITE,
    ) -> list[OutboundEffect]:
        """pairs: destination -> the layouts of source and destination. max_write: bytes of one write, which has at
        least one unit."""
        assert ticket not in self._joints, f"{ticket} opened twice"
        self._joints[ticket] = SendJoint(pairs)
        offers: list[OutboundEffect] = []
        for peer, pair in pairs.items():
            units, expires = -(-num_tokens // pair.unit), now + self._lease_s
            self._shards[ticket, peer] = Outgoing(
                ticket, peer, pair, units, deadline, max_write, self._lease_s, expires, now
            )
            offers.append(Send(peer, Offer(ticket, units)))
        return offers

    def push(self, ticket: Ticket, layer: int, first: int, blocks: Sequence[int]) -> list[OutboundEffect]:
        """The prompt's blocks from `first` on are in source `blocks` of `layer`; write the granted units, each once."""
        return [effect for out in self._of(ticket) for effect in out.push(layer, first, blocks)]

    def finish(self, ticket: Ticket, note: bytes, now: float) -> list[OutboundEffect]:
        """All was pushed. The note goes with each WRITTEN, once the writes have ended."""
        return [effect for out in self._of(ticket) for effect in self._after(out, out.finish(note, now))]

    def cancel(self, ticket: Ticket, error: TercetError) -> list[OutboundEffect]:
        return [effect for out in self._of(ticket) for effect in self._after(out, out.give_up(error))]

    def live(self) -> list[Ticket]:
        return list(self._joints)

    # ---- the links of a peer

    def next_write(self, peer: PeerKey) -> Write | None:
        """The most urgent write to a peer. Every one is followed by `end_write`."""
        waiting = [out for out in self._shards.values() if out.peer == peer and out.pending]
        return min(waiting, key=lambda out: out.deadline).next_write() if waiting else None

    def end_write(self, peer: PeerKey, write: Write, now: float) -> list[OutboundEffect]:
        """A write has ended, well or not: if not, the connection is closed."""
        self._worked += 1
        out = self._shards[write.ticket, peer]
        return self._after(out, out.end_write(write, now))

    def has_pending(self, peer: PeerKey) -> bool:
        """Whether `next_write` has one."""
        return any(out.pending for out in self._shards.values() if out.peer == peer)

    def writing(self, peer: PeerKey) -> bool:
        """Whether a write to the peer is under way."""
        return any(out.writing for out in self._shards.values() if out.peer == peer)

    # ---- what comes from the peer

    def on_message(self, peer: PeerKey, message: Message, now: float) -> list[OutboundEffect]:
        if isinstance(message, Heartbeat):
            return self._on_heartbeat(peer, message, now)
        known = isinstance(message, Grant | Release | Reject | Abort | Resend)
        out = self._shards.get((message.ticket, peer)) if known else None  # type: ignore[union-attr]  # checked above
        if out is None:
            self.dropped[type(message).__name__] += 1
            # An ABORT for a ticket that we no longer know still asks for proof, and there is nothing left to write.
            return [Send(peer, AbortAck(message.ticket))] if isinstance(message, Abort) else []
        return self._after(out, self._on_word(out, message, now))

    def peer_down(self, peer: PeerKey) -> list[OutboundEffect]:
        effects: list[OutboundEffect] = []
        for out in [out for out in self._shards.values() if out.peer == peer]:
            error = PeerDown(f"the decode worker of {out.ticket.request_id} is gone")
            effects += self._after(out, out.fail(error, None))
        return effects

    def tick(self, now: float, computed: int = 0) -> list[OutboundEffect]:
        """Fail tickets that have not heard from their reader, or not advanced, for a lease.

        computed: how much the engine has done so far. A ticket that waits counts as advancing while this grows, or
        while any write or ticket of the worker ends.
        """
        effects: list[OutboundEffect] = []
        # First those that do not wait: their end is what the others may be waiting for.
        for out in sorted(self._shards.values(), key=lambda out: out.waits):
            effects += self._after(out, out.tick(now, computed + self._worked))
        return effects

    def heartbeats(self) -> list[OutboundEffect]:
        """One HEARTBEAT per peer, naming its live tickets and their marks."""
        by_peer: dict[PeerKey, Heartbeat] = {}
        for out in self._shards.values():
            if not out.over:
                heartbeat = by_peer.setdefault(out.peer, Heartbeat([], []))
                heartbeat.tickets.append(out.ticket)
                heartbeat.marks.append(out.mark)
        return [Send(peer, heartbeat) for peer, heartbeat in by_peer.items()]

    # ---- transitions

    def _of(self, ticket: Ticket) -> list[Outgoing]:
        joint = self._joints.get(ticket)
        return [self._shards[ticket, peer] for peer in joint.parts] if joint else []

    def _on_word(self, out: Outgoing, message: Message, now: float) -> list[OutboundEffect]:
        match message:
            case Grant() if out.grant is None and not out.over:
                return out.granted(message, now)
            case Resend(_, number) if number not in out.resent and not out.over:
                effects = out.resend(message, now)
                self.resent += not out.over
                return effects
            case Release() if not out.over:
                return out.release()
            case Reject(_, reason):
                return out.fail(Overloaded(reason), None)
            case Abort(_, code, reason):
                return out.fail(from_wire(code, reason), AbortAck(out.ticket))
        self.dropped[type(message).__name__] += 1
        return []

    def _on_heartbeat(self, peer: PeerKey, heartbeat: Heartbeat, now: float) -> list[OutboundEffect]:
        for ticket, mark in zip(heartbeat.tickets, heartbeat.marks, strict=True):
            out = self._shards.get((ticket, peer))
            if out is None or out.over:
                self.dropped["Heartbeat"] += 1
            else:
                out.heartbeat(mark, now)
        return []

    def _after(self, out: Outgoing, effects: list[OutboundEffect]) -> list[OutboundEffect]:
        """Forget a shard that has ended, and join the facts in its effects with those of the ticket's other shards."""
        if out.ended and self._shards.pop((out.ticket, out.peer), None) is not None:
            self._worked += 1
        told: list[OutboundEffect] = []
        for effect in effects:
            told += self._joined(out, effect) if isinstance(effect, SendEvent) else [effect]
        return told

    def _joined(self, out: Outgoing, event: SendEvent) -> list[OutboundEffect]:
        told: list[OutboundEffect] = []
        for each in self._joints[out.ticket].take(out.peer, event):
            if isinstance(each, Cancel):
                other = self._shards[out.ticket, each.part]
                told += self._after(other, other.give_up(each.error))
            else:
                told.append(each)
        if not self._joints[out.ticket].parts:
            del self._joints[out.ticket]
        return told
