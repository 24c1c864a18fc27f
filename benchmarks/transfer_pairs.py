"""The sides of benchmarks/transfer.py: ours, made of the real mover, and the two processes that every side is."""

from __future__ import annotations

import importlib
import mmap
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar

import numpy as np

from benchmarks.transfer_libraries import RIVALS
from benchmarks.transfer_rivals import SOURCE, TARGET, Job, Side, timed
from tercet.core import Ticket
from tercet.tls import PeerTls
from tercet.transfer.memory.layout import KvLayout
from tercet.transfer.memory.region import SCRATCH, Region
from tercet.transfer.mover.receiver import KvReceiver
from tercet.transfer.mover.sender import KvSender
from tercet.transfer.protocol import facts
from tercet.transfer.transports.contract import MoverConfig, Transport
from tests.certificates import Authority

SMALL = "handover"  # one request of 16 tokens, SmolLM2's shape
HANDOVER = KvLayout(layers=30, blocks=8, block_size=16, kv_heads=3, head_dim=64, dtype="bfloat16")
TOKENS = 16  # of a block
TRANSPORTS = {"shm": "shm", "tcp": "tcp", "torch": "torch_pg", "nixl": "nixl", "ucx": "ucx"}  # -> module
EPOCH = 1
PATIENCE_S = 120.0  # for one answer of a side


class SideLost(Exception):
    """A side cannot run here, or broke; says why."""


class Pool(Region):
    """A region over a memfd that other processes have mapped too; every page of it is touched once."""

    def __init__(self, layout: KvLayout, path: str) -> None:
        self.layout, self.num_bytes = layout, layout.total_bytes + SCRATCH
        self.fd = os.open(path, os.O_RDWR)
        self._map = mmap.mmap(self.fd, self.num_bytes)
        self.memory = memoryview(self._map)
        self.view = self.memory[: layout.total_bytes]
        np.frombuffer(self.memory, np.uint8)[:: mmap.PAGESIZE].sum()


