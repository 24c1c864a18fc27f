"""The ranks of a worker that hand KV over: real movers, and real lines from rank 0 to the others, whose side of them is
the product's (roles/rank.py). There is no model: each rank's cache holds its share of random content.

As a program it is one rank in a process of its own, so that a test can kill or stop it: `python -m tests.group_ranks`
reads its seat and where rank 0 is as JSON on its command line, and serves until its stdin or rank 0 ends.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tercet.core import Ticket
from tercet.distributed.line import Line, Rendezvous, join
from tercet.distributed.place import Place
from tercet.distributed.talk import Talk
from tercet.engine.replicas import replica_of
from tercet.errors import WorkerDrained, WorkerLost
from tercet.roles.rank import Rank
from tercet.transfer.memory.layout import KvLayout, Units
from tercet.transfer.mover.receiver import KvReceiver
from tercet.transfer.mover.sender import KvSender
from tercet.transfer.transports.contract import Transport
from tests.movers import CLASSES, EPOCH, Halting, config, region_of
from tests.unit.test_transfer_layout import oracle

TOKEN = "lines"
WHOLE = KvLayout(layers=4, blocks=8, block_size=8, kv_heads=2, head_dim=4, dtype="float32")


# ---- what lies in the caches


@functools.cache
def rows_of(layout: KvLayout) -> NDArray[np.intp]:
    """[layers, blocks, parts, heads, tokens of a block] of a rank -> which row of its memory."""
    every, axes = Units(range(layout.blocks), 0, 0), (layout.window, range(layout.blocks), range(layout.parts))
    starts = [
        oracle(layout, every, 1, layer, part, head, block * layout.block_size + token).start
        for layer, block, part, head, token in itertools.product(*axes, layout.heads, range(layout.block_size))
    ]
    shape = (layout.layers, layout.blocks, layout.parts, len(layout.heads), layout.block_size)
    return np.array(starts, dtype=np.intp).reshape(shape) // layout.row_bytes


@functools.cache
def content_of(whole: KvLayout, replica: int) -> NDArray[np.uint8]:
    """[layers, blocks, parts, heads, tokens of a block, bytes] of a whole model's cache."""
    shape = (whole.layers, whole.blocks, whole.parts, whole.kv_heads, whole.block_size, whole.row_bytes)
    return np.random.default_rng(replica + 1).integers(0, 256, shape, dtype=np.uint8)


def share_of(content: NDArray[np.uint8], layout: KvLayout) -> NDArray[np.uint8]:
    """The layers and heads that are held there."""
    layers, heads = layout.window, layout.heads
    return content[layers.start : layers.stop, :, :, heads.start : heads.stop]


def layout_at(whole: KvLayout, place: Place) -> KvLayout:
    layers = place.layers(whole.layers)
    held = {"first_layer": layers.start, "layers": len(layers), "model_layers": whole.layers}
    return replace(whole, tp_size=place.tensor, tp_rank=place.tensor_rank, **held)


# ---- the ranks


@dataclass(frozen=True)
class Seat:
    """What a rank needs for its movers."""

    sends: bool
    transport: str
    place: Place
    whole: KvLayout
    changes: Mapping[str, Any]

    def region(self) -> Any:
        region = region_of(self.transport, layout_at(self.whole, self.place))
        if self.sends:
            memory = np.frombuffer(region.view, dtype=np.uint8).reshape(-1, self.whole.row_bytes)
            content = content_of(self.whole, self.place.data_rank)
            memory[rows_of(region.layout)] = share_of(content, region.layout)
        return region

    def sender(self, region: Any, way: Transport, on_event: Callable[[Any], None]) -> KvSender:
        return KvSender(config("prefill-0", **self.changes), region, [way], on_event)

    def receiver(self, region: Any, way: Transport, on_event: Callable[[Any], None]) -> KvReceiver:
        return KvReceiver(config("decode-0", **self.changes), EPOCH, region, [way], on_event)


class Member(Rank):
    """Rank 1, 2 ...: what it is told and asked, it hears as a rank with a model does."""

    def __init__(self, line: Line, seat: Seat, way: Transport, on_end: Callable[[WorkerLost], None]) -> None:
        self._stopped, self._running, self._on_end = threading.Event(), None, on_end
        self._sender = self._receiver = self._experts = None
        self.gate = threading.Event()  # clear: what is asked waits
        self.gate.set()
        self.region = seat.region()
        self._talk = Talk(line, self._ended)
        endpoint = ""
        if seat.sends:
            self._sender = seat.sender(self.region, way, self._tell_sent)
        else:
            self._receiver = seat.receiver(self.region, way, self._tell_landed)
            endpoint = self._receiver.start("127.0.0.1").encode()
        self._talk.start(self._told(), {"open": self._open, "connect": self._connect})
        self._talk.tell("ready", endpoint)

    @property
    def mover(self) -> Any:
        return self._sender or self._receiver

    def _told(self) -> dict[str, Callable[..., Any]]:
        return super()._told() | {"push": self._push}

    def _push(self, ticket: list[Any], layer: int, first: int, blocks: list[int]) -> None:
        """As its runner does in a step that rank 0 tells it of."""
        self._sending().push(Ticket(*ticket), layer, first, blocks)

    def _open(self, *fields: Any) -> str:
        self.gate.wait(60)
        return super()._open(*fields)

    def _ended(self, error: WorkerLost) -> None:
        if not self._stopped.is_set():
            self._on_end(error)

    def tell_counts(self) -> None:
        self._talk.tell("counts", self._counts())

    def end(self) -> None:
        self._stop()
        self._talk.close()
        self.region.close()


