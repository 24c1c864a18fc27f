"""Whoever gets the signal, whichever it is, and in whatever phase: what runs ends in order, and nothing is left."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tercet.cluster.signals import Signals
from tercet.errors import TercetError
from tests.machine import SMALL, Machine, Served, begin, new_machine, serve, until

ENDS_IN_S = 10.0  # when nothing runs long


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = new_machine()
    yield made
    made.clear()


class Story(threading.Thread):
    """A stream that is being read; how it ended lies in `tokens` or `error`."""

    def __init__(self, served: Served, max_tokens: int) -> None:
        super().__init__()
        self._served = served
        self._max_tokens = max_tokens
        self.begun = threading.Event()
        self.tokens = 0
        self.error: TercetError | None = None
        self.start()
        assert self.begun.wait(30)

    def run(self) -> None:
        asked = {"max_tokens": self._max_tokens, "temperature": 0, "ignore_eos": True}
        try:
            with self._served.client().stream("Tell me a long story.", **asked) as answer:
                for _ in answer:
                    self.begun.set()
            self.tokens = answer.result.usage["completion_tokens"]
        except TercetError as error:
            self.error = error


def ended(served: Served, began: float) -> int:
    """The exit code, once nothing is left of it."""
    code = served.process.wait(ENDS_IN_S)
    until(lambda: not served.machine.left(), ENDS_IN_S)
    assert time.monotonic() - began < ENDS_IN_S
    assert not list(served.machine.folder.glob("tercet-*/*"))
    assert "Traceback" not in served.log
    return code


def alone(served: Served, number: signal.Signals) -> None:
    os.kill(served.process.pid, number)


def group(served: Served, number: signal.Signals) -> None:
    os.killpg(served.process.pid, number)


def everyone(served: Served, number: signal.Signals) -> None:
    """As a service manager does, and then its child once more."""
    for pid in served.machine.left():
        os.kill(pid, number)
    os.kill(served.process.pid, number)


@pytest.mark.ray
@pytest.mark.timeout(170)
def test_a_stream_ends_whole_when_every_process_is_told_to_end(machine):
    served = serve(machine, "all", *SMALL, "limits.drain_timeout_s=60")
    story = Story(served, 60)
    everyone(served, signal.SIGTERM)
    story.join(60)
    began = time.monotonic()
    assert (story.error, story.tokens) == (None, 60)
    assert ended(served, began) == 0
    assert served.log.endswith("tercet: draining; once more ends at once\ntercet: cluster all is down\n")


@pytest.mark.ray
@pytest.mark.timeout(170)
def test_a_second_signal_ends_a_drain_and_the_stream_knows_why(machine):
    served = serve(machine, "two", *SMALL, "limits.drain_timeout_s=60")
    story = Story(served, 900)
    group(served, signal.SIGINT)
    until(lambda: "draining" in served.log)
    time.sleep(1.2)  # sooner it is taken for the same word
    began = time.monotonic()
    alone(served, signal.SIGTERM)
    assert ended(served, began) == 0
    story.join(5)
    assert story.error is not None
    assert "the gateway is stopping" in str(story.error)


@pytest.mark.ray
@pytest.mark.timeout(170)
@pytest.mark.parametrize(
    ("phase", "send", "number"),
    [
        (lambda served: list(served.machine.folder.glob("tercet-*/ray-*/start.log")), group, signal.SIGINT),
        (lambda served: "started Ray" in served.log, everyone, signal.SIGHUP),
    ],
    ids=["ray starts", "members start"],
)
def test_a_signal_before_it_stands_leaves_nothing(
    machine, phase: Callable[[Served], object], send: Callable[[Served, signal.Signals], None], number: signal.Signals
):
    served = begin(machine, "early", *SMALL)
    until(lambda: phase(served))
    began = time.monotonic()
    send(served, number)
    assert ended(served, began) == 130
    assert "ready" not in served.log
    assert "ending before it stands" in served.log


def test_a_signal_before_anything_has_begun_is_an_interruption():
    code = "import os; from tercet.cluster.signals import Signals; Signals(print).install(); os.kill(os.getpid(), {})"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        done = subprocess.run([sys.executable, "-c", code.format(number)], capture_output=True, text=True, check=False)
        assert "KeyboardInterrupt" in done.stderr


def test_sighup_stays_ignored_where_it_was():
    code = (
        "import os, signal; from tercet.cluster.signals import Signals; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
        "Signals(print).install(); os.kill(os.getpid(), signal.SIGHUP)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


async def test_the_same_word_twice_is_one_word(monkeypatch):
    told: list[str] = []
    signals = Signals(told.append)
    signals.attach()
    signals._handle(signal.SIGTERM, None)
    signals._handle(signal.SIGINT, None)
    await asyncio.sleep(0)
    assert (signals.stop.is_set(), signals.kill.is_set()) == (True, False)
    monkeypatch.setattr("tercet.cluster.signals.SAME_WORD_S", 0.0)
    signals._handle(signal.SIGTERM, None)
    await asyncio.sleep(0)
    assert signals.kill.is_set()
    assert len(told) == 1


async def test_a_signal_is_heard_though_its_word_cannot_be_written(monkeypatch):
    def unread(line: str) -> None:
        raise BrokenPipeError

    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    signals = Signals(unread)
    signals.attach()
    monkeypatch.setattr("tercet.cluster.signals.SAME_WORD_S", 0.0)
    for _ in range(2):
        signals._handle(signal.SIGHUP, None)
        await asyncio.sleep(0)
    assert (signals.stop.is_set(), signals.kill.is_set()) == (True, True)


@pytest.mark.ray
@pytest.mark.timeout(170)
def test_a_stream_hears_that_it_ends_when_the_node_below_it_dies(machine):
    served = serve(machine, "node", *SMALL, "ray.lost_after_s=1")
    story = Story(served, 900)
    raylet = next(pid for pid, command in machine.left().items() if "raylet/raylet" in command)
    began = time.monotonic()
    os.kill(raylet, signal.SIGKILL)
    story.join(60)
    assert story.error is not None
    assert "the gateway is stopping" in str(story.error)
    assert ended(served, began) == 1
