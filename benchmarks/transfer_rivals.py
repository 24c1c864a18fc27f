"""What the mover is compared with: memcpy, sockets, torch.distributed; each by its own calls, nothing around it.

A side is two processes with the same two pools mapped: rank SOURCE moves blocks of the source pool into blocks of the
destination pool, rank TARGET helps it and says when it has them. Both know the blocks of a job before time is taken.
"""

from __future__ import annotations

import ctypes
import importlib
import socket
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any, ClassVar

import numpy as np
import torch

SOURCE, TARGET = 0, 1
HOST = "127.0.0.1"
BUFFER = 1 << 20  # bytes of a socket in the kernel, each way
IOV = 256  # buffers of one vectored call


@dataclass(frozen=True)
class Job:
    """Move block src[n] of the source pool to block dst[n] of the destination pool, for all n."""

    shape: str
    size: int  # bytes of a block
    src: list[int]
    dst: list[int]


class Side(ABC):
    """One process of a pair. `link` is a pipe to the other, for what the timed calls do not carry."""

    needs: ClassVar[str] = ""  # a module
    env: ClassVar[dict[str, str]] = {}

    def __init__(self, rank: int, pools: Sequence[memoryview], link: Connection) -> None:
        self.rank, self.pools, self.link = rank, pools, link
        self.addresses = [np.frombuffer(pool, np.uint8).ctypes.data for pool in pools]
        self.connect()

    @classmethod
    def missing(cls) -> str | None:
        """Why it cannot run here; None if it can."""
        return f"{cls.needs} is not installed" if cls.needs and find_spec(cls.needs) is None else None

    def connect(self) -> None:  # noqa: B027  # memcpy needs nothing
        """Meet the other rank."""

    def prepare(self, job: Job) -> None:  # noqa: B027  # most need nothing
        """TARGET: before the source begins; not timed."""

    def begin(self, job: Job) -> None:  # noqa: B027  # most need nothing
        """SOURCE: before the time is taken."""

    @abstractmethod
    def move(self, job: Job) -> None:
        """SOURCE, timed: returns when the target has said that it has every byte."""

    def take(self, job: Job) -> None:  # noqa: B027  # nothing to do where the source places the bytes
        """TARGET: its part of a move."""

    def ping(self) -> None:  # noqa: B027
        """SOURCE, timed: a small message there and back."""

    def pong(self) -> None:  # noqa: B027
        """TARGET: its part of a ping."""

    def small(self, count: int) -> dict[str, list[float]]:
        """SOURCE: seconds of each of `count` round trips."""
        self.link.send(("pong", count))
        self.link.recv()
        return {"round_trip": [timed(self.ping) for _ in range(count)]}

    def views(self, job: Job) -> list[memoryview]:
        """The job's blocks in this rank's pool."""
        pool, size = self.pools[self.rank], job.size
        return [pool[n * size : (n + 1) * size] for n in (job.dst if self.rank == TARGET else job.src)]


def timed(call: Callable[..., object], *args: object) -> float:
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start


class Slices(Side):
    """memcpy in one process, by slices of a memoryview."""

    def move(self, job: Job) -> None:
        source, target, size = *self.pools, job.size
        for src, dst in zip(job.src, job.dst, strict=True):
            target[dst * size : (dst + 1) * size] = source[src * size : (src + 1) * size]


class Memmove(Side):
    """memcpy in one process, by the C library's function."""

    def move(self, job: Job) -> None:
        (source, target), size, memmove = self.addresses, job.size, ctypes.memmove
        for src, dst in zip(job.src, job.dst, strict=True):
            memmove(target + dst * size, source + src * size, size)


