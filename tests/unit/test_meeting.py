"""Ranks that join rank 0, and strangers that come meanwhile."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import msgpack
import pytest

from tercet.distributed import line as module
from tercet.distributed.line import LENGTH, RANK, RANK_0, Line, Rendezvous, join
from tercet.errors import PeerDown, ProtocolViolation, WorkerLost
from tercet.secret import nonce, proof
from tercet.transfer.links.wires import listen_unix

TOKEN = "secret"
pool = ThreadPoolExecutor(16)


class Met:
    """A meeting whose rank 0 waits on a thread of its own."""

    def __init__(self) -> None:
        self.meeting, self.lines, self.closing = Rendezvous("127.0.0.1", TOKEN), list[Line](), False

    def waits(self, *ranks: int, within_s: float = 10.0) -> Future[dict[int, Line]]:
        return pool.submit(self.meeting.joined, ranks, time.monotonic() + within_s, lambda: self.closing)

    def joins(self, rank: int, token: str = TOKEN, endpoint: str = "", timeout_s: float = 10.0) -> Future[Line]:
        return pool.submit(join, endpoint or self.meeting.endpoint, rank, token, timeout_s)

    def greeted(self) -> None:
        """Who has joined is known: a rank hears that it is welcome a moment before rank 0 has it."""
        for thread in threading.enumerate():
            if thread.name == "rank-greet":
                thread.join(5)

    def stranger(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect("\0" + json.loads(self.meeting.endpoint)[1])
        return sock

    def elsewhere(self) -> str:
        """The endpoint as a rank on another host has it: by TCP."""
        return json.dumps(["another host", *json.loads(self.meeting.endpoint)[1:]])


@pytest.fixture
def met() -> Iterator[Met]:
    made = Met()
    yield made
    made.meeting.close()


def dispose(*lines: Line) -> None:
    for line in lines:
        line.dispose()


def told(sock: socket.socket) -> list[object]:
    (length,) = LENGTH.unpack(sock.recv(4, socket.MSG_WAITALL))
    return msgpack.unpackb(sock.recv(length, socket.MSG_WAITALL))


def tell(sock: socket.socket, *message: object) -> None:
    packed = msgpack.packb(message)
    sock.sendall(LENGTH.pack(len(packed)) + packed)


def is_refused(sock: socket.socket, within_s: float = 5.0) -> bool:
    sock.settimeout(within_s)
    with sock:
        try:
            return sock.recv(1) == b""
        except ConnectionResetError:
            return True


@pytest.mark.parametrize("by_tcp", [False, True])
def test_all_ranks_join_in_any_order_and_messages_go_both_ways(met, by_tcp):
    waiting = met.waits(1, 2, 3)
    endpoint = met.elsewhere() if by_tcp else met.meeting.endpoint
    theirs = {rank: met.joins(rank, endpoint=endpoint).result(5) for rank in (3, 1, 2)}
    ours = waiting.result(5)
    assert sorted(ours) == [1, 2, 3]
    for rank, line in ours.items():
        assert (line.rank, theirs[rank].rank) == (rank, 0)
        assert line.is_local is not by_tcp
        line.send("hello", rank, b"x" * 5000)
        assert theirs[rank].receive() == ["hello", rank, b"x" * 5000]
        theirs[rank].send("back")
        assert line.receive() == ["back"]
    dispose(*ours.values(), *theirs.values())


def test_a_file_goes_over_a_line_between_messages(met):
    waiting = met.waits(1)
    theirs, ours = met.joins(1).result(5), waiting.result(5)[1]
    fd = os.memfd_create("given")
    os.write(fd, b"content")
    ours.send("before")
    ours.send_fd(fd)
    ours.send("after")
    assert theirs.receive() == ["before"]
    given = theirs.receive_fd()
    assert theirs.receive() == ["after"]
    assert os.pread(given, 10, 0) == b"content"
    os.close(fd)
    os.close(given)
    ours.send("no file")
    with pytest.raises(WorkerLost, match="it sent no file descriptor"):
        theirs.receive_fd()
    dispose(ours, theirs)


def test_a_rank_may_come_long_before_rank_0_is_ready(met, monkeypatch):
    """Longer than a handshake may take, since that begins when rank 0 takes part in it."""
    monkeypatch.setattr(module, "JOIN_S", 0.3)
    coming = met.joins(1)
    time.sleep(0.8)
    ours = met.waits(1).result(5)
    dispose(coming.result(5), *ours.values())


def test_rank_0_that_never_answers_is_given_up(met):
    began = time.monotonic()
    with pytest.raises(WorkerLost, match="rank 0 of the group is gone"):
        met.joins(1, timeout_s=0.3).result(5)
    assert time.monotonic() - began < 2.0


@pytest.mark.parametrize("fault", ["token", "nobody"])
def test_who_does_not_join_is_named(met, fault):
    waiting = met.waits(1, 2, within_s=0.8)
    good = met.joins(1).result(5)
    if fault == "token":
        with pytest.raises(WorkerLost, match="rank 0 of the group is gone"):
            met.joins(2, token="another").result(5)
    with pytest.raises(WorkerLost, match=r"ranks \[2\] of the group did not join in time"):
        waiting.result(5)
    with pytest.raises(WorkerLost):
        good.receive()  # it hears that the others did not come
    good.dispose()


def test_waiting_ends_when_the_worker_closes(met):
    waiting = met.waits(1)
    time.sleep(0.1)
    met.closing = True
    with pytest.raises(WorkerLost, match=r"ranks \[1\]"):
        waiting.result(1)


def test_rank_0_that_has_no_descriptor_left_waits_for_one(met, monkeypatch):
    refusals, accept = [OSError(errno.EMFILE, "Too many open files")] * 3, socket.socket.accept

    def accepts(listener: socket.socket) -> tuple[socket.socket, object]:
        if refusals:
            raise refusals.pop()
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", accepts)
    waiting = met.waits(1)
    dispose(met.joins(1).result(5), *waiting.result(5).values())
    assert not refusals


def test_strangers_that_say_nothing_or_too_little_hold_nobody_up(met):
    """Each would cost a whole handshake if they were served one after the other."""
    waiting = met.waits(1, 2)
    silent = [met.stranger() for _ in range(20)]
    for sock in silent[::2]:
        sock.sendall(LENGTH.pack(100) + b"x")
    time.sleep(0.2)
    began = time.monotonic()
    theirs = [met.joins(1).result(5), met.joins(2, endpoint=met.elsewhere()).result(5)]
    ours = waiting.result(5)
    assert time.monotonic() - began < 1.5
    assert all(told(sock)[0] == "challenge" and is_refused(sock) for sock in silent)
    dispose(*theirs, *ours.values())


def trickle(sock: socket.socket) -> None:
    for byte in LENGTH.pack(900) + bytes(100):
        sock.send(bytes([byte]))
        time.sleep(0.05)


def test_who_sends_byte_by_byte_is_given_up_after_a_handshakes_time(met, monkeypatch):
    monkeypatch.setattr(module, "JOIN_S", 0.5)
    waiting, slow = met.waits(1), met.stranger()
    assert told(slow)[0] == "challenge"
    began = time.monotonic()
    with pytest.raises(OSError, match=r"[Bb]roken pipe|reset"):
        trickle(slow)
    assert time.monotonic() - began < 2.0
    slow.close()
    dispose(met.joins(1).result(5), *waiting.result(5).values())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        LENGTH.pack(1 << 31),
        LENGTH.pack(1 << 20) + bytes(2000),  # a proof is no larger than this, and no memory is taken for what is
        LENGTH.pack(3) + b"\xc1\xc1\xc1",
        LENGTH.pack(1) + b"\x90",
    ],
)
def test_garbage_is_refused_and_the_ranks_join(met, data):
    waiting, sock = met.waits(1), met.stranger()
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
    told(sock)
    assert is_refused(sock)
    dispose(met.joins(1).result(5), *waiting.result(5).values())


def test_proofs_of_something_else_are_refused(met):
    def of(secret: str, who: bytes, challenge: bytes, rank: int) -> bytes:
        return proof(secret, who, challenge, rank.to_bytes(4, "big"))

    waiting, other = met.waits(1), nonce()
    forged = [
        lambda c: ["join", 1, other, of("another", RANK, c, 1)],  # another secret
        lambda c: ["join", 1, other, of(TOKEN, RANK, other, 1)],  # another challenge: a replay
        lambda c: ["join", 1, other, of(TOKEN, RANK_0, c, 1)],  # what rank 0 would say
        lambda c: ["join", 1, other, of(TOKEN, RANK, c, 2)],  # another rank
        lambda c: ["join", 0, other, of(TOKEN, RANK, c, 0)],  # rank 0 itself
        lambda c: ["join", 1 << 16, other, of(TOKEN, RANK, c, 1 << 16)],
        lambda c: ["join", 1, other, b""],
        lambda c: ["join", 1, "text", of(TOKEN, RANK, c, 1)],
        lambda c: ["welcome", of(TOKEN, RANK, c, 1)],
    ]
    for made in forged:
        sock = met.stranger()
        _, challenge = told(sock)
        tell(sock, *made(challenge))
        assert is_refused(sock)
    dispose(met.joins(1).result(5), *waiting.result(5).values())


def test_who_listens_in_the_place_of_rank_0_is_refused():
    """It knows no secret, so it has no proof, and gets none that is good anywhere else."""
    listener, address = listen_unix()
    endpoint = json.dumps([module.host_id(), address, ""])
    for answer in (lambda given: given, lambda _: b"", lambda _: proof("another", RANK_0, b"")):
        coming = pool.submit(join, endpoint, 1, TOKEN, 5.0)
        sock, _ = listener.accept()
        tell(sock, "challenge", nonce())
        _, _, _, given = told(sock)
        tell(sock, "welcome", answer(given))
        with pytest.raises(ProtocolViolation, match="no rank 0 of this cluster"):
            coming.result(5)
        sock.close()
    listener.close()


def test_nobody_listens():
    listener, address = listen_unix()
    listener.close()
    with pytest.raises(PeerDown):
        join(json.dumps([module.host_id(), address, ""]), 1, TOKEN, 5.0)


def test_a_rank_that_is_here_already_and_one_of_no_group_are_sent_away(met):
    waiting = met.waits(1, 2)
    first = met.joins(1).result(5)
    met.greeted()
    for rank in (1, 7):
        second = met.joins(rank).result(5)
        with pytest.raises(WorkerLost, match="rank 0 of the group is gone"):
            second.receive()
        second.dispose()
    last, ours = met.joins(2).result(5), waiting.result(5)
    ours[1].send("hello")
    assert first.receive() == ["hello"]
    dispose(first, last, *ours.values())


def test_a_rank_that_died_may_not_keep_the_others_from_joining(met):
    """It is noticed by its talk."""
    waiting = met.waits(1, 2)
    dead = met.joins(1).result(5)
    dead.dispose()
    last, ours = met.joins(2).result(5), waiting.result(5)
    with pytest.raises(WorkerLost, match="rank 1 of the group is gone"):
        ours[1].receive()
    dispose(last, *ours.values())


def test_more_strangers_than_are_greeted_at_once_only_wait(met, monkeypatch):
    monkeypatch.setattr(module, "MOST_GREETED", 4)
    monkeypatch.setattr(module, "JOIN_S", 0.3)
    waiting, strangers = met.waits(1), [met.stranger() for _ in range(12)]
    threads = threading.active_count()
    line = met.joins(1).result(8)
    assert threading.active_count() - threads <= 4 + 1
    dispose(line, *waiting.result(5).values())
    for sock in strangers:
        sock.close()


@pytest.mark.parametrize("number", range(20))
def test_who_has_joined_and_is_not_taken_is_let_go_by_the_end(met, number):
    """Also one whose handshake ends after that."""
    came = met.joins(1)
    while not met.meeting._greeting:
        met.meeting._accept()
    time.sleep(number * 0.0001)
    met.meeting.close()
    line = came.result()
    line.settimeout(5)
    with pytest.raises(WorkerLost, match=r"closed|reset"):
        line.receive()
    line.dispose()
