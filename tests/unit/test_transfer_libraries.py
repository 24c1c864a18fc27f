"""The transports over libraries, where these are installed: bytes, cancel, a killed sender, idle cost, the fence.

Sender and receiver are two processes, since UCX treats one process as a case of its own; `python -m
tests.unit.test_transfer_libraries TRANSPORT ENDPOINT INTEGRITY` is the sender, driven by lines on its stdin.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tercet.core import Ticket
from tercet.errors import TercetError
from tercet.transfer.memory.layout import KvLayout
from tercet.transfer.memory.region import Region
from tercet.transfer.mover.receiver import KvReceiver
from tercet.transfer.mover.sender import KvSender
from tercet.transfer.protocol import facts
from tercet.transfer.transports.contract import MoverConfig
from tercet.transfer.transports.nixl import NixlTransport, _direct
from tercet.transfer.transports.ucx import UcxTransport

LAYOUT = KvLayout(layers=3, blocks=8, block_size=16, kv_heads=8, head_dim=64, dtype="float32")
TICKET = Ticket("r", 0, 7)
TRANSPORTS = {"nixl": NixlTransport, "ucx": UcxTransport}
WAIT_S = 20


def config(name: str, integrity: bool) -> MoverConfig:
    return MoverConfig(name, "m", "t", lease_s=5.0, heartbeat_s=0.2, integrity=integrity)


def fill(region: Region) -> None:
    region.view[:] = np.random.default_rng(1).integers(0, 256, len(region.view), dtype=np.uint8).tobytes()


def sender_process(name: str, endpoint: str, integrity: bool) -> None:
    """`open ATTEMPT` offers two blocks, `push LAYER` writes source blocks 3 and 6, `finish` ends; each is answered
    `done`."""
    source, events = Region(LAYOUT), queue.Queue()
    fill(source)
    sender = KvSender(config("prefill-0", integrity), source, [TRANSPORTS[name]()], events.put)
    for line in sys.stdin:
        verb, *rest = line.split()
        if verb == "open":
            ticket = TICKET._replace(attempt=int(rest[0]))
            sender.open(ticket, endpoint, 2 * LAYOUT.block_size, time.monotonic() + 600)
            while (event := events.get(timeout=WAIT_S)) != facts.Granted(ticket, 0):
                print(event, file=sys.stderr, flush=True)  # of the ticket before
        elif verb == "push":
            sender.push(ticket, int(rest[0]), 0, [3, 6])
        else:
            sender.finish(ticket, b"note")
        print(f"done {time.process_time()}", flush=True)
    sender.stop()
    sys.stdout.flush()
    os._exit(0)  # NIXL 1.5.1 crashes in the destructors of its libraries


class Pair:
    """A receiver here and a sender in another process."""

    def __init__(self, name: str, integrity: bool = True) -> None:
        self.destination = Region(LAYOUT)
        self.received: queue.Queue[object] = queue.Queue()
        transports = [TRANSPORTS[name]()]
        self.receiver = KvReceiver(config("decode-0", integrity), 7, self.destination, transports, self.received.put)
        args = [name, self.receiver.start("127.0.0.1").encode(), str(int(integrity))]
        self.sender = subprocess.Popen(
            [sys.executable, "-m", __name__, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, line: str) -> float:
        """-> the sender's CPU seconds so far."""
        self.sender.stdin.write(line + "\n")
        self.sender.stdin.flush()
        for answer in self.sender.stdout:
            if answer.startswith("done "):  # NIXL logs to stdout
                return float(answer.split()[1])
        raise AssertionError("the sender is gone")

    def grant(self, attempt: int = 0) -> None:
        self.receiver.admit(TICKET._replace(attempt=attempt), 0, [5, 2])
        self.ask(f"open {attempt}")

    def next_event(self) -> object:
        return self.received.get(timeout=WAIT_S)

    def stop(self) -> None:
        self.sender.send_signal(signal.SIGCONT)
        self.sender.kill()
        with self.sender:  # closes its pipes
            pass
        self.receiver.stop()


@pytest.fixture(params=sorted(TRANSPORTS))
def name(request):
    if missing := TRANSPORTS[request.param].missing():
        pytest.skip(missing)
    return request.param


@pytest.fixture
def pair(name):
    made = Pair(name)
    yield made
    made.stop()


