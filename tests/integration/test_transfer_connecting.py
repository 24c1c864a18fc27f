"""Connections that fail, come again, or come from strangers: nothing is left of them, and nobody waits for them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tercet.core import Load
from tercet.engine.sequence import Sequence
from tercet.errors import PeerDown, ProtocolViolation, TercetError, TransferError
from tercet.roles import peers as roles
from tercet.roles.legs import Legs
from tercet.roles.prefill import Prefill
from tercet.tracing import UNTRACED
from tercet.transfer.links.channel import Channel
from tercet.transfer.memory.layout import KvLayout
from tercet.transfer.mover import acceptor, dialer
from tercet.transfer.protocol import facts
from tercet.transfer.protocol.messages import Written, encode
from tercet.transfer.transports.contract import Endpoint
from tercet.transfer.transports.table import ALL
from tests.movers import CLASSES, NOTE, Pair, ticket_of


@pytest.fixture(params=["shm", "tcp"])
def pair(request):
    made = Pair(request.param)
    yield made
    made.stop()


def eventually(true, seconds: float = 5.0) -> bool:
    until = time.monotonic() + seconds
    while not true() and time.monotonic() < until:
        time.sleep(0.01)
    return bool(true())


def test_blocks_of_a_broken_pair_are_freed_though_others_connect_at_once(pair):
    """The HELLO of the next pair says that nothing of this one will be written; it must not come too early."""
    over = threading.Event()

    def keep_connecting() -> None:
        while not over.is_set():
            try:
                pair.sender.connect(pair.endpoint)
            except TercetError:
                time.sleep(0.002)

    threads = [threading.Thread(target=keep_connecting) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in range(8):
            assert eventually(lambda: pair.mover._peers)
            pair.mover.admit(ticket_of(number), 0, [1])
            while True:
                try:
                    pair.open(ticket_of(number), 1)
                    break
                except PeerDown:
                    time.sleep(0.01)
            for peer in list(pair.mover._peers.values()):
                peer.shutdown()
            assert eventually(lambda: not pair.mover.live()), "still in quarantine"
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_dials_that_fail_leave_nothing_behind(pair, monkeypatch):
    cls = CLASSES[pair.sender._dialer._transports[0].name]
    with monkeypatch.context() as broken:
        broken.setattr(cls, "outlet", lambda *_: (_ for _ in ()).throw(ProtocolViolation("no memory")))
        for _ in range(10):
            with pytest.raises(ProtocolViolation):
                pair.sender.connect(pair.endpoint)
    pair.sender.connect(pair.endpoint)  # its HELLO ends what a GOODBYE that came too late has left
    assert eventually(lambda: len(pair.mover._peers) == 1)
    assert eventually(lambda: pair.mover._acceptor._num_connections == 1 + cls.links)


def test_a_pair_that_connects_while_its_sender_stops_does_not_begin(pair, monkeypatch):
    real, dialled, stopped = pair.sender._dialer.dial, threading.Event(), threading.Event()

    def slow(endpoint: str):
        peer = real(endpoint)
        dialled.set()
        stopped.wait()
        return peer

    monkeypatch.setattr(pair.sender._dialer, "dial", slow)
    with ThreadPoolExecutor(1) as pool:
        connecting = pool.submit(pair.sender.connect, pair.endpoint)
        dialled.wait()
        pair.sender.stop()
        stopped.set()
        with pytest.raises(PeerDown, match="stops"):
            connecting.result()
    assert not pair.sender.connected(pair.endpoint)
    assert eventually(lambda: not pair.mover._peers)


def test_all_who_wait_share_one_failed_handshake(pair, monkeypatch):
    """A silent decode worker costs those who wait for it one handshake's time, not one each."""
    dials = itertools.count()
    real = pair.sender._dialer.dial

    def slow(endpoint: str):
        next(dials)
        time.sleep(0.3)
        return real(endpoint)

    monkeypatch.setattr(pair.sender._dialer, "dial", slow)
    nobody = Endpoint("decode-9", 1, "elsewhere", "", ["127.0.0.1:1"], [cls.name for cls in ALL]).encode()
    errors: list[Exception] = []

    def connect() -> None:
        try:
            pair.sender.connect(nobody)
        except TercetError as error:
            errors.append(error)

    threads = [threading.Thread(target=connect) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(errors), next(dials)) == (20, 1)


def test_a_written_that_cannot_be_sent_ends_the_pair(pair, monkeypatch):
    real = Channel.send

    def send(self, message, *rest, **more):
        if isinstance(message, Written):
            raise PeerDown("this link broke")
        real(self, message, *rest, **more)

    monkeypatch.setattr(Channel, "send", send)
    pair.grant(ticket_of(), 0, [5], 1)
    pair.push_all(ticket_of(), [3])
    pair.next(facts.ReceiveFailed, 3)
    assert eventually(lambda: not pair.sender.connected(pair.endpoint))
    pair.sender.connect(pair.endpoint)  # shm: its HELLO is the proof
    pair.next(facts.Quiesced, 3)


def address(pair) -> tuple[str, int]:
    host, port = Endpoint.decode(pair.endpoint).tcp[0].rsplit(":", 1)
    return host, int(port)