class Apart:
    """A rank in a process of its own."""

    def __init__(self, seat: Seat, endpoint: str) -> None:
        told = json.dumps([asdict(seat), endpoint])
        command = [sys.executable, "-m", "tests.group_ranks", told]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def next(self, kind: str) -> None:
        assert self.process.stdout is not None
        assert json.loads(self.process.stdout.readline()) == [kind]

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def main() -> None:
    packed, endpoint = json.loads(sys.argv[1])
    layout, place = KvLayout(**packed.pop("whole")), Place(**packed.pop("place"))
    seat = Seat(whole=layout, place=place, **packed)
    way, on = CLASSES[seat.transport](), threading.Event()
    real = way.outlet
    way.outlet = lambda ask: Halting(real(ask), on)  # type: ignore[method-assign]
    member = Member(join(endpoint, place.rank, TOKEN, 30.0), seat, way, lambda _: os._exit(1))
    sys.stdin.read()
    member.end()


# ---- a worker


class Side:
    """The ranks of one worker, and rank 0's lines to the others."""

    def __init__(
        self, seat: Seat, loop: asyncio.AbstractEventLoop, ways: Callable[[int], Transport], apart: Collection[int]
    ) -> None:
        """seat: of rank 0. ways: rank -> how it moves KV. apart: ranks that get a process of their own."""
        self.places = [seat.place.of(rank) for rank in range(seat.place.ranks)]
        self.layouts = [layout_at(seat.whole, place) for place in self.places]
        self.events: queue.Queue[Any] = queue.Queue()
        self.joint: Any = None
        self._loop = loop
        self._ready: queue.Queue[tuple[int, str]] = queue.Queue()
        self.apart: dict[int, Apart] = {}
        self.members: dict[int, Member] = {}
        others = [replace(seat, place=place) for place in self.places[1:]]
        lines = self._joined([each for each in others if each.place.rank in apart])
        for each in others:
            if (rank := each.place.rank) not in apart:
                ours, theirs = socket.socketpair()
                lines[rank] = Line(ours, rank)
                self.members[rank] = Member(Line(theirs, 0), each, ways(rank), lambda _: None)
        self.talks = {rank: self._talk(lines[rank]) for rank in sorted(lines)}
        self.endpoints = dict(self._ready.get(timeout=60) for _ in self.talks)
        self.region = seat.region()

    def _joined(self, seats: list[Seat]) -> dict[int, Line]:
        if not seats:
            return {}
        meeting = Rendezvous("127.0.0.1", TOKEN)
        self.apart = {seat.place.rank: Apart(seat, meeting.endpoint) for seat in seats}
        lines = meeting.joined([*self.apart], time.monotonic() + 60, lambda: False)
        meeting.close()
        return lines

    def _talk(self, line: Line) -> Talk:
        rank = line.rank
        talk = Talk(line, lambda error: self._loop.call_soon_threadsafe(self._lose, rank, error))
        take = lambda fact: self.joint.take(rank, fact)  # noqa: E731
        told = {
            "ready": lambda endpoint: self._ready.put((rank, endpoint)),
            "sent": take,
            "landed": take,
            "counts": lambda counts: self.joint.counts.update({rank: counts}),
        }
        talk.start(told, {})
        return talk

    def _lose(self, rank: int, error: WorkerLost) -> None:
        self.joint.lose(rank, WorkerDrained(str(error)))

    @property
    def movers(self) -> dict[int, Any]:
        """Rank -> its mover, of those in this process."""
        return {0: self.joint._own} | {rank: member.mover for rank, member in self.members.items()}

    @property
    def regions(self) -> dict[int, Any]:
        return {0: self.region} | {rank: member.region for rank, member in self.members.items()}

    def ranks_of(self, ticket: Ticket) -> list[int]:
        """Those of its replica."""
        return [place.rank for place in self.places if place.data_rank == replica_of(ticket, place.data)]

    def stop(self) -> None:
        for talk in self.talks.values():
            talk.close()
        for other in (*self.apart.values(), *self.members.values()):
            other.end()
        self.joint.stop()
        self.region.close()


if __name__ == "__main__":
    main()
