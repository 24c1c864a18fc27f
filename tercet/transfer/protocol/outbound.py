"""The sending half of the KV handover: a state machine without I/O, threads or clocks of its own.

    open ──OFFER──> offered ──GRANT──> granted ──push*, finish──> finished ──RELEASE──> Released, OpDone
      │                │                 │
      └── cancel, REJECT, ABORT, lease ──┴──> Failed(cause) ... OpDone

`OpDone` says that the source blocks may be reused: no write of the ticket is under way or will begin. It always comes,
once, and last. The links of a peer ask for their next write (`next_write`), carry it out and say so (`end_write`), so
an ABORT_ACK is sent only when no write can follow: it is the receiver's proof. The WRITTEN is sent when the last write
has ended, whichever link carried it.

A peer's bandwidth is shared by deadline: the request that must be done first is written first, `MAX_WRITE` bytes at a
time. What waits meanwhile is coalesced: layers of the same units travel as one write.

Messages may come in any order, twice or late; what names no ticket of ours is counted in `dropped`.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from tercet.core import Ticket
from tercet.errors import LeaseExpired, Overloaded, PeerDown, TercetError, TransferError, from_wire
from tercet.transfer.memory.layout import Pair, Units
from tercet.transfer.protocol.effects import Cut, PeerKey, Send
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
    Written,
)

MAX_WRITE = 8 << 20  # bytes: a later, more urgent request waits for no more
MAX_UNSEEN_WRITE = 64 << 20  # where the peer need not look at them meanwhile: it is woken less often


@dataclass(frozen=True)
class Write:
    """Write source units of `layers` layers to the destination's, as granted units `index ...` of the ticket."""

    ticket: Ticket
    layer: int
    layers: int
    index: int
    src: Units
    dst: Units
    resend: int = 0  # number of the RESEND that asked for it


@dataclass(frozen=True)
class Ready:
    """There may be something to write to this peer."""

    peer: PeerKey


@dataclass(frozen=True)
class Granted:
    ticket: Ticket
    first_block: int  # source blocks before it need not be pushed


@dataclass(frozen=True)
class SendFailed:
    ticket: Ticket
    error: TercetError


@dataclass(frozen=True)
class Released:
    ticket: Ticket


@dataclass(frozen=True)
class OpDone:
    ticket: Ticket


OutboundEffect = Send | Ready | Cut | Granted | SendFailed | Released | OpDone


@dataclass
class _Pending:
    """What is to be written: granted units, of one layer or of some that follow each other."""

    layer: int
    unit: int  # granted, the first
    units: int
    layers: int = 1
    resend: int = 0


