"""A real writer process, killed, stopped and cut off in mid-write, over every transport."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest

from tercet.errors import TercetError
from tercet.transfer.memory.layout import KvLayout
from tercet.transfer.memory.region import Region
from tercet.transfer.protocol import facts
from tests.movers import CLASSES, LAYOUT, Receiving, fill, names, ticket_of

LEASE_S = 1.5
SOURCE, DESTINATION = [0, 2, 4, 6], [7, 5, 3, 1]
MARK = b"\xa5"  # what the next owner of a block writes into it

NAMES = names()
ALONE = "TERCET_TEST_ALONE"
OWN = pytest.mark.skipif(ALONE not in os.environ, reason="test_nixl_between_hosts runs it in a process of its own")
NIXL = ("nixl", "nixl_gpu_fake")
NETWORK = [
    pytest.param(*param.values, marks=[*param.marks, OWN] if param.values[0] in NIXL else param.marks)
    for param in NAMES
    if not CLASSES[param.values[0]].one_host
]


class Writer:
    """tests/movers.py in a process of its own, behind the command `inside`, such as one that enters a namespace."""

    def __init__(self, transport: str, *inside: str, layout: KvLayout = LAYOUT) -> None:
        arguments = [transport, str(LEASE_S), json.dumps(asdict(layout))]
        command = [*inside, sys.executable, "-m", "tests.movers", *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.told: queue.Queue[list[Any]] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self.pid = self.next("up")[1]

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(ValueError):  # closed by `end`
            for line in self.process.stdout:
                if line.startswith("["):
                    self.told.put(json.loads(line))

    def say(self, *words: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()

    def next(self, kind: str, seconds: float = 30.0) -> list[Any]:
        event = self.told.get(timeout=seconds)
        assert event[0] == kind, event
        return event

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


class Scene:
    """A receiver here, a writer there, and one request of four blocks between them."""

    def __init__(self, transport: str, host: str = "127.0.0.1", inside: tuple[str, ...] = ()) -> None:
        self.receiver = Receiving(transport, host=host, lease_s=LEASE_S)
        self.expected = Region(LAYOUT)
        fill(self.expected, 1)
        self.writer = Writer(transport, *inside)

    def grant(self, number: int = 0) -> None:
        self.receiver.mover.admit(ticket_of(number), 0, DESTINATION)
        self.writer.say("open", ticket_of(number), self.receiver.endpoint, 64)
        self.writer.next("Granted")

    def until_half(self) -> None:
        self.grant()
        self.writer.say("halt")
        self.writer.say("push_all", ticket_of(), SOURCE)
        self.writer.next("half")

    def whole(self, number: int) -> None:
        """One request that nothing disturbs."""
        self.grant(number)
        self.writer.say("push_all", ticket_of(number), SOURCE)
        self.receiver.next(facts.Noted)
        self.receiver.next(facts.Complete)
        for source, destination in zip(SOURCE, DESTINATION, strict=True):
            for layer in LAYOUT.window:
                assert self.receiver.region.block(layer, destination) == self.expected.block(layer, source)

    def reuse(self) -> None:
        """The blocks are somebody else's now."""
        for layer in LAYOUT.window:
            for block in DESTINATION:
                self.receiver.region.block(layer, block)[:] = MARK * LAYOUT.block_bytes

    def untouched(self) -> bool:
        return all(
            self.receiver.region.block(layer, block) == MARK * LAYOUT.block_bytes
            for layer in LAYOUT.window
            for block in DESTINATION
        )

    def end(self) -> None:
        self.writer.end()
        self.receiver.stop()
        self.expected.close()


@pytest.fixture(params=NAMES)
def scene(request) -> Iterator[Scene]:
    made = Scene(request.param)
    yield made
    made.end()


def test_a_killed_writer_frees_its_blocks_at_once_and_none_changes_later(scene):
    scene.until_half()
    scene.writer.signal(signal.SIGKILL)
    began = time.monotonic()
    scene.receiver.next(facts.ReceiveFailed)
    scene.receiver.next(facts.Quiesced)
    assert time.monotonic() - began < 2 * LEASE_S + 2
    scene.reuse()
    time.sleep(0.3)
    assert scene.untouched()


def test_a_stopped_writer_cannot_change_a_block_that_is_free(scene):
    """It is noticed within the lease. A transport that can fence frees the blocks then; one that cannot keeps them in
    quarantine until the writer goes on and says that it has ended."""
    scene.until_half()
    scene.writer.signal(signal.SIGSTOP)
    began = time.monotonic()
    assert "no word" in str(scene.receiver.next(facts.ReceiveFailed).error)
    assert LEASE_S * 0.5 < time.monotonic() - began < LEASE_S * 2 + 1
    fenced = CLASSES[scene.receiver.mover._transports.copy().popitem()[0]].fenceable
    if not fenced:
        with pytest.raises(queue.Empty):
            scene.receiver.events.get(timeout=2 * LEASE_S)
        scene.writer.signal(signal.SIGCONT)
        scene.writer.say("go")
    assert scene.receiver.next(facts.Quiesced, 20).ticket == ticket_of()
    scene.reuse()
    if fenced:
        scene.writer.signal(signal.SIGCONT)
        scene.writer.say("go")
    ends = [scene.writer.told.get(timeout=20)[0] for _ in range(2)]
    assert ends == ["SendFailed", "OpDone"]
    time.sleep(0.3)
    assert scene.untouched()
    scene.whole(1)  # and the two can still speak with each other


