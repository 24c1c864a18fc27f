"""The connection between rank 0 of a group and another rank: small messages in order, both ways.

    rank 0  ─Challenge(nonce)─>            rank
            <─Join(rank, nonce, proof)─
            ─Welcome(proof, fields)─>      then [kind, *fields] in either direction

Each proves that it knows the cluster's secret (tercet/secret.py). Within a host it is a Unix socket, over which file
descriptors go too; else TCP. A message is a msgpack list behind its length; there is no pickle.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import msgpack

from tercet.errors import PeerDown, PeerMismatch, ProtocolViolation, WorkerLost
from tercet.secret import nonce, proof, proves
from tercet.transfer.links.channel import Channel
from tercet.transfer.links.wires import dial_tcp, dial_unix, host_id, listen_tcp, listen_unix, tune_tcp, vet_unix

LENGTH = struct.Struct("<I")
MOST_BYTES = 64 << 20  # of a message: a step's plan carries token ids and block tables
MOST_STRANGE_BYTES = 1 << 10  # of a message from who has proved nothing yet
JOIN_S = 2.0  # for a handshake, once rank 0 has begun it
MOST_GREETED = 32  # connections at once that have proved nothing yet; others wait
LOOK_EVERY_S = 0.1
MOST_RANKS = 1 << 16
DIAL_S = 10.0
RANK_0, RANK = b"rank 0", b"rank"  # who proves, so that nobody can send a proof back

Message = list[Any]


class Line:
    """One end. `send` from any thread, `receive` on one. Both raise WorkerLost once the other end is gone."""

    def __init__(self, sock: socket.socket, rank: int) -> None:
        """rank: at the other end."""
        self.rank = rank
        self._channel = Channel(sock)
        self._sending = threading.Lock()

    def send(self, *message: Any) -> None:
        packed: bytes = msgpack.packb(message)
        if len(packed) > MOST_BYTES:
            raise ProtocolViolation(f"a message of {len(packed)} bytes to rank {self.rank} is over {MOST_BYTES}")
        try:
            with self._sending:
                self._channel.send_bytes(LENGTH.pack(len(packed)) + packed)
        except PeerDown as error:
            raise WorkerLost(f"rank {self.rank} of the group is gone: {error}") from error

    def receive(self, most: int = MOST_BYTES) -> Message:
        """Raises ProtocolViolation for what is no message, or one of more than `most` bytes."""
        try:
            (length,) = LENGTH.unpack(self._take(LENGTH.size))
            if length > most:
                raise ProtocolViolation(f"a message of {length} bytes from rank {self.rank} is over {most}")
            message = msgpack.unpackb(self._take(length), use_list=True)
        except PeerDown as error:
            raise WorkerLost(f"rank {self.rank} of the group is gone: {error}") from error
        except (ValueError, msgpack.exceptions.UnpackException) as error:
            raise ProtocolViolation(f"rank {self.rank} sent what is no msgpack: {error}") from error
        if not isinstance(message, list) or not message or not isinstance(message[0], str):
            raise ProtocolViolation(f"rank {self.rank} sent {message!r:.80}, which is no message")
        return message

    def send_fd(self, fd: int) -> None:
        try:
            socket.send_fds(self._channel.sock, [b"f"], [fd])
        except OSError as error:
            raise WorkerLost(f"rank {self.rank} of the group is gone: {error}") from error

    def receive_fd(self) -> int:
        try:
            _, fds, _, _ = socket.recv_fds(self._channel.sock, 1, 1)
        except OSError as error:
            raise WorkerLost(f"rank {self.rank} of the group is gone: {error}") from error
        if not fds:
            raise WorkerLost(f"rank {self.rank} of the group is gone: it sent no file descriptor")
        return fds[0]

    @property
    def is_local(self) -> bool:
        """Whether both ends are on one host."""
        return self._channel.is_local

    def settimeout(self, seconds: float | None) -> None:
        self._channel.settimeout(seconds)

    def set_deadline(self, deadline: float | None) -> None:
        """time.monotonic() by which all must be received, however slowly it comes. None: there is none any more."""
        self._channel.deadline = deadline
        self._channel.settimeout(None)

    def close(self) -> None:
        """End it, which wakes who waits at either end. Any thread."""
        self._channel.shutdown()

    def dispose(self) -> None:
        """End it and free the socket; for the thread that receives, or where none does."""
        self._channel.shutdown()
        with self._sending:
            self._channel.close()

    def _take(self, num_bytes: int) -> bytes:
        data = bytearray(num_bytes)
        self._channel.receive_into([memoryview(data)])
        return bytes(data)


@contextlib.contextmanager
def disposed_on_error(lines: Collection[Line]) -> Iterator[None]:
    """Of lines that nobody else holds yet."""
    try:
        yield
    except BaseException:
        for line in lines:
            line.dispose()
        raise


class Rendezvous:
    """Where rank 0 listens until every other rank has joined. Each who connects is greeted on a thread of its own, so
    that a stranger holds nobody up."""

    def __init__(self, host: str, token: str) -> None:
        self._token = token
        (self._tcp, tcp), (self._unix, unix) = listen_tcp(host), listen_unix()
        self.endpoint = json.dumps([host_id(), unix, tcp])
        self._come: queue.SimpleQueue[Line] = queue.SimpleQueue()  # those that have proved who they are
        self._greeting: list[threading.Thread] = []
        self._closed = False

    def joined(self, ranks: Sequence[int], deadline: float, give_up: Callable[[], bool]) -> dict[int, Line]:
        """Waits for all of them. deadline: time.monotonic(). Raises WorkerLost naming those that did not come."""
        lines: dict[int, Line] = {}
        with disposed_on_error(lines.values()):
            while missing := [rank for rank in ranks if rank not in lines]:
                if time.monotonic() >= deadline or give_up():
                    raise WorkerLost(f"ranks {missing} of the group did not join in time")
                self._accept()
                while not self._come.empty():
                    self._take(self._come.get(), missing, lines)
        return lines

    def one_of(self, ranks: Callable[[], Collection[int]], deadline: float, give_up: Callable[[], bool]) -> Line:
        """Waits for the first of these ranks, which may change meanwhile. Raises WorkerLost."""
        while time.monotonic() < deadline and not give_up():
            self._accept()
            while not self._come.empty():
                line = self._come.get()
                if line.rank in ranks():
                    return line
                line.dispose()
        raise WorkerLost(f"none of the ranks {sorted(ranks())} of the group joined in time")

    @staticmethod
    def _take(line: Line, missing: list[int], lines: dict[int, Line]) -> None:
        if line.rank in missing and line.rank not in lines:
            lines[line.rank] = line
        else:
            line.dispose()  # no rank of this group, or one that is here already

    def _accept(self) -> None:
        """Wait a moment for who connects."""
        self._greeting = [thread for thread in self._greeting if thread.is_alive()]
        if len(self._greeting) >= MOST_GREETED:
            time.sleep(LOOK_EVERY_S)
            return
        poll = select.poll()  # unlike `select` it takes file descriptors of any number
        listeners = {listener.fileno(): listener for listener in (self._tcp, self._unix)}
        for fd in listeners:
            poll.register(fd, select.POLLIN)
        for fd, _ in poll.poll(LOOK_EVERY_S * 1000):
            try:
                sock, _ = listeners[fd].accept()
            except OSError:  # for now there is no descriptor left
                time.sleep(LOOK_EVERY_S)
                continue
            thread = threading.Thread(target=self._greet, args=(Line(sock, -1), sock), name="rank-greet", daemon=True)
            self._greeting.append(thread)
            thread.start()

    def _greet(self, line: Line, sock: socket.socket) -> None:
        try:
            if line.is_local:
                os.close(vet_unix(sock))
            tune_tcp(sock)
            self._welcome(line)
        except (WorkerLost, ProtocolViolation, PeerDown, PeerMismatch, OSError):
            line.dispose()  # a stranger, or one that died; who is missing is named in the end
        else:
            self._come.put(line)
            if self._closed:
                self._dispose_all()

    def _welcome(self, line: Line) -> None:
        """Sets the line's rank."""
        challenge = nonce()
        line.set_deadline(time.monotonic() + JOIN_S)
        line.send("challenge", challenge)
        match line.receive(MOST_STRANGE_BYTES):
            case ["join", int(rank), bytes(theirs), bytes(given)] if 0 < rank < MOST_RANKS and proves(
                given, self._token, RANK, challenge, rank.to_bytes(4, "big")
            ):
                line.rank = rank
                line.send("welcome", proof(self._token, RANK_0, theirs))
                line.set_deadline(None)
                return
        raise ProtocolViolation("no rank of this cluster")

    def close(self) -> None:
        self._closed = True
        self._tcp.close()
        self._unix.close()
        self._dispose_all()

    def _dispose_all(self) -> None:
        """Of those that nobody has taken. Any thread."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._come.get_nowait().dispose()


def join(endpoint: str, rank: int, token: str, timeout_s: float) -> Line:
    """Connect to rank 0, which may not be ready for that yet. Raises WorkerLost, PeerDown, ProtocolViolation."""
    host, unix, tcp = json.loads(endpoint)
    sock = dial_unix(unix, DIAL_S) if host == host_id() else dial_tcp(tcp, DIAL_S)
    line, ours = Line(sock, 0), nonce()
    line.set_deadline(time.monotonic() + timeout_s)
    with disposed_on_error([line]):
        match line.receive(MOST_STRANGE_BYTES):
            case ["challenge", bytes(challenge)]:
                line.send("join", rank, ours, proof(token, RANK, challenge, rank.to_bytes(4, "big")))
        match line.receive(MOST_STRANGE_BYTES):
            case ["welcome", bytes(given)] if proves(given, token, RANK_0, ours):
                line.set_deadline(None)
                return line
        raise ProtocolViolation("what listens there is no rank 0 of this cluster")