@dataclass
class _Sending:
    ticket: Ticket
    peer: PeerKey
    pair: Pair
    num_units: int
    deadline: float
    max_write: int
    expires: float  # unless the peer is heard of before
    advanced: float  # when it last did
    mark: int = 0  # grows as it advances, for the peer to see
    peer_mark: int = 0
    worked: int = 0  # what the worker as a whole had done when this ticket last advanced while it waited
    grant: Grant | None = None
    blocks: dict[int, int] = field(default_factory=dict)  # index in the prompt -> source block, of what was pushed
    pending: deque[_Pending] = field(default_factory=deque)
    writing: int = 0  # writes handed out and not yet ended
    pushed: dict[int, int] = field(default_factory=dict)  # layer -> granted units that were pushed
    written_bytes: int = 0
    resent: set[int] = field(default_factory=set)  # numbers of the RESENDs that were obeyed
    note: bytes | None = None  # set when all was pushed, until WRITTEN is sent
    finished_at: float | None = None  # when all was pushed
    over: bool = False  # failed or released: no new write begins
    farewell: Abort | AbortAck | None = None  # proof for the receiver, due when the last write has ended

    def advance(self, now: float) -> None:
        self.advanced = now
        self.mark += 1

    @property
    def waits(self) -> bool:
        """For the engine to compute it, or for a link that is busy with others: neither is this ticket's own matter."""
        to_come = self.finished_at is None or bool(self.pending)
        return self.grant is not None and not self.writing and to_come

    @property
    def granted_bytes(self) -> int:
        """Of all layers together."""
        assert self.grant is not None
        return max(0, self.num_units - self.grant.first_unit) * len(self.pair.layers) * self.pair.unit_bytes

    @cached_property
    def units_per_block(self) -> tuple[int, int]:
        """Of the source, of the destination."""
        return self.pair.src.block_size // self.pair.unit, self.pair.dst.block_size // self.pair.unit

    @cached_property
    def most_units(self) -> int:
        """Of all layers of a write together."""
        return max(1, self.max_write // self.pair.unit_bytes)


class Outbound:
    """All tickets of one prefill worker. Not thread-safe: the mover holds a lock around each call."""

    def __init__(self, lease_s: float) -> None:
        self.dropped: Counter[str] = Counter()
        self.resent = 0  # units that a receiver asked for again
        self._lease_s = lease_s
        self._worked = 0  # writes and tickets that have ended
        self._tickets: dict[Ticket, _Sending] = {}

    # ---- the prefill worker's verbs

    def open(
        self,
        ticket: Ticket,
        peer: PeerKey,
        pair: Pair,
        num_tokens: int,
        deadline: float,
        now: float,
        max_write: int = MAX_WRITE,
    ) -> list[OutboundEffect]:
        """max_write: bytes of one write, as far as a unit is not larger."""
        assert ticket not in self._tickets, f"{ticket} opened twice"
        num_units = -(-num_tokens // pair.unit)
        self._tickets[ticket] = _Sending(ticket, peer, pair, num_units, deadline, max_write, now + self._lease_s, now)
        return [Send(peer, Offer(ticket, num_units))]

    def push(self, ticket: Ticket, layer: int, first: int, blocks: Sequence[int]) -> list[OutboundEffect]:
        """Prompt blocks `first ...` of `layer` stand in source `blocks`; write those that were granted, each once."""
        out = self._tickets.get(ticket)
        if out is None or out.over or out.grant is None or layer not in out.pair.layers:
            return []
        if first + len(blocks) - 1 not in out.blocks:  # else another layer of the same blocks
            out.blocks.update(enumerate(blocks, first))
        per_block, granted = out.units_per_block[0], out.grant.first_unit
        start = max(first * per_block - granted, out.pushed.get(layer, 0))
        end = min((first + len(blocks)) * per_block, out.num_units) - granted
        if end <= start:
            return []
        out.pushed[layer] = end
        return self._add(out, layer, start, end - start)

    def finish(self, ticket: Ticket, note: bytes, now: float) -> list[OutboundEffect]:
        """All was pushed. The note goes with the WRITTEN, when the writes have ended."""
        out = self._tickets.get(ticket)
        if out is None or out.over:
            return []
        out.note, out.finished_at = note, now
        out.advance(now)
        return self._say_if_written(out, now)

    def cancel(self, ticket: Ticket, error: TercetError) -> list[OutboundEffect]:
        out = self._tickets.get(ticket)
        return self._give_up(out, error) if out else []

    def live(self) -> list[Ticket]:
        return list(self._tickets)

    # ---- the links of a peer

    def next_write(self, peer: PeerKey) -> Write | None:
        """The most urgent write to a peer. Every one is followed by `end_write`."""
        waiting = [out for out in self._tickets.values() if out.peer == peer and out.pending]
        if not waiting:
            return None
        out = min(waiting, key=lambda out: out.deadline)
        out.writing += 1
        return self._write_of(out, self._cut(out))

    def end_write(self, write: Write, now: float) -> list[OutboundEffect]:
        """A write has ended; whether it went well is the connection's matter."""
        out = self._tickets[write.ticket]
        out.writing -= 1
        self._worked += 1
        if out.over:
            return self._settle(out)
        out.advance(now)
        if write.resend == 0:
            out.written_bytes += write.layers * write.src.count * out.pair.unit_bytes
        return self._say_if_written(out, now)

    def has_pending(self, peer: PeerKey) -> bool:
        """Whether `next_write` has one."""
        return any(out.pending for out in self._tickets.values() if out.peer == peer)

    def writing(self, peer: PeerKey) -> bool:
        """Whether a write to the peer is under way."""
        return any(out.writing for out in self._tickets.values() if out.peer == peer)

    # ---- what comes from the peer

    def on_message(self, peer: PeerKey, message: Message, now: float) -> list[OutboundEffect]:
        if isinstance(message, Heartbeat):
            return self._on_heartbeat(peer, message, now)
        known = isinstance(message, Grant | Release | Reject | Abort | Resend)
        out = self._tickets.get(message.ticket) if known else None  # type: ignore[union-attr]  # checked above
        if out is None or out.peer != peer:
            self.dropped[type(message).__name__] += 1
            # An ABORT for a ticket that we no longer know still asks for proof, and there is nothing left to write.
            return [Send(peer, AbortAck(message.ticket))] if isinstance(message, Abort) else []
        match message:
            case Grant() if out.grant is None and not out.over:
                out.advance(now)
                return self._on_grant(out, message)
            case Resend(_, number) if number not in out.resent and not out.over:
                out.advance(now)
                return self._on_resend(out, message)
            case Release() if not out.over:
                out.over = True
                return [Released(out.ticket), *self._settle(out)]
            case Reject(_, reason):
                return self._fail(out, Overloaded(reason), None)
            case Abort(_, code, reason):
                return self._fail(out, from_wire(code, reason), AbortAck(out.ticket))
        self.dropped[type(message).__name__] += 1
        return []

    def peer_down(self, peer: PeerKey) -> list[OutboundEffect]:
        effects: list[OutboundEffect] = []
        for out in [t for t in self._tickets.values() if t.peer == peer]:
            effects += self._fail(out, PeerDown(f"the decode worker of {out.ticket.request_id} is gone"), None)
        return effects

    def tick(self, now: float, computed: int = 0) -> list[OutboundEffect]:
        """Fail what has heard nothing from its reader, or has not advanced, for a lease.

        computed: how much the engine has done so far. A ticket that waits advances with it and with every write and
        ticket that ends, whoever they were for.
        """
        effects: list[OutboundEffect] = []
        # First those that do not wait: their end is what the others may be waiting for.
        for out in sorted(self._tickets.values(), key=lambda out: out.waits):
            if out.waits and out.worked != computed + self._worked:
                out.worked = computed + self._worked
                out.advance(now)
            if out.over:
                effects += [Cut(out.peer)] if out.writing and out.expires < now else []
            elif min(out.expires, out.advanced + self._lease_s) < now:
                error = self._expired(out, now)
                out.expires = now + self._lease_s  # for the write that may be under way
                effects += self._give_up(out, error)
        return effects

    def _expired(self, out: _Sending, now: float) -> LeaseExpired:
        name = out.ticket.request_id
        if out.expires < now:
            return LeaseExpired(f"no word of {name} from its decode worker for {self._lease_s} s")
        if out.grant is None:
            return LeaseExpired(f"the decode worker of {name} has granted nothing for {self._lease_s} s")
        written = f"{out.written_bytes} of {out.granted_bytes} KV bytes are written"
        return LeaseExpired(f"the handover of {name} has not advanced for {self._lease_s} s: {written}")

    def heartbeats(self) -> list[OutboundEffect]:
        """One HEARTBEAT a peer, naming its live tickets and how far they are."""
        by_peer: dict[PeerKey, list[_Sending]] = {}
        for out in self._tickets.values():
            if not out.over:
                by_peer.setdefault(out.peer, []).append(out)
        return [
            Send(peer, Heartbeat([out.ticket for out in outs], [out.mark for out in outs]))
            for peer, outs in by_peer.items()
        ]

    # ---- transitions

    def _on_grant(self, out: _Sending, grant: Grant) -> list[OutboundEffect]:
        missing = max(0, out.num_units - grant.first_unit)
        if len(grant.blocks) != -(-missing // out.units_per_block[1]):
            return self._give_up(out, TransferError("the grant does not fit the prompt"))
        out.grant = grant
        return [Granted(out.ticket, grant.first_unit // out.units_per_block[0])]

    def _on_resend(self, out: _Sending, asked: Resend) -> list[OutboundEffect]:
        """Write one unit again; its source stands until the RELEASE."""
        if out.grant is None:
            return self._give_up(out, TransferError("a unit was asked for again before any was granted"))
        block = (out.grant.first_unit + asked.index) // out.units_per_block[0]
        if block not in out.blocks or asked.layer not in out.pair.layers:
            return self._give_up(out, TransferError(f"unit {asked.index} was asked for again, but never written"))
        out.resent.add(asked.number)
        self.resent += 1
        out.pending.appendleft(_Pending(asked.layer, asked.index, 1, resend=asked.number))
        return [Ready(out.peer)]

    def _add(self, out: _Sending, layer: int, unit: int, units: int) -> list[OutboundEffect]:
        """Join a layer with those before it that wait to be written, if they fit one write."""
        last = out.pending[-1] if out.pending else None
        if (
            last is not None
            and (last.unit, last.units, last.layer + last.layers, last.resend) == (unit, units, layer, 0)
            and (last.layers + 1) * units <= out.most_units
        ):
            last.layers += 1
            return []
        out.pending.append(_Pending(layer, unit, units))
        return [] if last else [Ready(out.peer)]  # who waits for a write has to be woken only now

    def _cut(self, out: _Sending) -> _Pending:
        """The first pending write; of one that is over the limit, as much as fits."""
        first, most = out.pending[0], out.most_units
        if first.units <= most:
            return out.pending.popleft()
        part = replace(first, units=most)
        first.unit, first.units = first.unit + most, first.units - most
        return part

    def _write_of(self, out: _Sending, what: _Pending) -> Write:
        assert out.grant is not None
        from_, to = out.units_per_block
        end = what.unit + what.units
        start = out.grant.first_unit + what.unit
        sources = [out.blocks[n] for n in range(start // from_, -(-(start + what.units) // from_))]
        src = Units(sources, start % from_, what.units)
        dst = Units(out.grant.blocks[what.unit // to : -(-end // to)], what.unit % to, what.units)
        return Write(out.ticket, what.layer, what.layers, what.unit, src, dst, what.resend)

    def _say_if_written(self, out: _Sending, now: float) -> list[OutboundEffect]:
        if out.note is None or out.pending or out.writing:
            return []
        assert out.finished_at is not None
        if out.written_bytes != out.granted_bytes:
            counted = f"{out.written_bytes} KV bytes were written, {out.granted_bytes} were granted"
            return self._give_up(out, TransferError(f"the handover of {out.ticket.request_id} is not whole: {counted}"))
        written = Written(out.ticket, out.written_bytes, now - out.finished_at, out.note)
        out.note = None
        return [Send(out.peer, written)]

    def _on_heartbeat(self, peer: PeerKey, heartbeat: Heartbeat, now: float) -> list[OutboundEffect]:
        for ticket, mark in zip(heartbeat.tickets, heartbeat.marks, strict=True):
            out = self._tickets.get(ticket)
            if out is None or out.peer != peer or out.over:
                self.dropped["Heartbeat"] += 1
                continue
            out.expires = now + self._lease_s
            if mark > out.peer_mark:
                out.peer_mark, out.advanced = mark, now  # and no mark of ours: two echoes would never end
        return []

    def _fail(self, out: _Sending, error: TercetError, farewell: Abort | AbortAck | None) -> list[OutboundEffect]:
        out.farewell = farewell or out.farewell
        if out.over:
            return self._settle(out)
        out.over = True
        return [SendFailed(out.ticket, error), *self._settle(out)]

    def _give_up(self, out: _Sending, error: TercetError) -> list[OutboundEffect]:
        return self._fail(out, error, Abort(out.ticket, error.code(), str(error)))

    def _settle(self, out: _Sending) -> list[OutboundEffect]:
        """OpDone, and the proof for the receiver, once no write of the ticket is left."""
        out.pending.clear()
        if out.writing or self._tickets.pop(out.ticket, None) is None:
            return []
        self._worked += 1
        effects: list[OutboundEffect] = []
        if out.farewell is not None:
            effects.append(Send(out.peer, out.farewell))
        return [*effects, OpDone(out.ticket)]
