"""A link between one Outbound and one Inbound in which every step is chosen by the caller: what is delivered next, what
is duplicated, dropped, corrupted or never comes, when a write begins and ends, who dies. No threads, no sockets; the
clock moves only by `pass_time`. So a seed replays exactly.

It checks what no other transport can, at the step that breaks it, by AssertionError: a write into a block that is not
leased to the write's ticket, a read of a source block after OpDone, corrupt KV that counts as complete.

    link = FakeLink(one_sided=True)
    link.admit(ticket, [2, 3]); link.open(ticket, [0, 1])
    while (choices := link.choices()): link.take(choices[rng])
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from tercet.core import Ticket
from tercet.errors import TercetError
from tercet.transfer.memory.layout import KvLayout, Pair
from tercet.transfer.protocol.arrivals import Landing
from tercet.transfer.protocol.effects import Cut, Send
from tercet.transfer.protocol.facts import Complete, OpDone, Quiesced
from tercet.transfer.protocol.inbound import Inbound
from tercet.transfer.protocol.incoming import InboundEffect, Terms
from tercet.transfer.protocol.messages import Data, Message
from tercet.transfer.protocol.outbound import Outbound
from tercet.transfer.protocol.outgoing import OutboundEffect, Ready, Write

LAYERS = 2
LEASE_S = 10.0
LINKS = 2  # writes that may be under way at once
PREFILL, DECODE = "prefill", "decode"  # the peers' names for each other
LAYOUT = KvLayout(LAYERS, blocks=64, block_size=1, kv_heads=1, head_dim=1, dtype="int8", parts=1)
Move = Callable[[], None]


class FakeLink:
    """`events` are what the two state machines reported, in order."""

    def __init__(self, *, one_sided: bool, fenceable: bool = False, epoch: int = 1) -> None:
        self.terms = Terms(Pair(LAYOUT, LAYOUT), one_sided, fenceable)
        self.now = 0.0
        self.inbound = Inbound(epoch, LEASE_S)
        self.outbound = Outbound(LEASE_S)
        self.events: list[object] = []
        self.leased: dict[int, Ticket] = {}  # destination block -> the ticket that may be written into it
        self.granted: dict[Ticket, list[int]] = {}  # ticket -> its destination blocks, for the check at Complete
        self.reading: dict[Ticket, list[int]] = {}  # ticket -> its source blocks, until OpDone
        self.memory: dict[tuple[int, int], object] = {}  # (layer, destination block) -> what stands there
        self.flips = 0  # so many of the next units arrive corrupt
        self.writes: list[Write] = []  # under way
        self.landings: list[tuple[Data, Landing]] = []  # under way
        self.to_decode: list[Message] = []  # on the wire, in any order
        self.to_prefill: list[Message] = []

    # ---- the two workers' verbs

    def admit(self, ticket: Ticket, blocks: list[int], first_block: int = 0) -> None:
        assert not set(blocks) & set(self.leased), "a block was leased twice"
        self.leased |= dict.fromkeys(blocks, ticket)
        self.granted[ticket] = blocks
        self._receiver(self.inbound.admit(ticket, first_block, blocks, self.now))

    def open(self, ticket: Ticket, blocks: list[int]) -> None:
        self.reading[ticket] = blocks
        deadline = self.now + 60.0
        self._sender(self.outbound.open(ticket, {DECODE: self.terms.pair}, len(blocks), deadline, self.now))

    def push(self, ticket: Ticket, layer: int) -> None:
        self._sender(self.outbound.push(ticket, layer, 0, self.reading[ticket]))

    def finish(self, ticket: Ticket) -> None:
        self._sender(self.outbound.finish(ticket, b"note", self.now))

    def cancel_inbound(self, ticket: Ticket) -> None:
        self._receiver(self.inbound.cancel(ticket, TercetError("cancelled at the decode worker")))

    def cancel_outbound(self, ticket: Ticket) -> None:
        self._sender(self.outbound.cancel(ticket, TercetError("cancelled at the prefill worker")))

    # ---- the world's moves

    def choices(self) -> list[Move]:
        """Everything that may happen next without time passing."""
        moves: list[Move] = [partial(self._deliver, self.to_decode, m) for m in self.to_decode]
        moves += [partial(self._deliver, self.to_prefill, m) for m in self.to_prefill]
        moves += [partial(self._end_write, write) for write in self.writes]
        moves += [partial(self._end_landing, *landing) for landing in self.landings]
        if len(self.writes) < LINKS and self.outbound.has_pending(DECODE):
            moves.append(self._begin_write)
        return moves

    def duplicate(self, number: int) -> None:
        wire = self.to_decode if number % 2 else self.to_prefill
        if wire:
            wire.append(wire[number % len(wire)])

    def drop(self, number: int) -> None:
        wire = self.to_decode if number % 2 else self.to_prefill
        if wire:
            del wire[number % len(wire)]

    def pass_time(self, seconds: float, *, heartbeats: bool) -> None:
        self.now += seconds
        if heartbeats:
            self._receiver(self.inbound.heartbeats())
            self._sender(self.outbound.heartbeats())
        self._receiver(self.inbound.tick(self.now))
        self._sender(self.outbound.tick(self.now))

    def break_connection(self) -> None:
        """Both ends see it. What is under way on a fenceable link ends with it; a mapping outlives it."""
        self.to_decode.clear()
        self.to_prefill.clear()
        for data, _ in list(self.landings):
            self._cut_landing(data)
        self._receiver(self.inbound.peer_down(PREFILL))
        if not self.terms.one_sided or self.terms.fenceable:
            for write in list(self.writes):
                self.writes.remove(write)
                self._sender(self.outbound.end_write(DECODE, write, self.now))
            self._receiver(self.inbound.peer_dead(PREFILL))
        self._sender(self.outbound.peer_down(DECODE))

    def prefill_dies(self) -> None:
        """The process is gone with all its state: nothing of it writes again, and the decode worker has proof."""
        self.outbound = Outbound(LEASE_S)
        self.reading.clear()
        self.writes.clear()
        self.to_decode.clear()
        for data, _ in list(self.landings):
            self._cut_landing(data)
        self._receiver(self.inbound.peer_down(PREFILL))
        self._receiver(self.inbound.peer_dead(PREFILL))

    def decode_dies(self) -> None:
        self.to_prefill.clear()
        for write in list(self.writes):  # its socket is gone
            self.writes.remove(write)
            self._sender(self.outbound.end_write(DECODE, write, self.now))
        self._sender(self.outbound.peer_down(DECODE))

    # ---- carrying things out

    def _deliver(self, wire: list[Message], message: Message) -> None:
        wire.remove(message)
        if wire is self.to_prefill:
            self._sender(self.outbound.on_message(DECODE, message, self.now))
        elif not isinstance(message, Data):
            self._receiver(self.inbound.on_message(PREFILL, self.terms, message, self.now))
        elif (landing := self.inbound.begin_landing(PREFILL, message)) is not None:
            self.landings.append((message, landing))

    def _end_landing(self, data: Data, landing: Landing) -> None:
        self.landings.remove((data, landing))
        if not self.terms.one_sided:
            self._place(data.ticket, data.layer, data.layers, data.index, list(landing.units.blocks))
        good = np.array(
            [
                [
                    self.memory.get((layer, block)) == _content(data.ticket, layer, data.index + n)
                    for n, block in enumerate(landing.units.blocks)
                ]
                for layer in range(data.layer, data.layer + data.layers)
            ]
        )
        self._receiver(self.inbound.end_landing(PREFILL, data, good, self.now))

    def _cut_landing(self, data: Data) -> None:
        self.landings = [landing for landing in self.landings if landing[0] is not data]
        self._receiver(self.inbound.end_landing(PREFILL, data, None, self.now))

    def _begin_write(self) -> None:
        write = self.outbound.next_write(DECODE)
        if write is not None:
            self.writes.append(write)

    def _end_write(self, write: Write) -> None:
        self.writes.remove(write)
        assert write.ticket in self.reading, f"source blocks of {write.ticket} were read after OpDone"
        if self.terms.one_sided:
            self._place(write.ticket, write.layer, write.layers, write.index, list(write.dst.blocks))
        data = Data(write.ticket, write.layer, write.layers, write.index, write.src.count, write.resend, False, b"")
        self.to_decode.append(data)
        self._sender(self.outbound.end_write(DECODE, write, self.now))

    def _place(self, ticket: Ticket, first_layer: int, layers: int, index: int, blocks: list[int]) -> None:
        for layer in range(first_layer, first_layer + layers):
            for number, block in enumerate(blocks):
                owner = self.leased.get(block)
                assert owner == ticket, f"{ticket} wrote into block {block}, which is {owner}'s"
                self.memory[layer, block] = _content(ticket, layer, index + number)
                if self.flips:
                    self.flips -= 1
                    self.memory[layer, block] = "corrupt"

    def _receiver(self, effects: list[InboundEffect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self.to_prefill.append(effect.message)
            elif isinstance(effect, Complete | Quiesced):
                self._freed(effect)
            elif isinstance(effect, Cut):
                self.break_connection()
            else:
                self.events.append(effect)

    def _freed(self, effect: Complete | Quiesced) -> None:
        """The decode worker reads the blocks of a complete ticket, and the verified ones of a failed one."""
        self.events.append(effect)
        blocks = self.granted[effect.ticket]
        good = len(blocks) if isinstance(effect, Complete) else effect.verified
        for index, block in enumerate(blocks[:good]):
            for layer in range(LAYERS):
                stands = self.memory.get((layer, block))
                assert stands == _content(effect.ticket, layer, index), f"block {block} holds {stands}"
        self.leased = {b: t for b, t in self.leased.items() if t != effect.ticket}

    def _sender(self, effects: list[OutboundEffect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self.to_decode.append(effect.message)
            elif isinstance(effect, Cut):
                self.break_connection()
            elif not isinstance(effect, Ready):
                self.events.append(effect)
                if isinstance(effect, OpDone):
                    del self.reading[effect.ticket]


def _content(ticket: Ticket, layer: int, unit: int) -> object:
    return (ticket, layer, unit)
