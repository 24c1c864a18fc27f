"""One rank's end of a link to another rank: frames both ways on one stream socket, without ever blocking.

One thread drives all links of a rank (`distributed/pump.py`), so that no two ranks can wait for each other with full
buffers. What is received goes straight where it belongs:

    header -> `frame` stands -> take(views) or drop() -> payload -> header of the next one
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence

from tercet.distributed.frames import HEADER, Frame, Kind, decode
from tercet.errors import ProtocolViolation, RankLost
from tercet.transfer.links.channel import IOV_MAX, Channel

SCRATCH = 1 << 16  # bytes in which dropped payload is read


class Link:
    """For one thread, but for `ended`. RankLost if the stream breaks, ProtocolViolation if no frame comes on it."""

    def __init__(self, rank: int, channel: Channel) -> None:
        self.rank = rank
        self.frame: Frame | None = None  # it came, and its payload stands on the stream
        self.moved = 0.0  # time.monotonic() at which bytes of a frame last went either way
        self.dropped = 0  # frames
        self.ended = threading.Event()  # this end is closed
        self.sock = channel.sock
        self.sock.setblocking(False)
        self._head = bytearray(HEADER.size)
        self._into = [memoryview(self._head)]  # what the next bytes fill
        self._in_payload = False
        self._out: list[memoryview] = []

    @property
    def sending(self) -> bool:
        return bool(self._out)

    @property
    def receiving(self) -> bool:
        """Payload that was asked for is still to come."""
        return self._in_payload

    def send(self, views: Sequence[memoryview]) -> None:
        """Queue a frame, and send what the kernel takes. The views must not change until `sending` is False."""
        self._out += [view for view in views if len(view)]
        self.flush()

    def sign(self, waiting: Frame) -> None:
        """Tell the other end that this one lives. A stopped peer's kernel takes it, too, so it is no progress."""
        if not self.sending:
            moved = self.moved
            self.send([memoryview(waiting.encode())])
            self.moved = moved

    def flush(self) -> None:
        with self._loss(), contextlib.suppress(BlockingIOError):
            while self._out:
                self._out = self._after(self._out, self.sock.sendmsg(self._out[:IOV_MAX]))

    def keep_unsent(self) -> None:
        """Copy what is queued, since its owner will not wait: a frame that was begun must be ended."""
        self._out = [memoryview(b"".join(self._out))] if self._out else []

    def take(self, views: Sequence[memoryview]) -> None:
        """Place the payload of `frame`."""
        assert self.frame is not None
        assert sum(map(len, views)) == self.frame.payload
        self._into = [view for view in views if len(view)]
        self._in_payload = True
        self._go_on()

    def drop(self) -> None:
        """Read the payload of `frame` and forget it."""
        assert self.frame is not None
        scratch = memoryview(bytearray(min(self.frame.payload, SCRATCH)))
        times, rest = divmod(self.frame.payload, SCRATCH)
        self.dropped += 1
        self.take([scratch] * times + [scratch[:rest]])

    def receive(self) -> None:
        """Take what has come, as far as `frame` or to the end of its payload."""
        with self._loss(), contextlib.suppress(BlockingIOError):
            while self._into:
                count = self.sock.recvmsg_into(self._into[:IOV_MAX])[0]
                if count == 0:
                    raise RankLost(f"rank {self.rank} has closed its link", self.rank)
                self._into = self._after(self._into, count)
        self._go_on()

    def cut(self) -> None:
        """End the stream, which wakes who waits on it. From any thread."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.cut()
        self.sock.close()
        self.ended.set()

    def _go_on(self) -> None:
        """To the next state, if all bytes of this one are there."""
        if self._into:
            return
        if self._in_payload:
            self._in_payload, self.frame = False, None
        elif self.frame is None:
            try:
                self.frame = decode(bytes(self._head))
            except ProtocolViolation as error:
                raise ProtocolViolation(f"rank {self.rank}: {error}") from error
            if self.frame.kind != Kind.WAITING:
                return
            self.frame = None
        else:
            return
        self._into = [memoryview(self._head)]

    def _after(self, views: list[memoryview], count: int) -> list[memoryview]:
        """What is left of the views when `count` bytes are done."""
        self.moved = time.monotonic()
        first = 0
        while first < len(views) and count >= len(views[first]):
            count -= len(views[first])
            first += 1
        return [views[first][count:], *views[first + 1 :]] if first < len(views) else []

    @contextlib.contextmanager
    def _loss(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:
            raise
        except OSError as error:
            raise RankLost(f"the link to rank {self.rank} broke: {error}", self.rank) from error
