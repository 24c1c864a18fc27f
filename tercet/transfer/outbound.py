"""The sending half of the KV handover: a state machine without I/O, threads or clocks of its own.

    open ──OFFER──> offered ──GRANT──> granted ──push*, commit──> committed ──RELEASE──> Released, OpDone
      │                │                 │
      └── cancel, REJECT, ABORT, lease ──┴──> Failed(cause) ... OpDone

`OpDone` says that the source blocks may be reused: no write of the ticket is under way or will begin. It always comes,
once, and last. A write is bracketed by `begin_write` (False: the ticket is over, do not write) and `end_write`, so an
ABORT_ACK is sent only when no write can follow: it is the receiver's proof.

Messages may come in any order, twice or late; what names no ticket of ours is counted in `dropped`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tercet.errors import LeaseExpired, Overloaded, PeerDown, TercetError, TransferError, from_wire
from tercet.transfer.digest import MASK
from tercet.transfer.effects import Peer, Send
from tercet.transfer.messages import (
    Abort,
    AbortAck,
    Commit,
    Data,
    Grant,
    Heartbeat,
    Message,
    Offer,
    Reject,
    Release,
    Ticket,
)


@dataclass(frozen=True)
class Write:
    """Write source `blocks` of one layer as what `data` names; destinations are `destinations`."""

    peer: Peer
    data: Data
    blocks: tuple[int, ...]
    destinations: tuple[int, ...]


@dataclass(frozen=True)
class Seal:
    """Every write before it has ended: `seal` the commit and send it."""

    peer: Peer
    commit: Commit
    committed_at: float


@dataclass(frozen=True)
class Granted:
    ticket: Ticket
    first_block: int  # blocks before it are at the destination already


@dataclass(frozen=True)
class Failed:
    ticket: Ticket
    error: TercetError


@dataclass(frozen=True)
class Released:
    ticket: Ticket


@dataclass(frozen=True)
class OpDone:
    ticket: Ticket


Effect = Send | Write | Seal | Granted | Failed | Released | OpDone


@dataclass
class _Outbound:
    ticket: Ticket
    peer: Peer
    num_blocks: int
    expires: float
    grant: Grant | None = None
    queued: int = 0  # writes handed out and not yet ended or refused
    written_bytes: int = 0
    digest: int = 0
    over: bool = False  # failed or released: no new write begins
    farewell: Abort | AbortAck | None = None  # proof for the receiver, due when the last write has ended


class Outbound:
    """All tickets of one prefill worker. Not thread-safe: the mover holds a lock around each call."""

    def __init__(self, block_bytes: int, lease_s: float) -> None:
        self.dropped: Counter[str] = Counter()
        self._block_bytes = block_bytes
        self._lease_s = lease_s
        self._tickets: dict[Ticket, _Outbound] = {}

    # ---- the prefill worker's verbs

    def open(self, ticket: Ticket, peer: Peer, num_blocks: int, now: float) -> list[Effect]:
        assert ticket not in self._tickets, f"{ticket} opened twice"
        self._tickets[ticket] = _Outbound(ticket, peer, num_blocks, now + self._lease_s)
        return [Send(peer, Offer(ticket, num_blocks))]

    def push(self, ticket: Ticket, layer: int, first: int, blocks: Sequence[int]) -> list[Effect]:
        """Prompt blocks `first ...` of `layer` stand in source `blocks`; write those that were granted."""
        out = self._tickets.get(ticket)
        if out is None or out.over or out.grant is None:
            return []
        skip = max(0, out.grant.first_block - first)
        index = first + skip - out.grant.first_block
        sources = tuple(blocks[skip:])
        if not sources:
            return []
        out.queued += 1
        destinations = tuple(out.grant.blocks[index : index + len(sources)])
        return [Write(out.peer, Data(ticket, layer, index, len(sources)), sources, destinations)]

    def commit(self, commit: Commit, now: float) -> list[Effect]:
        """All was pushed. Bytes, digest and transfer time are filled in by `seal`, when the writes have ended."""
        out = self._tickets.get(commit.ticket)
        return [Seal(out.peer, commit, now)] if out is not None and not out.over else []

    def cancel(self, ticket: Ticket, error: TercetError) -> list[Effect]:
        out = self._tickets.get(ticket)
        return self._give_up(out, error) if out else []

    def live(self) -> list[Ticket]:
        return list(self._tickets)

    # ---- the mover's brackets around each write

    def begin_write(self, data: Data) -> bool:
        out = self._tickets[data.ticket]
        return not out.over

    def end_write(self, data: Data, digests: Sequence[int] | None) -> list[Effect]:
        """A Write has been carried out, with a digest a block, or (None) left out because the ticket is over."""
        out = self._tickets[data.ticket]
        out.queued -= 1
        if digests is not None:
            out.written_bytes += data.count * self._block_bytes
            out.digest = (out.digest + sum(digests)) & MASK
        return self._settle(out) if out.over else []

    def seal(self, seal: Seal, now: float) -> list[Effect]:
        """The COMMIT, filled in; called in the order of the writes, behind the last of them."""
        out = self._tickets.get(seal.commit.ticket)
        if out is None or out.over:
            return []
        transfer_s = now - seal.committed_at
        commit = replace(seal.commit, num_bytes=out.written_bytes, digest=out.digest, transfer_s=transfer_s)
        return [Send(out.peer, commit)]

    # ---- what comes from the peer

    def on_message(self, peer: Peer, message: Message, now: float) -> list[Effect]:
        if isinstance(message, Heartbeat):
            return self._on_heartbeat(peer, message.tickets, now)
        out = self._tickets.get(message.ticket) if isinstance(message, Grant | Release | Reject | Abort) else None
        if out is None or out.peer != peer:
            self.dropped[type(message).__name__] += 1
            # An ABORT for a ticket that we no longer know still asks for proof, and there is nothing left to write.
            return [Send(peer, AbortAck(message.ticket))] if isinstance(message, Abort) else []
        match message:
            case Grant() if out.grant is None and not out.over:
                if message.first_block + len(message.blocks) != out.num_blocks:
                    return self._give_up(out, TransferError("the grant does not fit the prompt"))
                out.grant = message
                return [Granted(out.ticket, message.first_block)]
            case Release() if not out.over:
                out.over = True
                return [Released(out.ticket), *self._settle(out)]
            case Reject(_, reason):
                return self._fail(out, Overloaded(reason), None)
            case Abort(_, code, reason):
                return self._fail(out, from_wire(code, reason), AbortAck(out.ticket))
        self.dropped[type(message).__name__] += 1
        return []

    def peer_down(self, peer: Peer) -> list[Effect]:
        effects: list[Effect] = []
        for out in [t for t in self._tickets.values() if t.peer == peer]:
            effects += self._fail(out, PeerDown(f"the decode worker of {out.ticket.request_id} is gone"), None)
        return effects

    def tick(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for out in [t for t in self._tickets.values() if not t.over and t.expires < now]:
            error = LeaseExpired(f"no word of {out.ticket.request_id} from its decode worker for {self._lease_s} s")
            effects += self._give_up(out, error)
        return effects

    def heartbeats(self) -> list[Effect]:
        by_peer: dict[Peer, list[Ticket]] = {}
        for out in self._tickets.values():
            if not out.over:
                by_peer.setdefault(out.peer, []).append(out.ticket)
        return [Send(peer, Heartbeat(tickets)) for peer, tickets in by_peer.items()]

    # ---- transitions

    def _on_heartbeat(self, peer: Peer, tickets: Sequence[Ticket], now: float) -> list[Effect]:
        for ticket in tickets:
            out = self._tickets.get(ticket)
            if out is not None and out.peer == peer:
                out.expires = now + self._lease_s
            else:
                self.dropped["Heartbeat"] += 1
        return []

    def _fail(self, out: _Outbound, error: TercetError, farewell: Abort | AbortAck | None) -> list[Effect]:
        out.farewell = farewell or out.farewell
        if out.over:
            return self._settle(out)
        out.over = True
        return [Failed(out.ticket, error), *self._settle(out)]

    def _give_up(self, out: _Outbound, error: TercetError) -> list[Effect]:
        return self._fail(out, error, Abort(out.ticket, error.code(), str(error)))

    def _settle(self, out: _Outbound) -> list[Effect]:
        """OpDone, and the proof for the receiver, once no write of the ticket is left."""
        if out.queued or self._tickets.pop(out.ticket, None) is None:
            return []
        effects: list[Effect] = []
        if out.farewell is not None:
            effects.append(Send(out.peer, out.farewell))
        return [*effects, OpDone(out.ticket)]
