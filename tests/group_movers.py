"""Two groups of ranks of which one hands KV over to the other. What is done to them and heard of them is as with a pair
of single ranks (tests/movers.py), and an oracle says what must lie in the caches of all ranks."""

from __future__ import annotations

import asyncio
import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tercet.core import Ticket
from tercet.distributed.place import Place
from tercet.engine.replicas import replica_of
from tercet.roles.joint import JointReceiver, JointSender
from tercet.transfer.memory.layout import KvLayout
from tercet.transfer.protocol.facts import Complete, Granted, Noted, OpDone, Released
from tercet.transfer.transports.contract import Transport
from tercet.transfer.transports.group_endpoint import GroupEndpoint, meets
from tests.group_ranks import WHOLE, Seat, Side, content_of, layout_at, rows_of, share_of
from tests.movers import CLASSES, NOTE, Pair, names

MARK = 0xEE  # of memory that is nobody's
LONG = 60.0  # a lease that nothing waits for
# WHOLE has two heads: of four tensor ranks two hold each.
SHAPES = {
    "TP 2 to 1": (Place(tensor=2), Place()),
    "PP 2 to TP 2": (Place(pipeline=2), Place(tensor=2)),
    "1 to TP 4": (Place(), Place(tensor=4)),
    "TP 4 to 1": (Place(tensor=4), Place()),
    "TP 4 to TP 4": (Place(tensor=4), Place(tensor=4)),
    "data 2 to TP 2": (Place(data=2), Place(tensor=2)),
    "PP 2 to data 2": (Place(pipeline=2), Place(data=2)),
}

HOST = [param for param in names() if not CLASSES[param.values[0]].in_device_memory]
FAST = {("shm", "PP 2 to TP 2"), ("tcp", "1 to TP 4")}
# Every shape by two transports, one shape by all; `make test` takes some of them.
COMBINATIONS = [
    pytest.param(
        name := param.values[0],
        shape,
        marks=[*param.marks, *([] if (name, shape) in FAST else [pytest.mark.slow])],
    )
    for param, shape in itertools.product(HOST, SHAPES)
    if param.values[0] in ("shm", "tcp") or shape == "PP 2 to TP 2"
]


