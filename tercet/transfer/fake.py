"""A link between one Outbound and one Inbound in which every step is chosen by the caller: what is delivered next, what
is duplicated, dropped or never comes, when the writer writes, who dies. No threads, no sockets, no clock.

It checks what no other transport can: a write into a block that is not leased to the write's ticket, and a read of a
source block after OpDone, raise AssertionError at the step that does it.

    link = FakeLink(one_sided=True, source_blocks=8, destination_blocks=8)
    link.admit(ticket, [2, 3]); link.open(ticket, [0, 1])
    while (choices := link.choices()): link.take(choices[rng])
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from tercet.errors import TercetError
from tercet.transfer import inbound as receiving
from tercet.transfer import outbound as sending
from tercet.transfer.effects import Send
from tercet.transfer.inbound import Inbound
from tercet.transfer.messages import Commit, Data, Message, Ticket
from tercet.transfer.outbound import Outbound

LAYERS = 2
LEASE_S = 10.0
PREFILL, DECODE = "prefill", "decode"  # the peers' names for each other


class FakeLink:
    """`events` are what the two state machines reported, in order."""

    def __init__(self, *, one_sided: bool, epoch: int = 1) -> None:
        self.one_sided = one_sided
        self.now = 0.0
        self.inbound = Inbound(epoch, LAYERS, block_bytes=1, lease_s=LEASE_S, integrity=True)
        self.outbound = Outbound(block_bytes=1, lease_s=LEASE_S)
        self.events: list[object] = []
        self.leased: dict[int, Ticket] = {}  # destination block -> the ticket that may be written into it
        self.reading: dict[Ticket, list[int]] = {}  # ticket -> its source blocks, until OpDone
        self.written: dict[tuple[Ticket, int, int], int] = {}  # (ticket, layer, destination block) -> source block
        self.writer: deque[Message | sending.Write | sending.Seal] = deque()
        self.to_decode: list[Message] = []  # on the wire, in any order
        self.to_prefill: list[Message] = []

    # ---- the two workers' verbs

    def admit(self, ticket: Ticket, blocks: list[int], first_block: int = 0) -> None:
        assert not set(blocks) & set(self.leased), "a block was leased twice"
        self.leased |= dict.fromkeys(blocks, ticket)
        self._receiver(self.inbound.admit(ticket, first_block, blocks, self.now))

    def open(self, ticket: Ticket, blocks: list[int]) -> None:
        self.reading[ticket] = blocks
        self._sender(self.outbound.open(ticket, DECODE, len(blocks), self.now))

    def push(self, ticket: Ticket, layer: int) -> None:
        self._sender(self.outbound.push(ticket, layer, 0, self.reading[ticket]))

    def commit(self, ticket: Ticket) -> None:
        commit = Commit(ticket, 0, 0, 1, None, [], [], 0, 0.0, 0.0, 0.0, "fake")
        self._sender(self.outbound.commit(commit, self.now))

    def cancel_inbound(self, ticket: Ticket) -> None:
        self._receiver(self.inbound.cancel(ticket, TercetError("cancelled at the decode worker")))

    def cancel_outbound(self, ticket: Ticket) -> None:
        self._sender(self.outbound.cancel(ticket, TercetError("cancelled at the prefill worker")))

    # ---- the world's moves

    def choices(self) -> list[Callable[[], None]]:
        """Everything that may happen next without time passing: any delivery, or the writer's next item."""
        moves: list[Callable[[], None]] = [
            lambda m=m: self._deliver(self.to_decode, m)  # type: ignore[misc]
            for m in self.to_decode
        ]
        moves += [lambda m=m: self._deliver(self.to_prefill, m) for m in self.to_prefill]  # type: ignore[misc]
        return [*moves, self._write_next] if self.writer else moves

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

    def prefill_dies(self) -> None:
        """The process is gone with all its state: nothing of it writes again, and the decode worker has proof."""
        self.outbound = Outbound(block_bytes=1, lease_s=LEASE_S)
        self.reading.clear()
        self.writer.clear()
        self.to_decode.clear()
        self._receiver(self.inbound.peer_down(PREFILL, self.now))
        self._receiver(self.inbound.peer_dead(PREFILL))

    def decode_dies(self) -> None:
        self.to_prefill.clear()
        self._sender(self.outbound.peer_down(DECODE))

    # ---- carrying things out

    def _deliver(self, wire: list[Message], message: Message) -> None:
        wire.remove(message)
        if wire is self.to_prefill:
            self._sender(self.outbound.on_message(DECODE, message, self.now))
        elif isinstance(message, Data):
            self._land(message)
        else:
            self._receiver(self.inbound.on_message(PREFILL, self.one_sided, message, self.now))

    def _land(self, data: Data) -> None:
        blocks = self.inbound.begin_landing(PREFILL, data)
        if blocks is None:
            return
        if not self.one_sided:
            self._place(data, blocks, [-1] * len(blocks))
        digests = [_digest(data.layer, data.index + i) for i in range(len(blocks))]
        self._receiver(self.inbound.end_landing(data, digests, self.now))

    def _write_next(self) -> None:
        item = self.writer.popleft()
        if isinstance(item, sending.Seal):
            self._sender(self.outbound.seal(item, self.now), behind=True)
        elif isinstance(item, sending.Write):
            self._write(item)
        else:
            self.to_decode.append(item)

    def _write(self, write: sending.Write) -> None:
        data, digests = write.data, None
        if self.outbound.begin_write(data):
            assert data.ticket in self.reading, f"source blocks of {data.ticket} were read after OpDone"
            if self.one_sided:
                self._place(data, list(write.destinations), list(write.blocks))
            self.to_decode.append(data)
            digests = [_digest(data.layer, data.index + i) for i in range(data.count)]
        self._sender(self.outbound.end_write(data, digests))

    def _place(self, data: Data, blocks: list[int], sources: list[int]) -> None:
        for block, source in zip(blocks, sources, strict=True):
            owner = self.leased.get(block)
            assert owner == data.ticket, f"{data.ticket} wrote into block {block}, which is {owner}'s"
            self.written[data.ticket, data.layer, block] = source

    def _receiver(self, effects: list[receiving.Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self.to_prefill.append(effect.message)
            elif isinstance(effect, receiving.Complete | receiving.Quiesced):
                self.events.append(effect)
                self.leased = {b: t for b, t in self.leased.items() if t != effect.ticket}
            elif not isinstance(effect, receiving.Cut):
                self.events.append(effect)

    def _sender(self, effects: list[sending.Effect], *, behind: bool = False) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                if behind:  # sealed on the writer, so sent in its turn
                    self.to_decode.append(effect.message)
                else:
                    self.writer.append(effect.message)
            elif isinstance(effect, sending.Write | sending.Seal):
                self.writer.append(effect)
            else:
                self.events.append(effect)
                if isinstance(effect, sending.OpDone):
                    del self.reading[effect.ticket]


def _digest(layer: int, index: int) -> int:
    return (layer + 1) * 1_000_003 + index
