"""Frames on a stream socket, and a mailbox that posts small ones without blocking.

A channel has at most one reader thread. `send` blocks until the kernel has every byte, and is for one thread, too; any
thread may post to a `Mailbox`.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence

from tercet.errors import PeerDown, ProtocolViolation
from tercet.transfer.links.wires import BUFFER
from tercet.transfer.protocol.messages import HEADER, MAX_BODY, Data, Message, Probe, decode_body, decode_header, encode

IOV_MAX = 1024  # buffers of one vectored call, Linux limit
OUTBOX = 8192  # frames that may wait for a peer; with more it is treated as gone


class Channel:
    """A connected stream socket that speaks frames. Errors are PeerDown (the stream ended) or ProtocolViolation."""

    def __init__(self, sock: socket.socket, *, over_tls: bool = False) -> None:
        self.sock = sock
        self.is_local = sock.family == socket.AF_UNIX and not over_tls  # the peer is on this host
        self.deadline: float | None = None  # time.monotonic() by which everything must be received

    def send(self, message: Message, payload: Sequence[memoryview] = (), fds: Sequence[int] = ()) -> None:
        """Blocks until the kernel has taken every byte."""
        head = encode(message, sum(len(view) for view in payload))
        try:
            if fds:
                sent = socket.send_fds(self.sock, [head], list(fds))
                self.sock.sendall(head[sent:])
            else:
                self._send_all([memoryview(head), *payload])
        except OSError as error:
            raise PeerDown(f"the transfer connection broke while sending: {error}") from error

    def _send_all(self, views: list[memoryview]) -> None:
        first = 0
        while first < len(views):
            sent = self.sock.sendmsg(views[first : first + IOV_MAX])
            while first < len(views) and sent >= len(views[first]):
                sent -= len(views[first])
                first += 1
            if sent:
                views[first] = views[first][sent:]

    def try_send(self, head: bytes) -> int:
        """Send what the kernel takes without blocking. -> bytes sent."""
        try:
            return self.sock.send(head, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise PeerDown(f"the transfer connection broke while sending: {error}") from error

    def send_bytes(self, head: bytes) -> None:
        try:
            self.sock.sendall(head)
        except OSError as error:
            raise PeerDown(f"the transfer connection broke while sending: {error}") from error

    def receive(self, max_body: int = MAX_BODY) -> tuple[Message, int]:
        """-> (message, payload bytes that follow on the stream)."""
        kind, body, payload = decode_header(self._take(HEADER.size), max_body)
        return decode_body(kind, self._take(body)), payload

    def receive_with_fds(self) -> tuple[Message, list[int]]:
        """The first frame of a connection over which the peer may pass file descriptors."""
        try:
            header, fds, _, _ = socket.recv_fds(self.sock, HEADER.size, 4)
        except OSError as error:
            raise PeerDown(f"the transfer connection broke: {error}") from error
        try:
            header += self._take(HEADER.size - len(header))
            kind, body, payload = decode_header(header)
            if payload:
                raise ProtocolViolation(f"a first frame with a payload of {payload} bytes")
            return decode_body(kind, self._take(body)), fds
        except BaseException:
            for fd in fds:
                socket.close(fd)
            raise

    def receive_into(self, views: Sequence[memoryview]) -> None:
        """Fill the views from the stream, in order."""
        rest, first = [view for view in views if len(view)], 0
        most = min(IOV_MAX, len(rest) * BUFFER // max(1, sum(map(len, rest))) + 1)  # what one call can fill
        try:
            while first < len(rest):
                if self.deadline is not None:  # a peer that sends byte by byte would outlive every timeout
                    self.sock.settimeout(max(self.deadline - time.monotonic(), 1e-3))
                batch = rest[first : first + most]
                count = self.sock.recvmsg_into(batch)[0] if len(batch) > 1 else self.sock.recv_into(batch[0])
                if count == 0:
                    raise PeerDown("the peer closed the transfer connection")
                while first < len(rest) and count >= len(rest[first]):
                    count -= len(rest[first])
                    first += 1
                if count:
                    rest[first] = rest[first][count:]
        except OSError as error:
            raise PeerDown(f"the transfer connection broke: {error}") from error

    def discard(self, num_bytes: int) -> None:
        """Read and forget: bytes that must not be placed."""
        scratch = memoryview(bytearray(min(num_bytes, 1 << 16)))
        while num_bytes:
            step = min(num_bytes, len(scratch))
            self.receive_into([scratch[:step]])
            num_bytes -= step

    def _take(self, num_bytes: int) -> bytes:
        data = bytearray(num_bytes)
        self.receive_into([memoryview(data)])
        return bytes(data)

    def settimeout(self, seconds: float | None) -> None:
        self.sock.settimeout(seconds)

    def shutdown(self) -> None:
        """End the stream, which wakes threads that wait on it. From any thread, any number of times."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)  # TLS's own would take its state from under a reader

    def close(self) -> None:
        self.sock.close()


def join_all(threads: Sequence[threading.Thread], timeout_s: float) -> None:
    """Wait for threads that have been told to end, `timeout_s` at most for all together."""
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        if thread.ident is not None:  # else it was never started
            thread.join(max(0.0, deadline - time.monotonic()))


class Mailbox:
    """Posts frames from any thread, in order. A frame goes out on the caller's thread if the kernel takes it at once,
    which saves a thread switch for each control message; what it does not take waits for the writer thread."""

    def __init__(self, channel: Channel, name: str) -> None:
        self._channel = channel
        self._backlog: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._over = False  # nothing more is accepted
        self._thread = threading.Thread(target=self._run, name=f"kv-write-{name}", daemon=True)
        self._thread.start()

    def post(self, message: Message) -> bool:
        """False: it will never be sent, since the stream has ended (a full backlog ends it, too)."""
        assert not isinstance(message, Data | Probe)
        head = encode(message)
        with self._changed:
            if self._over:
                return False
            if len(self._backlog) >= OUTBOX:
                self._end()
                return False
            try:
                sent = 0 if self._backlog else self._channel.try_send(head)
            except PeerDown:
                self._end()
                return False
            if sent < len(head):
                self._backlog.append(head[sent:])
                self._changed.notify()
            return True

    def finish(self, timeout: float) -> None:
        """Send the backlog, for at most `timeout` seconds, then end the stream."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or not self._backlog, timeout)
            self._end()
        self._thread.join(timeout)

    def _end(self) -> None:
        self._over = True
        self._channel.shutdown()
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._over or self._backlog)
                if self._over:
                    return
                head = self._backlog[0]
            try:
                self._channel.send_bytes(head)
            except PeerDown:
                with self._changed:
                    self._end()
                return
            with self._changed:
                self._backlog.popleft()
                self._changed.notify_all()