def eventually(true: Callable[[], Any], seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while not (held := bool(true())) and time.monotonic() < until:
        time.sleep(0.005)
    return held


class GroupPair(Pair):
    def __init__(
        self,
        transport: str,
        source: Place,
        destination: Place,
        there: KvLayout = WHOLE,
        ways: Mapping[int, Transport] | None = None,
        apart: Mapping[bool, Collection[int]] | None = None,
        **changes: Any,
    ) -> None:
        """ways: rank of the source -> how it moves KV, if not as usual. apart: of the source (True) and of the
        destination, ranks that get a process of their own."""
        changes = {"lease_s": LONG} | changes
        self.loop, ways, apart, usual = asyncio.new_event_loop(), ways or {}, apart or {}, CLASSES[transport]
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        sends, gets = Seat(True, transport, source, WHOLE, changes), Seat(False, transport, destination, there, changes)
        self.p = Side(sends, self.loop, lambda rank: ways.get(rank) or usual(), apart.get(True, ()))
        self.d = Side(gets, self.loop, lambda _: usual(), apart.get(False, ()))
        self.source, self.sent, self.events = self.p.region, self.p.events, self.d.events
        self.sender = self.p.joint = JointSender(
            partial(sends.sender, self.p.region, ways.get(0) or usual()),
            self.p.places,
            self.p.layouts,
            self.loop,
            self.sent.put,
            [*self.p.talks.values()],
        )
        self.mover = self.d.joint = JointReceiver(
            partial(gets.receiver, self.d.region, usual()),
            self.d.places,
            self._sources(),
            self.loop,
            self.events.put,
            [*self.d.talks.values()],
        )
        ranks = self.mover.start("127.0.0.1").encode(), *(self.d.endpoints[rank] for rank in self.d.talks)
        self.endpoint = GroupEndpoint(destination.tensor, destination.pipeline, destination.data, ranks).encode()
        self.wipe()

    def _sources(self) -> dict[int, int]:
        """Rank of the destination -> from how many ranks of a replica of the source KV comes to it."""
        senders = [self.p.layouts[place.rank] for place in self.p.places if place.data_rank == 0]
        return {rank: sum(meets(src, dst) for src in senders) for rank, dst in enumerate(self.d.layouts)}

    # ---- verbs

    def push(self, ticket: Ticket, layer: int, blocks: Sequence[int]) -> None:
        for rank in self.p.ranks_of(ticket):
            self.push_at(rank, ticket, layer, 0, blocks)

    def push_at(self, rank: int, ticket: Ticket, layer: int, first: int, blocks: Sequence[int]) -> None:
        """As the rank does when it has computed it."""
        if rank == 0:
            self.sender.push(ticket, layer, first, blocks)
        else:
            self.p.talks[rank].tell("push", ticket, layer, first, blocks)

    def push_all_at(self, rank: int, ticket: Ticket, blocks: Sequence[int]) -> None:
        for layer in self.p.layouts[rank].window:
            self.push_at(rank, ticket, layer, 0, blocks)

    def push_all(self, ticket: Ticket, blocks: Sequence[int]) -> None:
        for rank in reversed(self.p.ranks_of(ticket)):
            self.push_all_at(rank, ticket, blocks)
        self.sender.finish(ticket, NOTE)

    def hand_over(self, ticket: Ticket, tokens: int, source: Sequence[int], first: int, blocks: Sequence[int]) -> None:
        """Of the prompt's tokens, from the destination's block `first` on, with all facts and every byte as they must
        be."""
        self.mover.admit(ticket, first, blocks)
        self.sender.open(ticket, self.endpoint, tokens, time.monotonic() + 60)
        granted = Granted(ticket, first * self.d.layouts[0].block_size // WHOLE.block_size)
        assert self.sent.get(timeout=10) == granted
        self.push_all(ticket, source)
        assert self.next(Noted) == Noted(ticket, NOTE)
        num_bytes = self.expect(ticket, tokens, source, first, blocks)
        assert self.next(Complete).num_bytes == num_bytes
        assert self.sent.get(timeout=10) == Released(ticket, num_bytes)
        assert self.sent.get(timeout=10) == OpDone(ticket)
        assert self.untouched()
        assert self.live() == []

    def until(self, events: queue.Queue[Any], last: type, but: tuple[type, ...] = ()) -> list[Any]:
        """Events up to one of this kind, without those of other kinds."""
        heard = [events.get(timeout=20)]
        while not isinstance(heard[-1], last):
            heard.append(events.get(timeout=20))
        return [event for event in heard if not isinstance(event, but)]

    def stall(self) -> None:
        for mover in self.p.movers.values():
            mover._computed = lambda: 7

    def leave(self) -> None:
        """One rank that sends does."""
        self.p.movers[self.senders()[-1]].stop()

    # ---- what is so

    @staticmethod
    def last_sender(source: Place, destination: Place, ticket: Ticket) -> int:
        """The last rank of the ticket's replica of the source that has something for the destination."""
        dst = [layout_at(WHOLE, destination.of(rank)) for rank in range(destination.ranks)]
        own = [source.of(rank) for rank in range(source.ranks)]
        own = [place for place in own if place.data_rank == replica_of(ticket, source.data)]
        return max(place.rank for place in own if any(meets(layout_at(WHOLE, place), each) for each in dst))

    def side(self, sends: bool) -> Side:
        return self.p if sends else self.d

    def senders(self) -> list[int]:
        """Ranks that have a ticket on its way."""
        return [rank for rank, mover in self.p.movers.items() if mover.live()]

    def live(self) -> list[Ticket]:
        movers = [*self.p.movers.values(), *self.d.movers.values()]
        joints = [*self.sender._joints, *self.mover._joints]
        return [*joints, *(ticket for mover in movers for ticket in mover.live())]

    def wipe(self, value: int = 0) -> None:
        self.expected = {}
        for rank, region in self.d.regions.items():
            region.view[:] = bytes([value]) * len(region.view)
            self.expected[rank] = np.full(len(region.view), value, dtype=np.uint8)

    def untouched(self) -> bool:
        """But for what is expected."""
        return all(bytes(self.d.regions[rank].view) == memory.tobytes() for rank, memory in self.expected.items())

    def expect(self, ticket: Ticket, tokens: int, source: Sequence[int], first: int, blocks: Sequence[int]) -> int:
        """A handover of the prompt's tokens, from the destination's block `first` on. -> its bytes."""
        num_bytes = 0
        for rank, rows, content in self._landing(ticket, tokens, source, first, blocks):
            memory = self.expected[rank].reshape(-1, WHOLE.row_bytes)
            memory[rows] = 0 if content is None else content
            num_bytes += 0 if content is None else content.size
        return num_bytes

    def holds(self, ticket: Ticket, tokens: int, source: Sequence[int], first: int, blocks: Sequence[int]) -> bool:
        """Whether it has landed, whatever may lie elsewhere."""
        memories = {rank: np.frombuffer(region.view, dtype=np.uint8) for rank, region in self.d.regions.items()}
        return all(
            np.array_equal(memories[rank].reshape(-1, WHOLE.row_bytes)[rows], content)
            for rank, rows, content in self._landing(ticket, tokens, source, first, blocks)
            if content is not None
        )

    def _landing(
        self, ticket: Ticket, tokens: int, source: Sequence[int], first: int, blocks: Sequence[int]
    ) -> Iterator[tuple[int, NDArray[np.intp], NDArray[np.uint8] | None]]:
        """(rank, which rows of its memory, what comes to lie there); None: zeroes, behind the prompt's last unit."""
        content = content_of(WHOLE, replica_of(ticket, self.p.places[0].data))
        for rank in set(self.d.ranks_of(ticket)) & self.d.regions.keys():
            layout = self.d.layouts[rank]
            unit, rows, share = (
                math.gcd(WHOLE.block_size, layout.block_size),
                rows_of(layout),
                share_of(content, layout),
            )
            for at, block in enumerate(blocks, first):
                for within in range(layout.block_size):
                    token = at * layout.block_size + within
                    from_, there = divmod(token, WHOLE.block_size), rows[:, block, :, :, within]
                    sent = token < -(-tokens // unit) * unit
                    yield rank, there, share[:, source[from_[0]], :, :, from_[1]] if sent else None

    def stop(self) -> None:
        self.p.stop()
        self.d.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
