"""A sender and a receiver of KV over real sockets, for the tests of the transports.

As a program it is one writer in a process of its own, so that a test can kill or stop it:
`python -m tests.movers TRANSPORT LEASE_S [LAYOUT]` reads commands, a JSON list a line, and prints events likewise.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tercet.core import Ticket
from tercet.errors import TercetError
from tercet.kernels.kinds import Kernels
from tercet.transfer.memory.layout import KvLayout
from tercet.transfer.memory.region import Region
from tercet.transfer.mover.receiver import KvReceiver
from tercet.transfer.mover.sender import KvSender
from tercet.transfer.protocol import facts
from tercet.transfer.transports.contract import MoverConfig, Outlet, Parcel, Transport
from tercet.transfer.transports.table import ALL
from tests.fake_gpu import FAKES, SeenRegion, SharedGpu, Window

LAYOUT = KvLayout(layers=3, blocks=8, block_size=16, kv_heads=2, head_dim=8, dtype="float32")
EPOCH = 7
NOTE = b"first token"
CLASSES = {cls.name: cls for cls in (*ALL, *FAKES)}


def names() -> list[Any]:
    """Every transport as a parameter: those that are not here are skipped, those that take a GPU are marked so."""
    return [
        pytest.param(
            name,
            marks=[
                pytest.mark.skipif(cls.missing() is not None, reason=str(cls.missing())),
                *([pytest.mark.gpu] if cls.in_device_memory and cls in ALL else []),
            ],
        )
        for name, cls in CLASSES.items()
    ]


def region_of(transport: str, layout: KvLayout) -> Region | SeenRegion:
    """Where the KV lies that this transport moves."""
    cls = CLASSES[transport]
    if not cls.in_device_memory:
        return Region(layout)
    if cls in FAKES:
        return SeenRegion(layout, SharedGpu())
    from tercet.transfer.memory.cuda import CudaGpu

    kernels = Kernels("triton", torch.device("cuda", 0))
    return SeenRegion(layout, CudaGpu(kernels.device, kernels.copy_runs), kernels.unit_digests)


def config(name: str, **changes: object) -> MoverConfig:
    """With a lease that does not run out on a busy machine; what is about leases says a shorter one."""
    base = {"fingerprint": "m", "token": "t", "lease_s": 10.0, "heartbeat_s": 0.2, "integrity": True}
    return MoverConfig(worker_id=name, **(base | changes))


def ticket_of(number: int = 0) -> Ticket:
    return Ticket(f"r{number}", 0, EPOCH)


def fill(region: Region, seed: int) -> None:
    """Bytes that any process with the same layout can compute."""
    random = np.random.default_rng(seed).integers(0, 256, region.layout.total_bytes, dtype=np.uint8)
    region.view[:] = random.data


class Receiving:
    """A decode worker's mover, and a queue of its events."""

    def __init__(self, transport: str, layout: KvLayout = LAYOUT, host: str = "127.0.0.1", **changes: object) -> None:
        self.region = region_of(transport, layout)
        self.events: queue.Queue[Any] = queue.Queue()
        epoch = int(changes.pop("epoch", EPOCH))
        self.mover = KvReceiver(
            config("decode-0", **changes), epoch, self.region, [CLASSES[transport]()], self.events.put
        )
        self.endpoint = self.mover.start(*host.split()).encode()

    def next(self, kind: type, seconds: float = 10.0) -> Any:
        """The next event, which must be of this kind."""
        event = self.events.get(timeout=seconds)
        assert isinstance(event, kind), event
        return event

    def stop(self) -> None:
        self.mover.stop()
        self.region.close()


class Pair(Receiving):
    """Both ends in this process."""

    def __init__(
        self,
        transport: str | Transport,
        sender: MoverConfig | None = None,
        layout: KvLayout = LAYOUT,
        destination: KvLayout = LAYOUT,
        host: str = "127.0.0.1",
        **changes: object,
    ) -> None:
        way = CLASSES[transport]() if isinstance(transport, str) else transport
        super().__init__(way.name, destination, host, **changes)
        self.source = region_of(way.name, layout)
        fill(self.source, 1)
        self.sent: queue.Queue[Any] = queue.Queue()
        self.sender = KvSender(sender or config("prefill-0", **changes), self.source, [way], self.sent.put)

    def open(self, ticket: Ticket, num_blocks: int) -> None:
        tokens = num_blocks * self.source.layout.block_size
        self.sender.open(ticket, self.endpoint, tokens, time.monotonic() + 60)

    def grant(self, ticket: Ticket, first: int, blocks: list[int], total: int) -> None:
        self.mover.admit(ticket, first, blocks)
        self.open(ticket, total)
        granted = self.sent.get(timeout=10)
        assert isinstance(granted, facts.Granted), granted

    def push(self, ticket: Ticket, layer: int, blocks: list[int]) -> None:
        self.sender.push(ticket, layer, 0, blocks)

    def push_all(self, ticket: Ticket, blocks: list[int]) -> None:
        for layer in self.source.layout.window:
            self.push(ticket, layer, blocks)
        self.sender.finish(ticket, NOTE)

    def leave(self) -> None:
        self.sender.stop()

    def move(self, ticket: Ticket, source: list[int], destination: list[int]) -> facts.Complete:
        self.grant(ticket, 0, destination, len(source))
        self.push_all(ticket, source)
        self.next(facts.Noted)
        return self.next(facts.Complete)

    def wipe(self) -> None:
        self.region.view[:] = bytes(len(self.region.view))

    def untouched(self) -> bool:
        return not any(self.region.view)

    def live(self) -> list[Ticket]:
        return [*self.sender.live(), *self.mover.live()]

    def stall(self) -> None:
        """The engine does nothing from now on."""
        self.sender._computed = lambda: 7

    def same(self, source: int, destination: int) -> bool:
        return all(
            self.source.block(layer, source) == self.region.block(layer, destination)
            for layer in self.source.layout.window
        )

    def stop(self) -> None:
        self.sender.stop()
        super().stop()
        self.source.close()


