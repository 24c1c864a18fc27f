"""One ticket of the receiving half: its sources, and what messages, landings and timeouts do to it.

    opened ──OFFER/GRANT of each source──> granted ──DATA*, WRITTEN of each──> Complete
      │                                      │  └──corrupt: RESEND──┘
      └──cancel, lease, ABORT, sources that ─┴───────────────────────────> Failed(cause) ... Quiesced
         leave a hole or overlap

The sources hold parts of the destination's layers and heads (memory/cover.py). The ticket is complete when every part
is, fails with the first that fails, and is quiet when every source is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tercet.core import Ticket
from tercet.errors import DigestMismatch, LeaseExpired, PeerDown, TercetError, TransferError
from tercet.transfer.memory.cover import flaw
from tercet.transfer.memory.layout import Pair
from tercet.transfer.protocol.arrivals import Arrivals, Landing
from tercet.transfer.protocol.effects import Cut, PeerKey, Send
from tercet.transfer.protocol.facts import Complete, Noted, Quiesced, ReceiveEvent, ReceiveFailed
from tercet.transfer.protocol.messages import Abort, Data, Grant, Release, Resend, Written

MAX_RESENDS = 8  # of one source of a ticket; a link that corrupts more than that is broken

InboundEffect = Send | Cut | ReceiveEvent


@dataclass(frozen=True)
class Terms:
    """What a connection agreed on."""

    pair: Pair
    one_sided: bool  # the writer places the bytes, so it must say, or it must be proven, that it has stopped
    fenceable: bool  # closing our end of the link proves that nothing lands any more


@dataclass
class Source:
    """A peer that has offered the ticket, and how far its part is."""

    peer: PeerKey
    terms: Terms
    num_units: int
    expires: float  # unless it is heard from before
    peer_mark: int = 0
    arrivals: Arrivals | None = None  # set when GRANT was sent
    resends: int = 0
    written: Written | None = None
    written_at: float = 0.0
    done: bool = False  # it writes no more: it said so, or it is proven

    @property
    def granted_bytes(self) -> int:
        return self.arrivals.num_cells * self.terms.pair.unit_bytes if self.arrivals else 0

    @property
    def landed_bytes(self) -> int:
        return self.arrivals.num_landed * self.terms.pair.unit_bytes if self.arrivals else 0

    @property
    def landing(self) -> bool:
        return self.arrivals is not None and self.arrivals.any_landing

    @property
    def stands(self) -> bool:
        """Its whole part was written, has landed, and is verified."""
        return self.written is not None and self.arrivals is not None and self.arrivals.all_landed

    @property
    def quiet(self) -> bool:
        """Whether it is proven that none of its writes can land any more."""
        may_write = self.arrivals is not None and self.terms.one_sided and not self.done
        return not self.landing and not may_write

    @property
    def verified_blocks(self) -> int:
        return self.arrivals.verified_blocks() if self.arrivals else 0


class Incoming:
    """Its methods return effects for the caller to carry out, in order."""

    def __init__(
        self,
        ticket: Ticket,
        first_block: int,
        blocks: Sequence[int],
        num_sources: int,
        lease_s: float,
        now: float,
        mark: int = 0,
    ) -> None:
        """blocks: of the destination, empty on a full prefix hit. mark: the highest that its writers were told."""
        assert num_sources >= 1
        self.ticket = ticket
        self.sources: dict[PeerKey, Source] = {}  # in the order of their offers
        self.failed = False
        self.over = False  # Complete or Quiesced was told
        self._first_block = first_block
        self._blocks = tuple(blocks)
        self._num_sources = num_sources
        self._lease_s = lease_s
        self._offers_due = now + lease_s
        self._advanced = now  # when it last advanced
        self._mark = mark  # grows as it advances; sent to the writers
        self._noted = False
        self._abort: Abort | None = None  # what the writers were told when it failed

    @property
    def _all_here(self) -> bool:
        return len(self.sources) == self._num_sources

    # ---- what happens to it

    def offer(self, source: Source, now: float) -> list[InboundEffect]:
        if source.peer in self.sources:
            return []
        if self._abort is not None:
            return [Send(source.peer, self._abort)]
        if self._all_here:
            error = TransferError(f"{self._num_sources} sources of {self.ticket.request_id} are here already")
            return [Send(source.peer, Abort(self.ticket, error.code(), str(error)))]
        self.sources[source.peer] = source
        source.expires = now + self._lease_s
        self._advance(now)
        return self._grant(source)

    def written(self, source: Source, message: Written, now: float) -> list[InboundEffect]:
        if message.num_bytes != source.granted_bytes:
            source.done = source.resends == 0
            counted = f"{message.num_bytes} KV bytes were written, {source.granted_bytes} were granted"
            return self.fail(TransferError(f"the handover of {self.ticket.request_id} is not whole: {counted}"))
        self._advance(now)
        source.written, source.written_at = message, now
        source.done = source.resends == 0  # no more writes, except units that were asked for again
        if message.note and self._noted:
            return self.fail(TransferError(f"two sources of {self.ticket.request_id} came with a note"))
        noted = [Noted(self.ticket, message.note)] if message.note else []
        self._noted = self._noted or bool(noted)
        return [*noted, *self._complete_if_all_stand(now)]

    def begin_landing(self, peer: PeerKey, data: Data) -> Landing | None:
        source = self.sources.get(peer)
        return source.arrivals.begin(data) if source and source.arrivals and not self.failed else None

    def end_landing(self, peer: PeerKey, data: Data, good: NDArray[np.bool_] | None, now: float) -> list[InboundEffect]:
        source = self.sources[peer]
        assert source.arrivals is not None
        source.arrivals.end(data, good)
        if self.failed:
            return self._settle()
        self._advance(now)
        if good is not None and not good.all():
            return self._fetch_again(source, source.arrivals, data, good)
        return self._complete_if_all_stand(now)

    def heartbeat(self, source: Source, mark: int, now: float) -> None:
        source.expires = now + self._lease_s
        if mark > source.peer_mark:
            source.peer_mark, self._advanced = mark, now  # not our own mark: the two would echo forever

    def writer_done(self, source: Source, error: TercetError | None = None) -> list[InboundEffect]:
        """A source has said, or it is proven, that it writes no more."""
        source.done = True
        return self.fail(error or PeerDown(f"the prefill worker gave {self.ticket.request_id} up"))

    def fail(self, error: TercetError) -> list[InboundEffect]:
        if self.failed:
            return self._settle()
        self.failed = True
        self._abort = Abort(self.ticket, error.code(), str(error))
        told = [Send(peer, self._abort) for peer in self.sources]
        return [ReceiveFailed(self.ticket, error), *told, *self._settle()]

    def tick(self, now: float) -> list[InboundEffect]:
        error = None if self.failed else self._expired(now)
        effects = self.fail(error) if error else []
        silent = [s for s in self.sources.values() if s.expires < now and not s.quiet]
        return effects + [Cut(s.peer) for s in silent if s.landing or s.terms.fenceable]

    # ---- what its writers are told periodically

    def aborts(self) -> list[InboundEffect]:
        """The ABORT once more, for the sources that are not quiet yet."""
        return [Send(s.peer, self._abort) for s in self.sources.values() if self._abort and not s.quiet]

    def mark_for(self, source: Source) -> int:
        """The ticket's progress that `source` does not know of: here and at the other sources."""
        return self._mark + sum(other.peer_mark for other in self.sources.values() if other is not source)

    # ---- transitions

    def _advance(self, now: float) -> None:
        self._advanced = now
        self._mark += 1

    def _grant(self, source: Source) -> list[InboundEffect]:
        pair, blocks = source.terms.pair, self._blocks
        per_block = pair.dst.block_size // pair.unit
        first_unit = self._first_block * per_block
        missing = max(0, source.num_units - first_unit)
        if -(-missing // per_block) != len(blocks):
            return self.fail(TransferError(f"the offer of {source.num_units} units does not fit {len(blocks)} blocks"))
        if wrong := flaw([s.terms.pair for s in self.sources.values()], self._all_here):
            return self.fail(TransferError(f"the KV of {self.ticket.request_id} {wrong}"))
        source.arrivals = Arrivals(pair, blocks, missing)
        return [Send(source.peer, Grant(self.ticket, first_unit, list(blocks)))]

    def _fetch_again(
        self, source: Source, arrivals: Arrivals, data: Data, good: NDArray[np.bool_]
    ) -> list[InboundEffect]:
        """Ask for exactly the units whose digest was wrong."""
        wrong = np.argwhere(~good).tolist()
        if source.resends + len(wrong) > MAX_RESENDS:
            return self.fail(DigestMismatch(f"the KV of {self.ticket.request_id} keeps arriving corrupt"))
        source.done = False
        effects: list[InboundEffect] = []
        for layer, unit in wrong:
            source.resends += 1
            at = (data.layer + layer, data.index + unit)
            arrivals.ask_again(*at, source.resends)
            effects.append(Send(source.peer, Resend(self.ticket, source.resends, *at)))
        return effects

    def _complete_if_all_stand(self, now: float) -> list[InboundEffect]:
        sources = self.sources.values()
        if not self._all_here or not all(source.stands for source in sources):
            return []
        self.over = True
        num_bytes = sum(source.granted_bytes for source in sources)
        transfer_s = max(s.written.transfer_s + now - s.written_at for s in sources if s.written)
        return [
            Complete(self.ticket, num_bytes, transfer_s),
            *[Send(source.peer, Release(self.ticket)) for source in sources],
        ]

    def _settle(self) -> list[InboundEffect]:
        """Quiesced, once every source of this failed ticket is quiet."""
        if self.over or not all(source.quiet for source in self.sources.values()):
            return []
        self.over = True
        verified = min(s.verified_blocks for s in self.sources.values()) if self._all_here else 0
        return [Quiesced(self.ticket, verified)]

    def _expired(self, now: float) -> LeaseExpired | None:
        name, lease = self.ticket.request_id, f"for {self._lease_s:g} s"
        silent = sum(source.expires < now for source in self.sources.values())
        if self._offers_due < now:
            silent += self._num_sources - len(self.sources)
        if silent:
            who = "its prefill worker" if self._num_sources == 1 else f"{silent} of its {self._num_sources} sources"
            return LeaseExpired(f"no word of {name} from {who} {lease}")
        if self._advanced + self._lease_s >= now:
            return None
        granted = sum(source.granted_bytes for source in self.sources.values())
        landed = sum(source.landed_bytes for source in self.sources.values())
        counted = f"{landed} of {granted} KV bytes have landed"
        return LeaseExpired(f"the handover of {name} has not advanced {lease}: {counted}")
