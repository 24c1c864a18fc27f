"""Frames on a stream socket, and the threads that keep one moving.

A channel has at most one reader and one writer thread. Sends never block the caller: they are posted to a bounded
outbox; a peer that does not read until the outbox is full is treated as gone.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from tercet.errors import PeerDown, ProtocolViolation
from tercet.transfer.messages import HEADER, MAX_BODY, Message, decode_body, decode_header, encode

IOV_MAX = 1024  # buffers of one vectored call, Linux limit
Item = TypeVar("Item")
OUTBOX = 8192  # frames; a layer-wise push of one long prompt is some hundred


class Channel:
    """A connected stream socket that speaks frames. Errors are PeerDown (the stream ended) or ProtocolViolation."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def send(self, message: Message, payload: Sequence[memoryview] = (), fds: Sequence[int] = ()) -> None:
        """Blocks until the kernel has taken every byte."""
        head = encode(message, sum(len(view) for view in payload))
        try:
            if fds:
                sent = socket.send_fds(self._sock, [head], list(fds))
                self._sock.sendall(head[sent:])
            else:
                self._send_all([memoryview(head), *payload])
        except OSError as error:
            raise PeerDown(f"the transfer connection broke while sending: {error}") from error

    def _send_all(self, views: list[memoryview]) -> None:
        first = 0
        while first < len(views):
            sent = self._sock.sendmsg(views[first : first + IOV_MAX])
            while first < len(views) and sent >= len(views[first]):
                sent -= len(views[first])
                first += 1
            if sent:
                views[first] = views[first][sent:]

    def receive(self, max_body: int = MAX_BODY) -> tuple[Message, int]:
        """-> (message, payload bytes that follow on the stream)."""
        kind, body, payload = decode_header(self._take(HEADER.size), max_body)
        return decode_body(kind, self._take(body)), payload

    def receive_with_fds(self) -> tuple[Message, list[int]]:
        """The first frame of a connection over which the peer passes file descriptors."""
        try:
            header, fds, _, _ = socket.recv_fds(self._sock, HEADER.size, 4)
        except OSError as error:
            raise PeerDown(f"the transfer connection broke: {error}") from error
        header += self._take(HEADER.size - len(header))
        kind, body, _ = decode_header(header)
        return decode_body(kind, self._take(body)), fds

    def receive_into(self, view: memoryview) -> None:
        """Fill `view` from the stream."""
        try:
            while view:
                count = self._sock.recv_into(view)
                if count == 0:
                    raise PeerDown("the peer closed the transfer connection")
                view = view[count:]
        except OSError as error:
            raise PeerDown(f"the transfer connection broke: {error}") from error

    def discard(self, num_bytes: int) -> None:
        """Read and forget: bytes that must not be placed."""
        scratch = memoryview(bytearray(min(num_bytes, 1 << 16)))
        while num_bytes:
            step = min(num_bytes, len(scratch))
            self.receive_into(scratch[:step])
            num_bytes -= step

    def _take(self, num_bytes: int) -> bytes:
        data = bytearray(num_bytes)
        self.receive_into(memoryview(data))
        return bytes(data)

    def settimeout(self, seconds: float | None) -> None:
        self._sock.settimeout(seconds)

    def shutdown(self) -> None:
        """Wake both threads with an end of stream; safe from any thread, any number of times."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()


class Pump(Generic[Item]):
    """The reader and writer threads of one channel.

    read():      called again and again on the reader thread until it raises PeerDown or ProtocolViolation.
    write(item): called on the writer thread with each posted item, in order.
    ended(error): called once, on the reader thread, when both directions are over.
    """

    def __init__(
        self,
        channel: Channel,
        name: str,
        read: Callable[[], None],
        write: Callable[[Item], None],
        ended: Callable[[PeerDown | ProtocolViolation], None],
    ) -> None:
        self._channel = channel
        self._read = read
        self._write = write
        self._ended = ended
        self._outbox: queue.Queue[Item | None] = queue.Queue(OUTBOX)
        self._posting = threading.Lock()
        self._over = False  # nothing more is taken into the outbox
        self._reader = threading.Thread(target=self._read_loop, name=f"kv-read-{name}", daemon=True)
        self._writer = threading.Thread(target=self._write_loop, name=f"kv-write-{name}", daemon=True)

    def start(self) -> None:
        self._writer.start()
        self._reader.start()

    def post(self, item: Item) -> bool:
        """Queue an item. False: it will never be written, since the channel is over (a full outbox ends it)."""
        with self._posting:
            if self._over:
                return False
            try:
                self._outbox.put_nowait(item)
            except queue.Full:
                self._channel.shutdown()
                return False
            return True

    def finish(self, timeout: float) -> None:
        """Let the writer empty its outbox, then end the stream."""
        with self._posting:
            self._over = True
        with contextlib.suppress(queue.Full):
            self._outbox.put_nowait(None)
        self._writer.join(timeout)
        self._channel.shutdown()
        if threading.current_thread() is not self._reader:
            self._reader.join(timeout)

    def _read_loop(self) -> None:
        try:
            while True:
                self._read()
        except (PeerDown, ProtocolViolation) as error:
            self._channel.shutdown()
            with self._posting:
                self._over = True
            # The writer now fails at each item quickly, so the end marker finds room.
            self._outbox.put(None)
            self._writer.join()
            self._ended(error)
            self._channel.close()

    def _write_loop(self) -> None:
        """Every posted item is handed to `write`, also when the stream is over: it may hold a count open."""
        while (item := self._outbox.get()) is not None:
            try:
                self._write(item)
            except (PeerDown, ProtocolViolation):
                self._channel.shutdown()
