"""What two ranks say to each other over a real socket, and how each end of it is noticed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgpack
import pytest

from tercet.distributed import talk
from tercet.distributed.line import LENGTH, MOST_BYTES, Line
from tercet.distributed.talk import ANSWERS, Talk
from tercet.errors import InternalError, PeerMismatch, ProtocolViolation, WorkerLost

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12
BEAT_S, SILENT_S = 0.1, 1.0


@pytest.fixture(autouse=True)
def _quicker(monkeypatch):
    monkeypatch.setattr(talk, "BEAT_S", BEAT_S)
    monkeypatch.setattr(talk, "SILENT_S", SILENT_S)


class End:
    """One end of a talk, and what it has heard."""

    def __init__(self, sock: socket.socket, rank: int) -> None:
        self.ended: list[WorkerLost] = []
        self.heard: list[Any] = []
        self.over = threading.Event()
        self.resume = threading.Event()  # lets go who asks to "wait"
        self.talk = Talk(Line(sock, rank), self._on_end)
        told = {
            "say": self.heard.append,
            "fail": self._fail,
            "hold": lambda: self.resume.wait(10),
            "die": lambda: os._exit(0),
        }
        asked = {"double": lambda x: 2 * x, "fail": self._fail, "wait": self._wait, "set": lambda: {1, 2}}
        self.talk.start(told, asked)

    def _on_end(self, error: WorkerLost) -> None:
        self.ended.append(error)
        self.over.set()

    def _fail(self, name: str) -> None:
        raise {"mismatch": PeerMismatch, "assertion": AssertionError, "runtime": RuntimeError}[name](f"no {name}")

    def _wait(self) -> str:
        assert self.resume.wait(10)
        return "done"

    def assert_ended(self, match: str, within_s: float = 1.0) -> None:
        """Once, and for good."""
        assert self.over.wait(within_s)
        time.sleep(2 * BEAT_S)
        assert len(self.ended) == 1
        assert match in str(self.ended[0])
        self.talk.tell("say", "into the void")
        began = time.monotonic()
        with pytest.raises(WorkerLost, match=f"rank {self.talk.rank} of the group is gone"):
            self.talk.ask("double", 1, timeout_s=10)
        assert time.monotonic() - began < 1.0


@pytest.fixture
def ends() -> Iterator[tuple[End, End]]:
    """At rank 0, and at rank 1."""
    ours, theirs = socket.socketpair()
    made = End(ours, 1), End(theirs, 0)
    yield made
    for end in made:
        end.resume.set()
        end.talk.close()


@pytest.fixture
def raw() -> Iterator[tuple[End, socket.socket]]:
    """A talk, and the bare socket at the other end of it."""
    ours, theirs = socket.socketpair()
    end = End(ours, 1)
    with theirs:
        yield end, theirs
    end.talk.close()


def until(condition, within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_is_told_is_heard_in_order_both_ways(ends):
    for number in range(2000):
        for end in ends:
            end.talk.tell("say", number)
    for end in ends:
        until(lambda end=end: len(end.heard) == 2000)
        assert end.heard == list(range(2000))


def test_what_one_thread_tells_stays_in_order_among_others(ends):
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda who: [ends[0].talk.tell("say", [who, n, b"x" * 3000]) for n in range(200)], range(4)):
            pass
    until(lambda: len(ends[1].heard) == 800)
    for who in range(4):
        assert [n for teller, n, _ in ends[1].heard if teller == who] == list(range(200))


def test_each_of_many_questions_gets_its_answer(ends):
    with ThreadPoolExecutor(16) as pool:
        answers = pool.map(lambda n: ends[n % 2].talk.ask("double", n, timeout_s=10), range(400))
        assert list(answers) == [2 * n for n in range(400)]


def test_a_slow_answer_holds_up_neither_other_questions_nor_what_is_told(ends):
    with ThreadPoolExecutor(ANSWERS) as pool:
        slow = [pool.submit(ends[0].talk.ask, "wait", timeout_s=10) for _ in range(ANSWERS - 1)]
        assert ends[0].talk.ask("double", 4, timeout_s=10) == 8
        ends[0].talk.tell("say", "meanwhile")
        until(lambda: ends[1].heard == ["meanwhile"])
        ends[1].resume.set()
        assert [answer.result() for answer in slow] == ["done"] * (ANSWERS - 1)


def test_an_error_is_raised_by_its_name_where_it_was_asked(ends):
    with pytest.raises(PeerMismatch, match="no mismatch"):
        ends[0].talk.ask("fail", "mismatch", timeout_s=10)
    for question in (("fail", "runtime"), ("no such question",), ("double",), ("set",)):  # a set is no msgpack
        with pytest.raises(InternalError, match="unexpected"):
            ends[0].talk.ask(*question, timeout_s=10)
    assert ends[0].talk.ask("double", 1, timeout_s=10) == 2  # it goes on


def test_who_does_not_answer_in_time_is_named_and_a_late_answer_is_nobodys(ends):
    with pytest.raises(WorkerLost, match=r"rank 1 of the group did not answer wait in 0\.1 s"):
        ends[0].talk.ask("wait", timeout_s=0.1)
    ends[1].resume.set()
    for n in range(50):
        assert ends[0].talk.ask("double", n, timeout_s=10) == 2 * n
    assert not ends[0].ended


def test_a_message_that_is_too_large_is_refused_and_the_talk_goes_on(ends):
    for send in (ends[0].talk.tell, lambda *message: ends[0].talk.ask(*message, timeout_s=10)):
        with pytest.raises(ProtocolViolation, match=f"over {MOST_BYTES}"):
            send("say", bytes(MOST_BYTES))
    large = bytes(MOST_BYTES - 100)
    ends[0].talk.tell("say", large)
    until(lambda: ends[1].heard == [large], 20)


def test_both_ends_of_a_broken_connection_hear_once(ends):
    ends[0].talk._line.close()
    ends[0].assert_ended("rank 1 of the group is gone")
    ends[1].assert_ended("rank 0 of the group is gone")


def test_who_closes_hears_nothing_and_the_other_end_hears_once(ends):
    ends[0].talk.close()
    ends[0].talk.close()
    ends[1].assert_ended("rank 0 of the group is gone")
    assert not ends[0].ended


@pytest.mark.parametrize("how", ["close", "break"])
def test_who_waits_for_an_answer_is_let_go_at_the_end(ends, how):
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(ends[0].talk.ask, "wait", timeout_s=30) for _ in range(3)]
        until(lambda: len(ends[0].talk._awaited) == 3)
        began = time.monotonic()
        ends[0].talk.close() if how == "close" else ends[1].talk.close()
        for answer in waiting:
            with pytest.raises(WorkerLost, match="rank 1 of the group"):
                answer.result(10)
        assert time.monotonic() - began < 1.0


def framed(packed: bytes) -> bytes:
    return LENGTH.pack(len(packed)) + packed


@pytest.mark.parametrize(
    "data",
    [
        framed(b"\xc1"),  # no msgpack
        framed(b""),
        framed(msgpack.packb({"say": 1})),
        framed(msgpack.packb([])),
        framed(msgpack.packb([7, 8])),
        framed(msgpack.packb(["no such thing"])),
        framed(msgpack.packb(["say", 1, 2])),
        framed(msgpack.packb(["answer"])),
        framed(msgpack.packb(["ask"])),
        framed(msgpack.packb(["fail", "mismatch"])),
        framed(msgpack.packb(["fail", "assertion"])),
        framed(msgpack.packb(["fail", "runtime"])),
        framed(msgpack.packb(["say", 1]) + b"x"),
        LENGTH.pack(MOST_BYTES + 1),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_a_message_that_is_not_understood_ends_the_talk(raw, data):
    raw[1].sendall(data)
    raw[0].assert_ended("rank 1 ")


def test_an_answer_to_no_question_is_passed_over(raw):
    raw[1].sendall(framed(msgpack.packb(["answer", 99, 1, None])) + framed(msgpack.packb(["say", 1])))
    until(lambda: raw[0].heard == [1])


def test_the_end_is_heard_behind_what_came_before_though_nothing_can_be_told(raw):
    for message in (["hold"], ["say", 1]):
        raw[1].sendall(framed(msgpack.packb(message)))
    raw[1].close()
    time.sleep(3 * BEAT_S)
    assert not raw[0].ended
    raw[0].resume.set()
    until(lambda: raw[0].heard == [1])
    raw[0].assert_ended("rank 1 of the group is gone")


def test_half_a_message_and_then_nothing_ends_the_talk(raw):
    raw[1].sendall(framed(msgpack.packb(["say", 1]))[:-1])
    raw[0].assert_ended("rank 1 of the group is gone", SILENT_S + 1)


def test_who_takes_nothing_ends_the_talk(raw):
    """Its buffer is full, so what is told waits; it is not silent."""
    stopped = threading.Event()

    def beat() -> None:
        while not stopped.wait(BEAT_S):
            raw[1].send(framed(msgpack.packb(["beat"])))

    beating = threading.Thread(target=beat)
    beating.start()
    began = time.monotonic()
    raw[0].talk.tell("say", bytes(16 << 20))
    stopped.set()
    beating.join()
    assert time.monotonic() - began < SILENT_S + 2
    raw[0].assert_ended("rank 1 of the group is gone")


def other_process(ours: socket.socket, theirs: socket.socket) -> multiprocessing.Process:
    def run() -> None:
        ours.close()
        End(theirs, 0).over.wait(60)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=run, daemon=True)
    process.start()
    theirs.close()
    return process


@pytest.mark.parametrize(("number", "within_s"), [(signal.SIGKILL, 0.5), (signal.SIGSTOP, SILENT_S + 0.5)])
def test_a_process_that_dies_or_is_stopped_ends_the_talk(number, within_s):
    sockets = socket.socketpair()
    process = other_process(*sockets)
    end = End(sockets[0], 1)
    try:
        assert end.talk.ask("double", 4, timeout_s=10) == 8
        time.sleep(2 * BEAT_S)
        assert not end.ended
        os.kill(process.pid, number)
        end.assert_ended("rank 1 of the group is gone", within_s)
    finally:
        end.talk.close()
        process.kill()
        process.join()


def test_a_quiet_talk_goes_on(ends):
    time.sleep(SILENT_S + 0.5)
    assert ends[0].talk.ask("double", 4, timeout_s=10) == 8
    assert not ends[0].ended
    assert not ends[1].ended
