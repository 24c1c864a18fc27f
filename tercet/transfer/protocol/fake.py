"""Sources and destinations between which the caller chooses every step: what is delivered next, what is duplicated,
dropped, corrupted or never comes, when a write begins and ends, who dies. No threads, no sockets; the clock
moves only by `pass_time`. So a seed replays exactly.

Each source holds one head and each destination some of the layers, so every source writes to every destination. The
destinations are the ranks of one worker: they lease the same blocks, and their receivers' facts are joined.

It checks what no other transport can, and raises AssertionError at the step that breaks it: a write into a block that
is not leased to the write's ticket, a read of a source block after OpDone, corrupt KV that counts as complete.

    link.admit(ticket, [2, 3]); link.open(ticket, [0, 1])
    while (choices := link.choices()): rng.choice(choices)()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np

from tercet.core import Ticket
from tercet.errors import PeerDown, TercetError
from tercet.transfer.memory.layout import KvLayout, Pair
from tercet.transfer.protocol.arrivals import Landing
from tercet.transfer.protocol.effects import Cut, PeerKey, Send
from tercet.transfer.protocol.facts import (
    Complete,
    OpDone,
    Quiesced,
    ReceiveEvent,
    ReceiveFailed,
    SendEvent,
    SendFailed,
)
from tercet.transfer.protocol.inbound import Inbound
from tercet.transfer.protocol.incoming import InboundEffect, Terms
from tercet.transfer.protocol.messages import Data, Message
from tercet.transfer.protocol.outbound import Outbound
from tercet.transfer.protocol.outgoing import OutboundEffect, Ready, Write
from tercet.transfer.protocol.shards import Cancel, ReceiveJoint

LAYERS = 2
LEASE_S = 10.0
LINKS = 2  # writes that may be under way at once from one source to one destination
Move = Callable[[], None]


def _terms(sources: int, s: int, destinations: int, d: int, one_sided: bool, fenceable: bool) -> Terms:
    whole = KvLayout(LAYERS, blocks=64, block_size=1, kv_heads=sources, head_dim=1, dtype="int8", parts=1)
    layers = LAYERS // destinations
    source = replace(whole, tp_size=sources, tp_rank=s)
    return Terms(Pair(source, replace(whole, layers=layers, first_layer=d * layers)), one_sided, fenceable)


class FakeLink:
    """`s` numbers the sources and `d` the destinations; these are also the peers' names for each other."""

    def __init__(
        self, *, one_sided: bool, fenceable: bool = False, epoch: int = 1, sources: int = 1, destinations: int = 1
    ) -> None:
        self.sources, self.destinations = range(sources), range(destinations)
        self.pairs = list(product(self.sources, self.destinations))
        self.terms = {(s, d): _terms(sources, s, destinations, d, one_sided, fenceable) for s, d in self.pairs}
        self.one_sided, self.fenceable, self.epoch = one_sided, fenceable, epoch
        self.now = 0.0
        self.inbounds = [Inbound(epoch, LEASE_S) for _ in self.destinations]
        self.outbounds = [Outbound(LEASE_S) for _ in self.sources]
        self.sent: list[list[SendEvent]] = [[] for _ in self.sources]  # what each source's worker heard
        self.received: list[ReceiveEvent] = []  # what the destination's worker heard
        self.joints: dict[Ticket, ReceiveJoint] = {}
        self.leased: dict[int, Ticket] = {}  # destination block -> the ticket that may be written into it
        self.blocks: dict[Ticket, list[int]] = {}  # ticket -> its destination blocks, for the check at Complete
        self.reading: list[dict[Ticket, list[int]]] = [{} for _ in self.sources]  # source blocks, until OpDone
        self.memory: dict[tuple[int, int, int], object] = {}  # (layer, head, destination block) -> what stands there
        self.flips = 0  # how many of the next units arrive corrupt
        self.writes: list[tuple[int, int, Write]] = []  # under way
        self.landings: list[tuple[int, int, Data, Landing]] = []  # under way
        self.to_decode: dict[tuple[PeerKey, PeerKey], list[Message]] = {pair: [] for pair in self.pairs}  # in any order
        self.to_prefill: dict[tuple[PeerKey, PeerKey], list[Message]] = {pair: [] for pair in self.pairs}

    @property
    def events(self) -> list[SendEvent | ReceiveEvent]:
        return [*self.received, *(event for sent in self.sent for event in sent)]

    def live(self) -> list[Ticket]:
        """Tickets that any of the state machines still knows."""
        return [t for i in self.inbounds for t in i.live()] + [t for o in self.outbounds for t in o.live()]

    # ---- the workers' verbs

    def admit(self, ticket: Ticket, blocks: list[int], first_block: int = 0) -> None:
        assert not set(blocks) & set(self.leased), "a block was leased twice"
        self.leased |= dict.fromkeys(blocks, ticket)
        self.blocks[ticket] = blocks
        self.joints[ticket] = ReceiveJoint(self.destinations)
        count = len(self.sources)
        admitted = [inbound.admit(ticket, first_block, blocks, self.now, count) for inbound in self.inbounds]
        for d, effects in enumerate(admitted):
            self._receiver(d, effects)

    def open(self, ticket: Ticket, blocks: list[int], s: int = 0) -> None:
        self.reading[s][ticket] = blocks
        pairs: dict[PeerKey, Pair] = {d: self.terms[s, d].pair for d in self.destinations}
        self._sender(s, self.outbounds[s].open(ticket, pairs, len(blocks), self.now + 60.0, self.now))

    def push(self, ticket: Ticket, layer: int, s: int = 0) -> None:
        self._sender(s, self.outbounds[s].push(ticket, layer, 0, self.reading[s][ticket]))

    def finish(self, ticket: Ticket, s: int = 0) -> None:
        """The first source has the note."""
        self._sender(s, self.outbounds[s].finish(ticket, b"" if s else b"note", self.now))

    def cancel_inbound(self, ticket: Ticket) -> None:
        for d in self.destinations:
            self._receiver(d, self.inbounds[d].cancel(ticket, TercetError("cancelled at the decode worker")))

    def cancel_outbound(self, ticket: Ticket, s: int = 0) -> None:
        self._sender(s, self.outbounds[s].cancel(ticket, TercetError("cancelled at the prefill worker")))

    # ---- what may happen next

    def choices(self) -> list[Move]:
        """Everything that may happen next without time passing."""
        moves: list[Move] = []
        for pair in self.pairs:
            moves += [partial(self._deliver_to_decode, *pair, m) for m in self.to_decode[pair]]
            moves += [partial(self._deliver_to_prefill, *pair, m) for m in self.to_prefill[pair]]
        moves += [partial(self._end_write, *write) for write in self.writes]
        moves += [partial(self._end_landing, *landing) for landing in self.landings]
        for s, d in self.pairs:
            if len([w for w in self.writes if w[:2] == (s, d)]) < LINKS and self.outbounds[s].has_pending(d):
                moves.append(partial(self._begin_write, s, d))
        return moves

    def writer_of(self, move: Move) -> int | None:
        """The source whose links make this move."""
        if isinstance(move, partial) and move.func in (self._begin_write, self._end_write):
            return int(move.args[0])
        return None

    def duplicate(self, number: int) -> None:
        wire, at = self._on_a_wire(number)
        wire += wire[at : at + 1]

    def drop(self, number: int) -> None:
        wire, at = self._on_a_wire(number)
        del wire[at : at + 1]

    def _on_a_wire(self, number: int) -> tuple[list[Message], int]:
        """-> a wire, and the index of a message on it; 0 if it has none."""
        wires = [*self.to_prefill.values(), *self.to_decode.values()]
        wire = wires[number % len(wires)]
        return wire, number // len(wires) % len(wire) if wire else 0

    def pass_time(self, seconds: float, *, heartbeats: bool) -> None:
        self.now += seconds
        for d in self.destinations if heartbeats else ():
            self._receiver(d, self.inbounds[d].heartbeats())
        for s in self.sources if heartbeats else ():
            self._sender(s, self.outbounds[s].heartbeats())
        for d in self.destinations:
            self._receiver(d, self.inbounds[d].tick(self.now))
        for s in self.sources:
            self._sender(s, self.outbounds[s].tick(self.now))

    def break_connection(self, s: int = 0, d: int = 0) -> None:
        """Both ends see it. What is under way on a fenceable link ends with it; a mapping outlives it."""
        self._cut_off(s, d)
        self._receiver(d, self.inbounds[d].peer_down(s))
        if not self.one_sided or self.fenceable:
            self._end_writes(s, d)
            self._receiver(d, self.inbounds[d].peer_dead(s))
        self._sender(s, self.outbounds[s].peer_down(d))

    def prefill_dies(self, s: int = 0) -> None:
        """The process is gone with all its state: nothing of it writes again, and the decode worker has proof."""
        self.outbounds[s] = Outbound(LEASE_S)
        self.reading[s].clear()
        self.writes = [write for write in self.writes if write[0] != s]
        for d in self.destinations:
            self._cut_off(s, d)
            self._receiver(d, self.inbounds[d].peer_down(s))
            self._receiver(d, self.inbounds[d].peer_dead(s))

    def decode_dies(self, d: int = 0) -> None:
        """One rank's process is gone with its memory; the group reports it on its behalf."""
        gone, self.inbounds[d] = self.inbounds[d], Inbound(self.epoch, LEASE_S)
        self.landings = [landing for landing in self.landings if landing[1] != d]
        for s in self.sources:
            self._cut_off(s, d)
            self._end_writes(s, d)
            self._sender(s, self.outbounds[s].peer_down(d))
        for ticket in gone.live():
            self._receiver(d, [ReceiveFailed(ticket, PeerDown("a rank is dead")), Quiesced(ticket)])

    # ---- carrying things out

    def _cut_off(self, s: int, d: int) -> None:
        """What was on the wire is lost."""
        self.to_decode[s, d].clear()
        self.to_prefill[s, d].clear()
        for landing in [landing for landing in self.landings if landing[:2] == (s, d)]:
            self.landings.remove(landing)
            self._receiver(d, self.inbounds[d].end_landing(s, landing[2], None, self.now))

    def _end_writes(self, s: int, d: int) -> None:
        for at in [write for write in self.writes if write[:2] == (s, d)]:
            self.writes.remove(at)
            self._sender(s, self.outbounds[s].end_write(d, at[2], self.now))

    def _deliver_to_prefill(self, s: int, d: int, message: Message) -> None:
        self.to_prefill[s, d].remove(message)
        self._sender(s, self.outbounds[s].on_message(d, message, self.now))

    def _deliver_to_decode(self, s: int, d: int, message: Message) -> None:
        self.to_decode[s, d].remove(message)
        if not isinstance(message, Data):
            self._receiver(d, self.inbounds[d].on_message(s, self.terms[s, d], message, self.now))
        elif (landing := self.inbounds[d].begin_landing(s, message)) is not None:
            self.landings.append((s, d, message, landing))

    def _end_landing(self, s: int, d: int, data: Data, landing: Landing) -> None:
        self.landings.remove((s, d, data, landing))
        blocks, layers = landing.units.blocks, range(data.layer, data.layer + data.layers)
        head = self.terms[s, d].pair.heads[0]
        if not self.one_sided:
            self._place(data.ticket, layers, head, data.index, blocks)
        expected = [[(data.ticket, layer, head, data.index + n) for n in range(len(blocks))] for layer in layers]
        found = [[self.memory.get((layer, head, block)) for block in blocks] for layer in layers]
        good = [[a == b for a, b in zip(*rows, strict=True)] for rows in zip(expected, found, strict=True)]
        self._receiver(d, self.inbounds[d].end_landing(s, data, np.array(good), self.now))

    def _begin_write(self, s: int, d: int) -> None:
        write = self.outbounds[s].next_write(d)
        assert write is not None
        assert SendFailed not in [type(e) for e in self.sent[s] if e.ticket == write.ticket], f"{write} is of no use"
        self.writes.append((s, d, write))

    def _end_write(self, s: int, d: int, write: Write) -> None:
        self.writes.remove((s, d, write))
        assert write.ticket in self.reading[s], f"source blocks of {write.ticket} were read after OpDone"
        if self.one_sided:
            layers = range(write.layer, write.layer + write.layers)
            self._place(write.ticket, layers, self.terms[s, d].pair.heads[0], write.index, write.dst.blocks)
        data = Data(write.ticket, write.layer, write.layers, write.index, write.src.count, write.resend, False, b"")
        self.to_decode[s, d].append(data)
        self._sender(s, self.outbounds[s].end_write(d, write, self.now))

    def _place(self, ticket: Ticket, layers: range, head: int, index: int, blocks: Sequence[int]) -> None:
        for layer, (number, block) in product(layers, enumerate(blocks)):
            owner = self.leased.get(block)
            assert owner == ticket, f"{ticket} wrote into block {block}, which is {owner}'s"
            self.memory[layer, head, block] = (ticket, layer, head, index + number)
            if self.flips:
                self.flips -= 1
                self.memory[layer, head, block] = "corrupt"

    def _receiver(self, d: int, effects: list[InboundEffect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self.to_prefill[effect.peer, d].append(effect.message)
            elif not isinstance(effect, Cut):
                self._joined(d, effect)
        for cut in [effect for effect in effects if isinstance(effect, Cut)]:
            assert isinstance(cut.peer, int)
            self.break_connection(cut.peer, d)

    def _joined(self, d: int, event: ReceiveEvent) -> None:
        for effect in self.joints[event.ticket].take(d, event):
            if isinstance(effect, Cancel):
                assert isinstance(effect.part, int)
                self._receiver(effect.part, self.inbounds[effect.part].cancel(event.ticket, effect.error))
            else:
                self.received.append(effect)
            if isinstance(effect, Complete | Quiesced):
                self._freed(effect)

    def _freed(self, effect: Complete | Quiesced) -> None:
        """The decode worker reads the blocks of a complete ticket, and the verified ones of a failed one."""
        blocks = self.blocks[effect.ticket]
        good = len(blocks) if isinstance(effect, Complete) else effect.verified
        for (index, block), layer, head in product(enumerate(blocks[:good]), range(LAYERS), self.sources):
            stands = self.memory.get((layer, head, block))
            assert stands == (effect.ticket, layer, head, index), f"block {block} holds {stands}"
        self.leased = {b: t for b, t in self.leased.items() if t != effect.ticket}

    def _sender(self, s: int, effects: list[OutboundEffect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self.to_decode[s, effect.peer].append(effect.message)
            elif not isinstance(effect, Ready | Cut):
                self.sent[s].append(effect)
                if isinstance(effect, OpDone):
                    del self.reading[s][effect.ticket]
        for cut in [effect for effect in effects if isinstance(effect, Cut)]:
            assert isinstance(cut.peer, int)
            self.break_connection(s, cut.peer)
