"""One ticket of the sending half on its way to one destination: what was granted, pushed and written of it.

offered ──GRANT──> granted ──push*, finish──> finished ──RELEASE──> Released, OpDone
   │                 │
   └── cancel, REJECT, ABORT, lease ──> Failed(cause) ... OpDone
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from tercet.core import Ticket
from tercet.errors import LeaseExpired, TercetError, TransferError
from tercet.transfer.memory.layout import Pair, Units
from tercet.transfer.protocol.effects import Cut, PeerKey, Send
from tercet.transfer.protocol.facts import Granted, OpDone, Released, SendEvent, SendFailed
from tercet.transfer.protocol.messages import MAX_DIGESTS, Abort, AbortAck, Grant, Resend, Written


@dataclass(frozen=True)
class Write:
    """Write the source's units of `layers` layers to the destination, as the ticket's granted units from `index` on."""

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


OutboundEffect = Send | Ready | Cut | SendEvent


@dataclass
class _Pending:
    """Granted units that are to be written, of one layer or of several consecutive ones."""

    layer: int
    unit: int  # the first, counted from the first granted one
    units: int
    layers: int = 1
    resend: int = 0


@dataclass(eq=False)
class Outgoing:
    """Its methods return effects for the caller to carry out, in order."""

    ticket: Ticket
    peer: PeerKey
    pair: Pair
    num_units: int
    deadline: float
    max_write: int
    lease_s: float
    expires: float  # unless the peer is heard from before
    advanced: float  # when it last advanced
    mark: int = 0  # grows as it advances; sent to the peer
    peer_mark: int = 0
    worked: int = 0  # what the worker as a whole had done when this ticket last advanced while it waited
    grant: Grant | None = None
    blocks: dict[int, int] = field(default_factory=dict)  # block index in the prompt -> source block, once pushed
    pending: deque[_Pending] = field(default_factory=deque)
    writing: int = 0  # writes handed out and not yet ended
    pushed: dict[int, int] = field(default_factory=dict)  # layer -> how many granted units were pushed
    written_bytes: int = 0
    resent: set[int] = field(default_factory=set)  # numbers of the RESENDs that were accepted
    note: bytes | None = None  # set when all was pushed, until WRITTEN is sent
    finished_at: float | None = None  # when all was pushed
    over: bool = False  # failed or released: no new write begins
    ended: bool = False  # OpDone was told
    farewell: Abort | AbortAck | None = None  # the receiver's proof, sent once the last write has ended

    def advance(self, now: float) -> None:
        self.advanced = now
        self.mark += 1

    @property
    def waits(self) -> bool:
        """Whether it waits for the engine to compute it, or for a link that is busy with other tickets."""
        to_come = self.finished_at is None or bool(self.pending)
        return self.grant is not None and not self.writing and to_come

    @property
    def granted_bytes(self) -> int:
        """Over all layers."""
        assert self.grant is not None
        return max(0, self.num_units - self.grant.first_unit) * len(self.pair.layers) * self.pair.unit_bytes

    @cached_property
    def units_per_block(self) -> tuple[int, int]:
        """(of the source, of the destination)"""
        return self.pair.src.block_size // self.pair.unit, self.pair.dst.block_size // self.pair.unit

    @cached_property
    def most_units(self) -> int:
        """Units of one write, over all its layers."""
        return max(1, min(self.max_write // self.pair.unit_bytes, MAX_DIGESTS // len(self.pair.heads)))

    # ---- what the worker does

    def push(self, layer: int, first: int, blocks: Sequence[int]) -> list[OutboundEffect]:
        if self.over or self.grant is None or layer not in self.pair.layers:
            return []
        if first + len(blocks) - 1 not in self.blocks:  # else they are known from another layer
            self.blocks.update(enumerate(blocks, first))
        per_block, granted = self.units_per_block[0], self.grant.first_unit
        start = max(first * per_block - granted, self.pushed.get(layer, 0))
        end = min((first + len(blocks)) * per_block, self.num_units) - granted
        if end <= start:
            return []
        self.pushed[layer] = end
        return self._add(layer, start, end - start)

    def finish(self, note: bytes, now: float) -> list[OutboundEffect]:
        if self.over:
            return []
        self.note, self.finished_at = note, now
        self.advance(now)
        return self._say_if_written(now)

    def give_up(self, error: TercetError) -> list[OutboundEffect]:
        return self.fail(error, Abort(self.ticket, error.code(), str(error)))

    # ---- what its links do

    def next_write(self) -> Write:
        self.writing += 1
        return self._write_of(self._cut())

    def end_write(self, write: Write, now: float) -> list[OutboundEffect]:
        self.writing -= 1
        if self.over:
            return self._settle()
        self.advance(now)
        if write.resend == 0:
            self.written_bytes += write.layers * write.src.count * self.pair.unit_bytes
        return self._say_if_written(now)

    # ---- what its peer says

    def granted(self, grant: Grant, now: float) -> list[OutboundEffect]:
        self.advance(now)
        missing = max(0, self.num_units - grant.first_unit)
        if len(grant.blocks) != -(-missing // self.units_per_block[1]):
            return self.give_up(TransferError("the grant does not fit the prompt"))
        self.grant = grant
        return [Granted(self.ticket, grant.first_unit // self.units_per_block[0])]

    def resend(self, asked: Resend, now: float) -> list[OutboundEffect]:
        """Write one unit again; its source block is kept until the RELEASE."""
        self.advance(now)
        if self.grant is None:
            return self.give_up(TransferError("a unit was asked for again before any was granted"))
        block = (self.grant.first_unit + asked.index) // self.units_per_block[0]
        if block not in self.blocks or asked.layer not in self.pair.layers:
            return self.give_up(TransferError(f"unit {asked.index} was asked for again, but never written"))
        self.resent.add(asked.number)
        self.pending.appendleft(_Pending(asked.layer, asked.index, 1, resend=asked.number))
        return [Ready(self.peer)]

    def release(self) -> list[OutboundEffect]:
        self.over = True
        return [Released(self.ticket, self.written_bytes), *self._settle()]

    def heartbeat(self, mark: int, now: float) -> None:
        self.expires = now + self.lease_s
        if mark > self.peer_mark:
            self.peer_mark, self.advanced = mark, now  # not our own mark: the two would echo forever

    def fail(self, error: TercetError, farewell: Abort | AbortAck | None) -> list[OutboundEffect]:
        self.farewell = farewell or self.farewell
        if self.over:
            return self._settle()
        self.over = True
        return [SendFailed(self.ticket, error), *self._settle()]

    # ---- time

    def tick(self, now: float, worked: int) -> list[OutboundEffect]:
        """worked: the worker's progress as a whole, which counts as this ticket's while it waits."""
        if self.waits and self.worked != worked:
            self.worked = worked
            self.advance(now)
        if self.over:
            return [Cut(self.peer)] if self.writing and self.expires < now else []
        if min(self.expires, self.advanced + self.lease_s) >= now:
            return []
        error = self._expired(now)
        self.expires = now + self.lease_s  # time for a write that may be under way
        return self.give_up(error)

    def _expired(self, now: float) -> LeaseExpired:
        name, lease = self.ticket.request_id, f"for {self.lease_s:g} s"
        if self.expires < now:
            return LeaseExpired(f"no word of {name} from its decode worker {lease}")
        if self.grant is None:
            return LeaseExpired(f"the decode worker of {name} has granted nothing {lease}")
        written = f"{self.written_bytes} of {self.granted_bytes} KV bytes are written"
        return LeaseExpired(f"the handover of {name} has not advanced {lease}: {written}")

    # ---- transitions

    def _add(self, layer: int, unit: int, units: int) -> list[OutboundEffect]:
        """Coalesce a layer with the pending ones before it, if they fit one write."""
        last = self.pending[-1] if self.pending else None
        if (
            last is not None
            and (last.unit, last.units, last.layer + last.layers, last.resend) == (unit, units, layer, 0)
            and (last.layers + 1) * units <= self.most_units
        ):
            last.layers += 1
            return []
        self.pending.append(_Pending(layer, unit, units))
        return [] if last else [Ready(self.peer)]  # links wait only while nothing is pending

    def _cut(self) -> _Pending:
        """Take the first pending write, or as much of it as is within the limit."""
        first, most = self.pending[0], self.most_units
        if first.units <= most:
            return self.pending.popleft()
        part = replace(first, units=most)
        first.unit, first.units = first.unit + most, first.units - most
        return part

    def _write_of(self, what: _Pending) -> Write:
        assert self.grant is not None
        from_, to = self.units_per_block
        end = what.unit + what.units
        start = self.grant.first_unit + what.unit
        sources = [self.blocks[n] for n in range(start // from_, -(-(start + what.units) // from_))]
        src = Units(sources, start % from_, what.units)
        dst = Units(self.grant.blocks[what.unit // to : -(-end // to)], what.unit % to, what.units)
        return Write(self.ticket, what.layer, what.layers, what.unit, src, dst, what.resend)

    def _say_if_written(self, now: float) -> list[OutboundEffect]:
        if self.note is None or self.pending or self.writing:
            return []
        assert self.finished_at is not None
        if self.written_bytes != self.granted_bytes:
            counted = f"{self.written_bytes} KV bytes were written, {self.granted_bytes} were granted"
            name = self.ticket.request_id
            return self.give_up(TransferError(f"the handover of {name} is not whole: {counted}"))
        written = Written(self.ticket, self.written_bytes, now - self.finished_at, self.note)
        self.note = None
        return [Send(self.peer, written)]

    def _settle(self) -> list[OutboundEffect]:
        """OpDone, and the proof for the receiver, once no write of the ticket is left."""
        self.pending.clear()
        if self.writing or self.ended:
            return []
        self.ended = True
        farewell = [Send(self.peer, self.farewell)] if self.farewell is not None else []
        return [*farewell, OpDone(self.ticket)]
