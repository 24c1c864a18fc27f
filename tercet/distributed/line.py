"""The connection between rank 0 of a group and another rank: small messages in order, both ways.

    rank 0  ─Challenge(nonce)─>            rank
            <─Join(rank, nonce, proof)─
            ─Welcome(proof, fields)─>      then [kind, *fields] in either direction

Each proves that it knows the cluster's secret (tercet/secret.py). Within a host it is a Unix socket, over which file
descriptors go too; else TCP. A message is a msgpack list behind its length; there is no pickle.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgpack

from tercet.errors import PeerDown, PeerMismatch, ProtocolViolation, WorkerLost
from tercet.secret import nonce, proof, proves
from tercet.transfer.links.channel import Channel
from tercet.transfer.links.wires import dial_tcp, dial_unix, host_id, listen_tcp, listen_unix, tune_tcp, vet_unix

LENGTH = struct.Struct("<I")
MOST_BYTES = 64 << 20  # of a message: a step's plan carries token ids and block tables
JOIN_S = 2.0  # for a handshake
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

    def receive(self) -> Message:
        """Raises ProtocolViolation for what is no message."""
        try:
            (length,) = LENGTH.unpack(self._take(LENGTH.size))
            if length > MOST_BYTES:
                raise ProtocolViolation(f"a message of {length} bytes from rank {self.rank} is over {MOST_BYTES}")
            message = msgpack.unpackb(self._take(length), use_list=True)
        except PeerDown as error:
            raise WorkerLost(f"rank {self.rank} of the group is gone: {error}") from error
        except (ValueError, msgpack.exceptions.UnpackException) as error:
            raise ProtocolViolation(f"rank {self.rank} sent what is no msgpack: {error}") from error
        if not isinstance(message, list) or not message or not isinstance(message[0], str):
            raise ProtocolViolation(f"rank {self.rank} sent {message!r:.80}, which is no message")
        return message

    def send_fd(self, fd: int) -> None:
        socket.send_fds(self._channel.sock, [b"f"], [fd])

    def receive_fd(self) -> int:
        _, fds, _, _ = socket.recv_fds(self._channel.sock, 1, 1)
        if not fds:
            raise WorkerLost(f"rank {self.rank} of the group is gone: it sent no file descriptor")
        return fds[0]

    @property
    def is_local(self) -> bool:
        """Whether both ends are on one host."""
        return self._channel.sock.family == socket.AF_UNIX

    def settimeout(self, seconds: float | None) -> None:
        self._channel.settimeout(seconds)

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


class Rendezvous:
    """Where rank 0 listens until every other rank has joined."""

    def __init__(self, host: str, token: str) -> None:
        self._token = token
        (self._tcp, tcp), (self._unix, unix) = listen_tcp(host), listen_unix()
        self.endpoint = json.dumps([host_id(), unix, tcp])

    def joined(self, ranks: Sequence[int], deadline: float, give_up: Callable[[], bool]) -> dict[int, Line]:
        """Waits for all of them. deadline: time.monotonic(). Raises WorkerLost naming those that did not come."""
        lines: dict[int, Line] = {}
        try:
            while missing := [rank for rank in ranks if rank not in lines]:
                line = self._next(deadline, give_up)
                if line is not None and line.rank in missing:
                    lines[line.rank] = line
                elif time.monotonic() >= deadline or give_up():
                    raise WorkerLost(f"ranks {missing} of the group did not join in time")
        except BaseException:
            for line in lines.values():
                line.close()
            raise
        return lines

    def _next(self, deadline: float, give_up: Callable[[], bool]) -> Line | None:
        ready: list[socket.socket] = []
        while not ready and time.monotonic() < deadline and not give_up():
            ready, _, _ = select.select([self._tcp, self._unix], [], [], 0.1)
        if not ready:
            return None
        sock, _ = ready[0].accept()
        try:
            if sock.family == socket.AF_UNIX:
                os.close(vet_unix(sock))
            else:
                tune_tcp(sock)
            return self._welcomed(sock)
        except (WorkerLost, ProtocolViolation, PeerDown, PeerMismatch, OSError):
            sock.close()  # a stranger, or one that died; who is missing is named in the end
            return None

    def _welcomed(self, sock: socket.socket) -> Line:
        sock.settimeout(JOIN_S)
        line, challenge = Line(sock, -1), nonce()
        line.send("challenge", challenge)
        match line.receive():
            case ["join", int(rank), bytes(theirs), bytes(given)] if 0 < rank < MOST_RANKS and proves(
                given, self._token, RANK, challenge, rank.to_bytes(4, "big")
            ):
                line.rank = rank
                line.send("welcome", proof(self._token, RANK_0, theirs))
                line.settimeout(None)
                return line
        raise ProtocolViolation("no rank of this cluster")

    def close(self) -> None:
        self._tcp.close()
        self._unix.close()


def join(endpoint: str, rank: int, token: str) -> Line:
    """Connect to rank 0. Raises WorkerLost, PeerDown, ProtocolViolation."""
    host, unix, tcp = json.loads(endpoint)
    sock = dial_unix(unix, DIAL_S) if host == host_id() else dial_tcp(tcp, DIAL_S)
    line, ours = Line(sock, 0), nonce()
    line.settimeout(JOIN_S)
    match line.receive():
        case ["challenge", bytes(challenge)]:
            line.send("join", rank, ours, proof(token, RANK, challenge, rank.to_bytes(4, "big")))
    match line.receive():
        case ["welcome", bytes(given)] if proves(given, token, RANK_0, ours):
            line.settimeout(None)
            return line
    raise ProtocolViolation("what listens there is no rank 0 of this cluster")