def test_a_killed_receiver_fails_the_writer_which_goes_on(scene):
    """The survivor keeps its process, and serves the next incarnation."""
    scene.grant()
    scene.receiver.stop()
    assert [scene.writer.told.get(timeout=20)[0] for _ in range(2)] == ["SendFailed", "OpDone"]
    scene.receiver = Receiving(next(iter(scene.receiver.mover._transports)), lease_s=LEASE_S)
    scene.whole(2)


def test_a_cancelled_request_of_a_stalled_writer_waits_for_its_word(scene):
    """The receiver gives up first; the blocks are free when the write that is under way has ended."""
    scene.until_half()
    scene.receiver.mover.cancel(ticket_of(), TercetError("cancelled"))
    scene.receiver.next(facts.ReceiveFailed)
    if CLASSES[next(iter(scene.receiver.mover._transports))].one_sided:
        with pytest.raises(queue.Empty):
            scene.receiver.events.get(timeout=0.3)
    scene.writer.say("go")
    scene.receiver.next(facts.Quiesced, 10)
    scene.reuse()
    time.sleep(0.3)
    assert scene.untouched()


# ---- a network that is cut and shaped: two namespaces and a veth pair


HERE, THERE = (f"10.99.{os.getpid() % 250}.{n}" for n in (1, 2))  # two runs at once do not meet


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def two_hosts(monkeypatch) -> Iterator[tuple[str, ...]]:
    """-> the command that enters the other host. Skips where the machine forbids namespaces."""
    name = f"tercet{os.getpid()}"
    here, there = f"tc{os.getpid()}a"[:15], f"tc{os.getpid()}b"[:15]
    try:
        _run("ip", "netns", "add", name)
        _run("ip", "link", "add", here, "type", "veth", "peer", "name", there, "netns", name)
        _run("ip", "addr", "add", f"{HERE}/24", "dev", here)
        _run("ip", "link", "set", here, "up")
        for words in (
            ["addr", "add", f"{THERE}/24", "dev", there],
            ["link", "set", there, "up"],
            ["link", "set", "lo", "up"],
        ):
            _run("ip", "-n", name, *words)
    except (OSError, subprocess.CalledProcessError) as error:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        pytest.skip(f"this machine forbids network namespaces: {error}")
    # What UCX may take for shared memory between these two "hosts" is none.
    monkeypatch.setenv("UCX_TLS", "tcp")
    # Nor is the loopback a way between them: UCX takes one kernel for one host.
    monkeypatch.setenv("UCX_NET_DEVICES", "^lo")
    # IPC and PID namespaces too, or shared memory and CMA would cross the border.
    yield (here, "ip", "netns", "exec", name, "unshare", "--ipc", "--pid", "--fork", "--mount-proc", "--kill-child")
    subprocess.run(["ip", "link", "del", here], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@contextlib.contextmanager
def across(name: str, two_hosts: tuple[str, ...]) -> Iterator[Scene]:
    made = Scene(name, HERE, two_hosts[1:])
    try:
        yield made
    finally:
        made.end()


@pytest.mark.parametrize("name", NETWORK)
def test_a_cut_link_ends_both_sides_within_the_lease(name, two_hosts):
    with across(name, two_hosts) as made:
        made.whole(9)
        while made.writer.told.get(timeout=10)[0] != "OpDone":
            pass
        made.until_half()
        _run("ip", "link", "set", two_hosts[0], "down")
        began = time.monotonic()
        made.receiver.next(facts.ReceiveFailed)
        made.receiver.next(facts.Quiesced, 30)
        assert [made.writer.told.get(timeout=30)[0]] == ["SendFailed"]
        assert time.monotonic() - began < 4 * LEASE_S + 3
        made.reuse()
        _run("ip", "link", "set", two_hosts[0], "up")
        made.writer.say("go")
        assert made.writer.told.get(timeout=30)[0] == "OpDone"
        time.sleep(0.3)
        assert made.untouched()
        made.whole(10)


@pytest.mark.parametrize("name", NETWORK)
def test_a_slow_link_changes_no_byte(name, two_hosts):
    try:
        _run(
            "tc",
            "qdisc",
            "add",
            "dev",
            two_hosts[0],
            "root",
            "tbf",
            "rate",
            "100mbit",
            "burst",
            "32kb",
            "latency",
            "50ms",
        )
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine forbids shaping: {error.stderr!r}")
    with across(name, two_hosts) as made:
        for number in range(3):
            made.whole(number)
            for kind in ("Released", "OpDone"):
                made.writer.next(kind)


@pytest.mark.skipif(CLASSES["nixl"].missing() is not None, reason=str(CLASSES["nixl"].missing()))
@pytest.mark.parametrize("test", [test_a_cut_link_ends_both_sides_within_the_lease, test_a_slow_link_changes_no_byte])
@pytest.mark.parametrize("name", NIXL)
def test_nixl_between_hosts(name, test):
    """UCX reads a process's routes once, so an agent finds no way over a device that came after the first agent."""
    command = [sys.executable, "-m", "pytest", "-q", f"{__file__}::{test.__name__}[{name}]"]
    done = subprocess.run(command, env=os.environ | {ALONE: "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_shared_memory_is_not_offered_across_hosts(two_hosts):
    with across("shm", two_hosts) as made:
        made.writer.say("open", ticket_of(), made.receiver.endpoint, 64)
        assert "no transport reaches the decode worker" in made.writer.next("error")[1]
