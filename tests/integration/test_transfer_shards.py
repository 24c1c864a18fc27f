"""A ticket with several sources, several destinations, or both, over real sockets: every byte against the oracle of the
layouts, and one side that dies or gives up."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from tercet.errors import TercetError, TransferError
from tercet.transfer.memory.layout import KvLayout, Pair, Units
from tercet.transfer.protocol import facts
from tests.chaos.test_transfer_faults import Writer
from tests.movers import LAYOUT, NOTE, Receiving, Sending, ticket_of
from tests.unit.test_transfer_layout import oracle

WHOLE = replace(LAYOUT, layers=4, model_layers=4, kv_heads=4)
BY_HEADS = [replace(WHOLE, tp_size=2, tp_rank=rank) for rank in (0, 1)]
BY_LAYERS = [replace(WHOLE, layers=2, first_layer=first) for first in (0, 2)]
UNEVEN = [replace(WHOLE, layers=3, order="HND"), replace(WHOLE, layers=1, first_layer=3, block_size=8, blocks=16)]
SMALL = [replace(half, block_size=8, blocks=16) for half in BY_LAYERS]
SHAPES = {
    "2-to-1 by heads": (BY_HEADS, [WHOLE]),
    "2-to-1 by layers": (BY_LAYERS, [WHOLE]),
    "2-to-1 of other kinds": (UNEVEN, [WHOLE]),
    "1-to-2 by heads": ([WHOLE], BY_HEADS),
    "1-to-2 by layers": ([WHOLE], SMALL),
    "2-to-2, each to both": (BY_HEADS, BY_LAYERS),
    "2-to-2, each to one": (BY_HEADS, BY_HEADS),
}
NUM_TOKENS, HITS = 88, 32  # the prompt's, and those that the destinations have; its last block is half empty
each_transport = pytest.mark.parametrize("name", ["shm", "tcp"])


class Group:
    """Senders and receivers of one ticket."""

    def __init__(self, name: str, sources: list[KvLayout], destinations: list[KvLayout]) -> None:
        self.receivers = [Receiving(name, layout) for layout in destinations]
        self.senders = [Sending(name, layout, number) for number, layout in enumerate(sources)]
        for receiver in self.receivers:
            receiver.region.view[:] = b"\xee" * len(receiver.region.view)

    def open(self, hits: int = HITS) -> None:
        for receiver in self.receivers:
            peers = [s for s in self.senders if meet(s, receiver)]
            blocks = self.blocks(receiver.region.layout)[hits // receiver.region.layout.block_size :]
            receiver.mover.admit(ticket_of(), hits // receiver.region.layout.block_size, blocks, sources=len(peers))
        for sender in self.senders:
            sender.open(ticket_of(), [r for r in self.receivers if meet(sender, r)], NUM_TOKENS)
        for sender in self.senders:
            assert sender.next(facts.Granted).first_block == hits // sender.region.layout.block_size

    def push(self, number: int) -> None:
        sender = self.senders[number]
        sender.push_all(ticket_of(), self.blocks(sender.region.layout), b"" if number else NOTE)

    @staticmethod
    def blocks(layout: KvLayout) -> list[int]:
        """Those of the prompt, in any order but ascending."""
        return [(5 * n + 3) % layout.blocks for n in range(-(-NUM_TOKENS // layout.block_size))]

    def expected(self, receiver: Receiving, hits: int) -> tuple[np.ndarray, int]:
        """The destination's memory as the oracle says: the sources' rows, zeroes behind the prompt's last unit, else
        untouched. And how many bytes are the sources'."""
        dst = receiver.region.layout
        memory = np.full(dst.total_bytes, 0xEE, dtype=np.uint8)
        there = Units(self.blocks(dst), 0, 0)
        end, num_bytes = len(self.blocks(dst)) * dst.block_size, 0
        for layer, part, head in itertools.product(dst.window, range(dst.parts), dst.heads):
            (sender,) = [s for s in self.senders if holds(s.region.layout, layer, head)]
            src, source = sender.region.layout, np.frombuffer(sender.region.view, dtype=np.uint8)
            unit, here = Pair(src, dst).unit, Units(self.blocks(src), 0, 0)
            sent = -(-NUM_TOKENS // unit) * unit
            num_bytes += (sent - hits) * dst.row_bytes
            for token in range(hits, end):
                row = source[oracle(src, here, 1, layer, part, head, token)] if token < sent else 0
                memory[oracle(dst, there, 1, layer, part, head, token)] = row
        return memory, num_bytes

    def stop(self) -> None:
        for each in (*self.senders, *self.receivers):
            each.stop()


def holds(layout: KvLayout, layer: int, head: int) -> bool:
    return layer in layout.window and head in layout.heads


def meet(sender: Sending, receiver: Receiving) -> bool:
    src, dst = sender.region.layout, receiver.region.layout
    return any(holds(dst, layer, head) for layer in src.window for head in src.heads)


@pytest.fixture
def group():
    made: list[Group] = []

    def make(*args) -> Group:
        made.append(Group(*args))
        return made[0]

    yield make
    for each in made:
        each.stop()


@each_transport
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("hits", [0, HITS])
def test_every_byte_stands_where_the_oracle_says(group, name, shape, hits):
    made = group(name, *SHAPES[shape])
    made.open(hits)
    for number in reversed(range(len(made.senders))):
        made.push(number)
    for receiver in made.receivers:
        events = [receiver.next(facts.ReceiveEvent)]
        while not isinstance(events[-1], facts.Complete):
            events.append(receiver.next(facts.Noted | facts.Complete))
        notes = [e.note for e in events[:-1]]
        assert notes == ([NOTE] if meet(made.senders[0], receiver) else [])
        memory, num_bytes = made.expected(receiver, hits)
        assert events[-1].num_bytes == num_bytes
        assert np.array_equal(np.frombuffer(receiver.region.view, dtype=np.uint8), memory)
    for sender in made.senders:
        assert sender.next(facts.Released).ticket == ticket_of()
        assert sender.next(facts.OpDone).ticket == ticket_of()
        assert sender.mover.live() == []
    assert not any(receiver.mover.live() for receiver in made.receivers)


@each_transport
def test_one_shard_alone_completes_nothing(group, name):
    made = group(name, BY_HEADS, [WHOLE])
    made.open()
    made.push(0)
    assert made.receivers[0].next(facts.Noted).note == NOTE
    assert made.receivers[0].mover.live() == [ticket_of()]
    made.senders[1].mover.cancel(ticket_of(), TercetError("the second rank failed"))
    assert "the second rank failed" in str(made.receivers[0].next(facts.ReceiveFailed).error)
    made.receivers[0].next(facts.Quiesced)
    for sender in made.senders:
        assert "the second rank failed" in str(sender.next(facts.SendFailed).error)
        sender.next(facts.OpDone)


@each_transport
def test_a_destination_that_fails_ends_the_other_one_too(group, name):
    made = group(name, [WHOLE], BY_HEADS)
    made.open()
    made.senders[0].mover.push(ticket_of(), 0, 0, made.blocks(WHOLE))
    made.receivers[1].mover.cancel(ticket_of(), TercetError("gone"))
    made.senders[0].next(facts.SendFailed)
    made.senders[0].next(facts.OpDone)
    for receiver in made.receivers:
        assert str(receiver.next(facts.ReceiveFailed).error) == "gone"
        receiver.next(facts.Quiesced)


@each_transport
def test_a_destination_that_stops_ends_the_other_one_too(group, name):
    made = group(name, [WHOLE], BY_HEADS)
    made.open()
    made.receivers.pop().stop()
    made.senders[0].next(facts.SendFailed)
    made.senders[0].next(facts.OpDone)
    made.receivers[0].next(facts.ReceiveFailed)
    made.receivers[0].next(facts.Quiesced)


@each_transport
@pytest.mark.parametrize(
    ("sources", "named"),
    [
        ([BY_HEADS[0], BY_HEADS[0]], "of layers 0 to 3, heads 0 to 1 come from several sources"),
        ([BY_LAYERS[0], replace(WHOLE, layers=1, first_layer=3)], "of layers 2 to 2, heads 0 to 3 come from no source"),
    ],
)
def test_sources_that_do_not_fit_each_other_fail_at_once(group, name, sources, named):
    made = group(name, sources, [WHOLE])
    made.receivers[0].mover.admit(ticket_of(), 0, made.blocks(WHOLE), sources=2)
    for sender in made.senders:
        sender.open(ticket_of(), made.receivers, NUM_TOKENS)
    error = made.receivers[0].next(facts.ReceiveFailed, 3.0).error
    assert isinstance(error, TransferError)
    assert named in str(error)
    made.receivers[0].next(facts.Quiesced)


@each_transport
def test_a_source_process_that_dies_midway_fails_the_ticket(name):
    """The other source is told, and the blocks are free when neither can write any more."""
    half = Receiving(name, replace(LAYOUT, layers=6, model_layers=6), lease_s=1.5)
    lower = replace(LAYOUT, model_layers=6)
    dying = Writer(name, layout=lower)
    living = Sending(name, replace(LAYOUT, first_layer=3, model_layers=6), lease_s=1.5)
    try:
        half.mover.admit(ticket_of(), 0, [7, 5, 3, 1], sources=2)
        dying.say("open", ticket_of(), half.endpoint, 64)
        living.open(ticket_of(), [half], 64)
        dying.next("Granted")
        living.next(facts.Granted)
        dying.say("halt")
        dying.say("push_all", ticket_of(), [0, 2, 4, 6])
        dying.next("half")
        living.push_all(ticket_of(), [0, 2, 4, 6], NOTE)
        half.next(facts.Noted)
        dying.process.kill()
        half.next(facts.ReceiveFailed)
        half.next(facts.Quiesced)
        living.next(facts.SendFailed)
        living.next(facts.OpDone)
        assert half.mover.live() == []
    finally:
        dying.end()
        living.stop()
        half.stop()