class Tcp(Side):
    """A plain vectored loop."""

    def connect(self) -> None:
        if self.rank == TARGET:
            with socket.create_server((HOST, 0)) as server:
                self.link.send(server.getsockname())
                self.sock = server.accept()[0]
        else:
            self.sock = socket.create_connection(self.link.recv())
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.tune()

    def tune(self) -> None:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            self.sock.setsockopt(socket.SOL_SOCKET, option, BUFFER)

    def move(self, job: Job) -> None:
        vectored(self.sock.sendmsg, self.views(job))
        self.sock.recv(1)

    def take(self, job: Job) -> None:
        vectored(lambda views: self.sock.recvmsg_into(views)[0], self.views(job))
        self.sock.sendall(b"k")

    def ping(self) -> None:
        self.sock.sendall(b"i")
        self.sock.recv(1)

    def pong(self) -> None:
        self.sock.sendall(self.sock.recv(1))


class Unix(Tcp):
    def connect(self) -> None:
        if self.rank == TARGET:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind("")  # the kernel picks an abstract name
                server.listen()
                self.link.send(server.getsockname())
                self.sock = server.accept()[0]
        else:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.connect(self.link.recv())
        self.tune()


def vectored(call: Callable[[list[memoryview]], int], views: Sequence[memoryview]) -> None:
    """Send or fill all views. Raises EOFError at the end of the stream."""
    rest = deque(views)
    while rest:
        count = call(list(islice(rest, IOV)))
        if not count:
            raise EOFError("the stream ended")
        while rest and count >= len(rest[0]):
            count -= len(rest.popleft())
        if count:
            rest[0] = rest[0][count:]


class Gloo(Side):
    """Point to point calls of torch.distributed, one for each block."""

    def connect(self) -> None:
        dist: Any = importlib.import_module("torch.distributed")
        torch.set_num_threads(1)  # more would fight with the other process
        port = 0 if self.rank == TARGET else self.link.recv()
        store = dist.TCPStore(HOST, port, 2, is_master=self.rank == TARGET, wait_for_workers=False)
        if self.rank == TARGET:
            self.link.send(store.port)
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=HOST)]
        self.store, self.group = store, dist.ProcessGroupGloo(store, self.rank, 2, options)
        self.byte = torch.zeros(1, dtype=torch.uint8)
        self.pool = torch.frombuffer(self.pools[self.rank], dtype=torch.uint8)

    def move(self, job: Job) -> None:
        self.wait(self.group.send([tensor], TARGET, 0) for tensor in self.tensors(job))
        self.wait([self.group.recv([self.byte], TARGET, 1)])

    def take(self, job: Job) -> None:
        self.wait(self.group.recv([tensor], SOURCE, 0) for tensor in self.tensors(job))
        self.wait([self.group.send([self.byte], SOURCE, 1)])

    def ping(self) -> None:
        self.wait([self.group.send([self.byte], TARGET, 2)])
        self.wait([self.group.recv([self.byte], TARGET, 2)])

    def pong(self) -> None:
        self.wait([self.group.recv([self.byte], SOURCE, 2)])
        self.wait([self.group.send([self.byte], SOURCE, 2)])

    def tensors(self, job: Job) -> list[torch.Tensor]:
        rows = self.pool[: self.pool.numel() // job.size * job.size].view(-1, job.size)
        return [rows[n] for n in (job.dst if self.rank == TARGET else job.src)]

    def wait(self, works: Any) -> None:
        for work in list(works):
            work.wait()


class GlooPacked(Gloo):
    """The blocks gathered, sent as one, scattered."""

    def move(self, job: Job) -> None:
        torch.cat(self.tensors(job), out=self.staged(job))
        self.wait([self.group.send([self.staged(job)], TARGET, 0)])
        self.wait([self.group.recv([self.byte], TARGET, 1)])

    def connect(self) -> None:
        super().connect()
        self.staging = torch.zeros_like(self.pool)

    def staged(self, job: Job) -> torch.Tensor:
        return self.staging[: len(job.dst) * job.size]

    def take(self, job: Job) -> None:
        self.wait([self.group.recv([self.staged(job)], SOURCE, 0)])
        for place, row in zip(self.tensors(job), self.staged(job).view(-1, job.size), strict=True):
            place.copy_(row)
        self.wait([self.group.send([self.byte], SOURCE, 1)])