@pytest.mark.parametrize("integrity", [True, False])
def test_bytes_arrive_exactly(name, integrity):
    pair, source = Pair(name, integrity), Region(LAYOUT)
    fill(source)
    try:
        pair.grant()
        for layer in range(LAYOUT.layers):
            pair.ask(f"push {layer}")
        pair.ask("finish")
        assert isinstance(pair.next_event(), facts.Noted)
        assert isinstance(pair.next_event(), facts.Complete)
        for layer in range(LAYOUT.layers):
            assert pair.destination.block(layer, 5) == source.block(layer, 3)
            assert pair.destination.block(layer, 2) == source.block(layer, 6)
            assert not any(any(pair.destination.block(layer, block)) for block in (0, 1, 3, 4, 6, 7))
    finally:
        pair.stop()


def test_a_cancel_at_the_receiver_quiesces(pair):
    pair.grant()
    pair.ask("push 0")
    pair.receiver.cancel(TICKET, TercetError("gone"))
    assert isinstance(pair.next_event(), facts.ReceiveFailed)
    assert isinstance(pair.next_event(), facts.Quiesced)
    pair.destination.view[:] = bytes(len(pair.destination.view))
    pair.ask("push 1")
    time.sleep(0.2)
    assert not any(pair.destination.view)


def test_a_link_carries_on_after_a_cancel(pair):
    """What is passed over is counted too: the next write is not taken for it."""
    pair.grant()
    pair.receiver.cancel(TICKET, TercetError("gone"))
    pair.ask("push 0")
    assert isinstance(pair.next_event(), facts.ReceiveFailed)
    assert isinstance(pair.next_event(), facts.Quiesced)
    pair.grant(attempt=1)
    for layer in range(LAYOUT.layers):
        pair.ask(f"push {layer}")
    pair.ask("finish")
    assert isinstance(pair.next_event(), facts.Noted)
    assert isinstance(pair.next_event(), facts.Complete)


def test_a_killed_sender_quiesces(pair):
    pair.grant()
    pair.ask("push 0")
    pair.sender.kill()
    assert isinstance(pair.next_event(), facts.ReceiveFailed)
    assert isinstance(pair.next_event(), facts.Quiesced)


def test_a_connected_pair_idles(pair):
    pair.grant()
    pair.ask("push 0")
    time.sleep(0.3)
    before, there = time.process_time(), pair.ask("push 1")
    time.sleep(2.0)
    assert time.process_time() - before < 0.2  # of 2 s; who polls without a pause takes nearly all of it
    assert pair.ask("push 2") - there < 0.2


def test_nothing_lands_after_the_fence(pair):
    """A sender is stopped; its pair is fenced; it wakes up and pushes on."""
    pair.grant()
    pair.ask("push 0")
    pair.sender.send_signal(signal.SIGSTOP)
    for peer in list(pair.receiver._peers.values()):
        peer.shutdown()
    assert isinstance(pair.next_event(), facts.ReceiveFailed)
    assert isinstance(pair.next_event(), facts.Quiesced)
    pair.destination.view[:] = bytes(len(pair.destination.view))
    pair.sender.send_signal(signal.SIGCONT)
    pair.ask("push 1")
    time.sleep(0.5)
    assert not any(pair.destination.view)


def test_nixl_writes_itself_though_ucx_was_loaded_first(monkeypatch, tmp_path):
    """UCX would abort a receiver that answers emulated writes of a sender that is gone."""
    if missing := NixlTransport.missing() or UcxTransport.missing():
        pytest.skip(missing)
    monkeypatch.setenv("UCX_PROTO_INFO", "y")
    monkeypatch.setenv("UCX_LOG_FILE", str(tmp_path / "%p"))
    pair = Pair("nixl")
    try:
        pair.grant()
        pair.ask("push 0")
        landed = time.monotonic() + WAIT_S
        while not any(pair.destination.view) and time.monotonic() < landed:
            time.sleep(0.01)
        said = (tmp_path / str(pair.sender.pid)).read_text()
    finally:
        pair.stop()
    assert "remote memory write" in said
    assert "emulation" not in said


def test_what_makes_ucx_emulate_writes_is_refused(monkeypatch):
    monkeypatch.setenv("UCX_RNDV_THRESH", "8192")
    assert "UCX_RNDV_THRESH is set" in NixlTransport.missing()


@pytest.mark.parametrize(
    ("tls", "direct"),
    [
        *((tls, True) for tls in ("all", "cma,tcp", "sm", "tcp,cuda_ipc", "cuda,rc", "^cma", "^cma,knem,xpmem")),
        *((tls, False) for tls in ("tcp", "rc,cuda_copy", "^cma,cuda_ipc,knem,xpmem")),
    ],
)
def test_a_write_from_process_to_process_cannot_be_fenced(tls, direct):
    assert _direct(tls) is direct


if __name__ == "__main__":
    sender_process(sys.argv[1], sys.argv[2], bool(int(sys.argv[3])))