class Sending:
    """A prefill worker's mover, and a queue of its events."""

    def __init__(self, transport: str, layout: KvLayout, number: int = 0, **changes: object) -> None:
        self.region = region_of(transport, layout)
        fill(self.region, 1 + number)
        self.events: queue.Queue[Any] = queue.Queue()
        name = f"prefill-{number}"
        self.mover = KvSender(config(name, **changes), self.region, [CLASSES[transport]()], self.events.put)

    def open(self, ticket: Ticket, receivers: list[Receiving], num_tokens: int) -> None:
        endpoints = [receiver.endpoint for receiver in receivers]
        self.mover.open(ticket, endpoints, num_tokens, time.monotonic() + 60)

    def next(self, kind: type, seconds: float = 10.0) -> Any:
        event = self.events.get(timeout=seconds)
        assert isinstance(event, kind), event
        return event

    def push_all(self, ticket: Ticket, blocks: list[int], note: bytes = b"") -> None:
        for layer in self.region.layout.window:
            self.mover.push(ticket, layer, 0, blocks)
        self.mover.finish(ticket, note)

    def stop(self) -> None:
        self.mover.stop()
        self.region.close()


class Flipping(Outlet):
    """Flips a bit of the next writes on their way, after their digests were taken. The cache stays as it is: another
    link may read the same block for the answer to a RESEND before this write has returned."""

    def __init__(self, real: Outlet, region: Region, flips: list[int]) -> None:
        self._real, self._region, self._flips = real, region, flips

    def write(self, channel: Any, parcel: Parcel) -> None:
        flip = None
        if hasattr(parcel.message, "ticket"):
            with contextlib.suppress(IndexError):  # one call, since links share the list
                flip = self._flips.pop()
        if flip is None:
            self._real.write(channel, parcel)
            return
        self._real.write(channel, self._flipped(parcel, flip))

    def _flipped(self, parcel: Parcel, flip: int) -> Parcel:
        (at, to, size), *rest = parcel.runs
        if isinstance(self._region, SeenRegion):
            scratch, whole = self._region.layout.total_bytes, Window(self._region.bytes)
            flipped = bytearray(bytes(whole[at : at + size]))
            flipped[flip % size] ^= 16
            whole[scratch : scratch + size] = flipped
            return replace(parcel, runs=[(scratch, to, size), *rest])
        if parcel.source is self._region.view:  # NIXL writes from registered memory only, so the copy lies in it too
            scratch = self._region.layout.total_bytes
            self._region.memory[scratch : scratch + size] = parcel.source[at : at + size]
            parcel = replace(parcel, source=self._region.memory, runs=[(scratch, to, size), *rest])
        parcel.views[0][flip % size] ^= 16
        return parcel

    def close(self) -> None:
        self._real.close()


def flipping(name: str, flips: list[int]) -> Transport:
    """A transport whose next writes are corrupted, one for each number in `flips`."""
    transport = CLASSES[name]()
    real = transport.outlet
    transport.outlet = lambda ask: Flipping(real(ask), ask.region, flips)  # type: ignore[method-assign]
    return transport


def say(*fields: Any) -> None:
    """A line on standard output, whole: several links say theirs at once, and `print` writes its end apart."""
    os.write(1, json.dumps(fields).encode() + b"\n")


class Halting(Outlet):
    """Says `half` before each write's second half and waits there for the word to go on."""

    def __init__(self, real: Outlet, on: threading.Event) -> None:
        self._real, self._on = real, on

    def write(self, channel: Any, parcel: Parcel) -> None:
        if hasattr(parcel.message, "ticket") and not self._on.is_set():
            half, memory = parcel.runs[: len(parcel.runs) // 2], getattr(self._real, "_memory", None)
            for src, dst, size in half if memory is not None else ():
                memory[dst : dst + size] = parcel.source[src : src + size]
            if hasattr(self._real, "copy"):
                self._real.copy(parcel.source, half)
                self._real._stream.synchronise()
            say("half")
            self._on.wait()
        self._real.write(channel, parcel)

    def close(self) -> None:
        self._real.close()


def main() -> None:
    """Commands: [verb of KvSender, ticket, arguments ...], ["halt"], ["go"]. Events: [kind, ticket]."""
    transport, on = CLASSES[sys.argv[1]](), threading.Event()
    on.set()
    real = transport.outlet
    transport.outlet = lambda ask: Halting(real(ask), on)  # type: ignore[method-assign]
    layout = KvLayout(**json.loads(sys.argv[3])) if len(sys.argv) > 3 else LAYOUT
    region = region_of(transport.name, layout)
    fill(region, 1)

    def tell(event: Any) -> None:
        say(type(event).__name__, event.ticket)

    sender = KvSender(config("prefill-0", lease_s=float(sys.argv[2])), region, [transport], tell)
    say("up", os.getpid())
    for line in sys.stdin:
        verb, *rest = json.loads(line)
        if verb in ("halt", "go"):
            (on.clear if verb == "halt" else on.set)()
            continue
        ticket = Ticket(*rest[0])
        try:
            if verb == "open":
                sender.open(ticket, rest[1], rest[2], time.monotonic() + 60)
            elif verb == "push_all":
                for layer in layout.window:
                    sender.push(ticket, layer, 0, rest[1])
                sender.finish(ticket, NOTE)
        except TercetError as error:
            say("error", str(error))
    with contextlib.suppress(TercetError):
        sender.stop()


if __name__ == "__main__":
    main()