def layout_of(size: int, pool: int) -> KvLayout:
    """One layer with blocks of `size` bytes: two parts of 16 rows of bfloat16."""
    return KvLayout(1, pool // size, TOKENS, kv_heads=1, head_dim=size // (4 * TOKENS), dtype="bfloat16")


class Ours(Side):
    """The mover: KvSender in one process, KvReceiver in the other, one of each for a shape."""

    transport: ClassVar[str]
    integrity: ClassVar[bool]
    secret: ClassVar[bool] = False  # behind mutual TLS
    paths: ClassVar[list[str]]  # of the pools; set in the process, as are
    sizes: ClassVar[dict[str, int]]  # shape -> bytes of a block

    @classmethod
    def missing(cls) -> str | None:
        try:
            return transport_of(cls.transport).missing()
        except ImportError as error:
            return str(error)

    def connect(self) -> None:
        self.events: SimpleQueue[Any] = SimpleQueue()
        way, self.tickets = transport_of(self.transport), 0
        layouts = {name: layout_of(size, len(self.pools[SOURCE])) for name, size in self.sizes.items()}
        regions: dict[str, Region] = {name: Pool(layout, self.paths[self.rank]) for name, layout in layouts.items()}
        regions |= {SMALL: Region(HANDOVER)}
        tls = self.tls() if self.secret else None
        config = MoverConfig(f"rank-{self.rank}", "model", "token", 10.0, 2.0, self.integrity, tls=tls)
        if self.rank == TARGET:
            self.receivers = {
                name: KvReceiver(config, EPOCH, region, [way()], self.events.put) for name, region in regions.items()
            }
            self.link.send({name: receiver.start("127.0.0.1").encode() for name, receiver in self.receivers.items()})
        else:
            self.endpoints: dict[str, str] = self.link.recv()
            self.senders = {
                name: KvSender(config, region, [way()], self.events.put) for name, region in regions.items()
            }
            self.small(1)

    def tls(self) -> PeerTls:
        if self.rank == TARGET:
            self.link.send(Authority(Path(tempfile.mkdtemp(prefix="tercet-tls-"))).peer())
            return PeerTls(self.link.recv())
        spec = self.link.recv()
        self.link.send(spec)
        return PeerTls(spec)

    def ticket(self) -> Ticket:
        """The next one; both ranks count alike."""
        self.tickets += 1
        return Ticket(f"request-{self.tickets}", 0, EPOCH)

    def prepare(self, job: Job) -> None:
        self.receivers[job.shape].admit(self.ticket(), 0, job.dst)

    def take(self, job: Job) -> None:
        self.await_event(facts.Complete)
        if job.shape == SMALL:
            self.link.send(time.perf_counter())  # the host's clock, the same in both processes

    def begin(self, job: Job) -> None:
        self.opened = self.ticket()
        num_tokens = len(job.src) * TOKENS
        self.senders[job.shape].open(self.opened, self.endpoints[job.shape], num_tokens, time.monotonic() + 60)
        self.await_event(facts.Granted)

    def move(self, job: Job) -> None:
        sender, ticket = self.senders[job.shape], self.opened
        for layer in range(HANDOVER.layers if job.shape == SMALL else 1):
            sender.push(ticket, layer, 0, job.src)
        sender.finish(ticket, b"")
        self.await_event(facts.Released)

    def small(self, count: int) -> dict[str, list[float]]:
        trips, handovers = [], []
        for number in range(count):
            job = Job(SMALL, HANDOVER.block_bytes, [number % HANDOVER.blocks], [(number + 3) % HANDOVER.blocks])
            self.link.send(("job", job))
            self.link.recv()
            began = time.perf_counter()
            trips.append(timed(self.begin, job))
            self.move(job)
            handovers.append(self.link.recv() - began)
        return {"round_trip": trips, SMALL: handovers}

    def await_event(self, kind: type) -> None:
        while not isinstance(event := self.events.get(timeout=PATIENCE_S), kind):
            if isinstance(event, facts.ReceiveFailed | facts.SendFailed):
                raise event.error


def transport_of(name: str) -> type[Transport]:
    """Raises ImportError if there is no such transport (yet), or what it needs is not installed."""
    module = importlib.import_module(f"tercet.transfer.transports.{TRANSPORTS[name]}")
    return next(cls for cls in vars(module).values() if isinstance(cls, type) and getattr(cls, "name", None) == name)


def _ours() -> Iterator[tuple[str, type[Side]]]:
    for name in TRANSPORTS:
        for integrity in (False, True):
            yield name + " digests" * integrity, type("Ours", (Ours,), {"transport": name, "integrity": integrity})
    yield "tcp TLS", type("Ours", (Ours,), {"transport": "tcp", "integrity": False, "secret": True})


SIDES: dict[str, type[Side]] = dict(_ours()) | RIVALS


def serve(
    name: str, rank: int, paths: list[str], pool: int, sizes: dict[str, int], link: Connection, orders: Connection
) -> None:
    """One process of a side; the source answers the orders of the benchmark, the target those of the source."""
    os.environ.pop("UCX_TLS", None)  # each side says its own; asking an adapter what it misses has set it
    os.environ.update({"NIXL_LOG_LEVEL": "WARN"} | SIDES[name].env)  # before a library is loaded
    Ours.paths, Ours.sizes = paths, sizes
    try:
        side = SIDES[name](rank, [Pool(layout_of(64, pool), path).view for path in paths], link)
        if rank == TARGET:
            follow(side, link)
        orders.send(None)
        while True:
            orders.send(obey(side, link, orders.recv()))
    except EOFError:
        return
    except Exception as error:  # noqa: BLE001  # told to the benchmark, which goes on without this side
        orders.send(SideLost(f"{type(error).__name__}: {error}"))


def obey(side: Side, link: Connection, order: Job | int) -> Any:
    """-> seconds of a job, or what so many small messages took."""
    if isinstance(order, int):
        return side.small(order)
    link.send(("job", order))
    link.recv()
    side.begin(order)
    return timed(side.move, order)


def follow(side: Side, link: Connection) -> None:
    while True:
        kind, what = link.recv()
        if kind == "job":
            side.prepare(what)
        link.send("ready")
        if kind == "job":
            side.take(what)
        else:
            for _ in range(what):
                side.pong()


class Running:
    """A side's two processes, connected."""

    def __init__(self, name: str, paths: list[str], pool: int, sizes: dict[str, int]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        ends, pipes = context.Pipe(), [context.Pipe() for _ in (SOURCE, TARGET)]
        self.orders = [pipe[0] for pipe in pipes]
        self.processes = [
            context.Process(
                target=serve, args=(name, rank, paths, pool, sizes, ends[rank], pipes[rank][1]), daemon=True
            )
            for rank in (SOURCE, TARGET)
        ]
        for process in self.processes:
            process.start()
        for end in (*ends, *(pipe[1] for pipe in pipes)):
            end.close()
        self.answer()

    def ask(self, order: Job | int) -> Any:
        self.orders[SOURCE].send(order)
        return self.answer()

    def answer(self) -> Any:
        """Raises SideLost, and ends the processes, if one of them broke or is silent."""
        spoke = wait(self.orders, PATIENCE_S)
        ready = next((order for order in self.orders if order in spoke), None)
        try:
            found = ready.recv() if ready else SideLost(f"no answer in {PATIENCE_S:.0f} s")
        except EOFError:
            found = SideLost("its process died")
        if isinstance(found, SideLost):
            self.stop()
            raise found
        return found

    @property
    def cpu_s(self) -> float:
        clocks = [
            (~process.pid << 3) | 2 for process in self.processes if process.pid
        ]  # as clock_getcpuclockid makes them
        return sum(time.clock_gettime(clock) for clock in clocks)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