def test_strangers_do_not_keep_a_peer_out(pair):
    strangers = [socket.create_connection(address(pair)) for _ in range(acceptor.MAX_STRANGERS + 20)]
    try:
        pair.sender.connect(pair.endpoint)
        assert len(pair.mover._acceptor._strangers) <= acceptor.MAX_STRANGERS
    finally:
        for stranger in strangers:
            stranger.close()


def test_a_stranger_that_speaks_byte_by_byte_has_one_deadline(pair, monkeypatch):
    monkeypatch.setattr(acceptor, "HANDSHAKE_S", 0.5)
    began = time.monotonic()
    with socket.create_connection(address(pair)) as stranger:
        stranger.settimeout(0.1)
        for byte in encode(Written(ticket_of(), 64, 0.5, NOTE)):
            stranger.send(bytes([byte]))
            with contextlib.suppress(TimeoutError):
                if stranger.recv(4096) == b"":
                    break
    assert time.monotonic() - began < 3


def test_the_door_stays_open_when_no_thread_can_be_started(pair, monkeypatch):
    with monkeypatch.context() as poor:

        def start(_: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        poor.setattr(threading.Thread, "start", start)
        with socket.create_connection(address(pair)) as turned_away:
            assert turned_away.recv(1) == b""
    pair.sender.connect(pair.endpoint)
    assert pair.mover.refused()["overloaded"] == 1


@pytest.mark.parametrize(
    "source", [{"tp_size": 2}, {"layers": 2, "model_layers": 3}, {"layers": 2, "model_layers": 3, "first_layer": 1}]
)
def test_a_source_that_holds_only_a_part_and_is_alone_is_refused(source):
    """What it does not hold would keep the bytes of the block's earlier owner, and nobody would know."""
    base = {"layers": 3, "blocks": 8, "block_size": 16, "kv_heads": 2, "head_dim": 8, "dtype": "float32"}
    made = Pair("tcp", layout=KvLayout(**(base | source)))
    try:
        made.mover.admit(ticket_of(), 0, [5])
        made.open(ticket_of(), 1)
        for error in (made.next(facts.ReceiveFailed).error, made.sent.get(timeout=5).error):
            assert isinstance(error, TransferError)
            assert re.search("of layers . to ., heads . to . come from no source", str(error))
        made.next(facts.Quiesced)
        assert made.sent.get(timeout=5) == facts.OpDone(ticket_of())  # nothing was computed
    finally:
        made.stop()


class Leg:
    """What Prefill needs of a leg and of its stream."""

    timeout_s, token_ids = 60.0, (1,) * 16

    def __init__(self, number: int, peer: str) -> None:
        self.peer, self.leg, self.stream, self.timer = peer, self, self, self
        self.ticket = ticket_of(number)
        self.sequence = Sequence(self.ticket, [1] * 16, 16, None)
        self.span, self.images = UNTRACED, ()

    def cancel(self) -> None: ...

    def failed(self, *_: object) -> None: ...

    def finished(self, *_: object) -> None: ...


async def test_a_silent_decode_worker_holds_nobody_else_up(monkeypatch):
    """It accepts and never answers. What goes to a worker that is connected does not wait for its handshakes."""
    monkeypatch.setattr(dialer, "HANDSHAKE_S", 4.0)
    made, granted = Pair("tcp"), asyncio.Event()
    prefill = Prefill(Legs(asyncio.get_running_loop()), 1000)
    prefill.send_by(made.sender)
    prefill.sender._on_event = prefill.on_event
    prefill.legs.engine = SimpleNamespace(abort=id, op_done=id, add=lambda _: granted.set())
    await asyncio.to_thread(made.sender.connect, made.endpoint)
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        whole = Endpoint.decode(made.endpoint)
        dead = replace(whole, worker_id="decode-9", tcp=[f"127.0.0.1:{silent.getsockname()[1]}"]).encode()
        prefill.meet([dead, made.endpoint])
        for leg in [Leg(n, dead) for n in range(40)]:
            prefill.begin(leg)
            prefill.give_up(leg, TercetError("given up"))
        made.mover.admit(ticket_of(100), 0, [1])
        prefill.begin(Leg(100, made.endpoint))
        await asyncio.wait_for(granted.wait(), 3.0)
        async with asyncio.timeout(20):
            while len(prefill._outgoing) > 1:  # those that were given up are dropped with the first handshake
                await asyncio.sleep(0.05)
    prefill.meet(())
    await asyncio.to_thread(made.stop)


async def test_however_often_it_is_introduced_a_dead_worker_is_dialled_once_at_a_time(monkeypatch):
    monkeypatch.setattr(roles, "MEET_AGAIN_S", 0.1)
    dials = itertools.count()

    def connect(_: str) -> None:
        next(dials)
        raise PeerDown("nobody there")

    prefill = Prefill(Legs(asyncio.get_running_loop()), 10)
    prefill.send_by(
        SimpleNamespace(connect=connect, connected=lambda _: False, attested=list, dropped=Counter, push=None)
    )
    nobody = Endpoint("decode-9", 1, "elsewhere", "", ["127.0.0.1:1"], ["tcp"]).encode()
    for _ in range(10):
        prefill.meet([nobody])
    await asyncio.sleep(1.0)
    assert [state.fault for state in prefill.counted(Load()).pairs] == ["nobody there"]
    prefill.meet(())
    await asyncio.sleep(0.3)
    assert 2 <= next(dials) <= 11
    assert prefill.counted(Load()).pairs == ()
