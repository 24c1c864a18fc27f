"""What every transport must do alike: bytes, facts, faults. Sender and receiver are threads of one process here;
tests/chaos/test_transfer_faults.py kills, stops and cuts off real ones."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tercet import secret
from tercet.core import Ticket
from tercet.errors import LeaseExpired, PeerDown, PeerMismatch, TercetError
from tercet.transfer.links.channel import Mailbox
from tercet.transfer.links.wires import dial_tcp, dial_unix
from tercet.transfer.memory.layout import Units
from tercet.transfer.memory.pack import Cells, Scratch, pieces_of
from tercet.transfer.mover.parcels import Loader
from tercet.transfer.mover.receiver import KvReceiver
from tercet.transfer.mover.sender import KvSender
from tercet.transfer.protocol import facts, messages, proof
from tercet.transfer.protocol.messages import Data, Heartbeat, Hello, Welcome, encode
from tercet.transfer.transports.contract import Endpoint, Transport
from tercet.transfer.transports.table import ALL
from tests.movers import CLASSES, EPOCH, LAYOUT, NOTE, Pair, Receiving, config, flipping, names, ticket_of

NAMES = names()
SHORT = 1.0  # seconds of a lease
each_transport = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(params=NAMES)
def pair(request):
    made = Pair(request.param)
    yield made
    made.stop()


@pytest.fixture(params=NAMES)
def impatient(request):
    """A pair whose leases run out soon."""
    made = Pair(request.param, lease_s=SHORT)
    yield made
    made.stop()


def test_bytes_arrive_exactly_where_they_were_granted(pair):
    ticket = ticket_of()
    before = bytes(pair.region.view)
    pair.grant(ticket, first=1, blocks=[5, 2], total=3)
    pair.push_all(ticket, [3, 6, 7])
    assert pair.next(facts.Noted).note == NOTE
    num_bytes = 2 * LAYOUT.layers * LAYOUT.block_bytes
    assert pair.next(facts.Complete).num_bytes == num_bytes
    assert pair.same(6, 5)
    assert pair.same(7, 2)
    for layer, block in itertools.product(LAYOUT.window, (0, 1, 3, 4, 6, 7)):  # nothing else changed
        start = LAYOUT.offset(layer, block)
        assert pair.region.block(layer, block) == before[start : start + LAYOUT.block_bytes]
    assert pair.sent.get(timeout=5) == facts.Released(ticket, num_bytes)
    assert pair.sent.get(timeout=5) == facts.OpDone(ticket)
    assert pair.live() == []


@each_transport
@pytest.mark.parametrize("integrity", [True, False])
@pytest.mark.parametrize("links", [1, 2])
def test_with_and_without_digests_over_one_link_and_over_two(name, integrity, links):
    """Two links land out of order; with two hosts they are two addresses, as of two network cards."""
    hosts = "127.0.0.1 127.0.0.2" if links == 2 else "127.0.0.1"
    made = Pair(name, integrity=integrity, links=links, host=hosts)
    try:
        for number in range(4):
            made.move(ticket_of(number), [0, 3, 6, 7], [1, 5, 2, 4])
            for _ in range(2):
                made.sent.get(timeout=5)
        assert all(itertools.starmap(made.same, zip([0, 3, 6, 7], [1, 5, 2, 4], strict=True)))
    finally:
        made.stop()


def test_full_prefix_hit_moves_no_byte(pair):
    ticket = ticket_of()
    pair.grant(ticket, first=3, blocks=[], total=3)
    pair.push_all(ticket, [3, 6, 7])
    pair.next(facts.Noted)
    assert pair.next(facts.Complete).num_bytes == 0
    assert pair.untouched()


def test_offer_before_admission_is_granted_at_admission(pair):
    pair.open(ticket_of(), 1)
    time.sleep(0.05)
    pair.mover.admit(ticket_of(), 0, [4])
    assert pair.sent.get(timeout=5) == facts.Granted(ticket_of(), 0)


def test_stale_epoch_is_rejected(pair):
    pair.open(Ticket("r", 0, EPOCH - 1), 1)
    failed = pair.sent.get(timeout=5)
    assert isinstance(failed, facts.SendFailed)
    assert "epoch 7, not 6" in str(failed.error)


def test_cancel_at_the_receiver_is_proven_by_the_sender(pair):
    ticket = ticket_of()
    pair.grant(ticket, 0, [1, 2], 2)
    pair.push(ticket, 0, [3, 4])
    pair.mover.cancel(ticket, TercetError("gone"))
    pair.next(facts.ReceiveFailed)
    assert pair.next(facts.Quiesced).ticket == ticket
    assert isinstance(pair.sent.get(timeout=5), facts.SendFailed)
    assert pair.sent.get(timeout=5) == facts.OpDone(ticket)
    pair.wipe()
    pair.push_all(ticket, [3, 4])
    time.sleep(0.1)
    assert pair.untouched()


def test_cancel_at_the_sender_fails_and_quiesces_the_receiver(pair):
    pair.grant(ticket_of(), 0, [1], 1)
    pair.sender.cancel(ticket_of(), TercetError("prefill failed"))
    assert "prefill failed" in str(pair.next(facts.ReceiveFailed).error)
    pair.next(facts.Quiesced)


def test_a_ticket_without_a_sender_fails_within_its_lease(impatient):
    impatient.mover.admit(ticket_of(), 0, [1])
    assert isinstance(impatient.next(facts.ReceiveFailed).error, LeaseExpired)
    impatient.next(facts.Quiesced)


def test_a_slow_engine_keeps_a_ticket_alive(impatient):
    impatient.grant(ticket_of(), 0, [1], 1)
    time.sleep(2 * SHORT)
    impatient.push_all(ticket_of(), [3])
    impatient.next(facts.Noted)
    impatient.next(facts.Complete)


def test_heartbeats_alone_keep_no_ticket_alive(impatient):
    """Both ends live and say so; but the engine, which would have to push, does nothing."""
    impatient.stall()
    impatient.grant(ticket_of(), 0, [1], 1)
    assert "has not advanced" in str(impatient.next(facts.ReceiveFailed).error)
    impatient.next(facts.Quiesced)
    assert isinstance(impatient.sent.get(timeout=5), facts.SendFailed)
    assert isinstance(impatient.sent.get(timeout=5), facts.OpDone)


def test_goodbye_quiesces_everything(pair):
    pair.grant(ticket_of(), 0, [1], 1)
    pair.leave()
    pair.next(facts.ReceiveFailed)
    pair.next(facts.Quiesced)


@each_transport
@pytest.mark.parametrize("links", [1, 2])
def test_a_flipped_bit_is_found_and_only_its_block_fetched_again(name, links):
    flips = [5]
    made = Pair(flipping(name, flips), links=links)
    try:
        complete = made.move(ticket_of(), [3, 6, 7], [5, 2, 0])
        assert all(itertools.starmap(made.same, [(3, 5), (6, 2), (7, 0)]))
        assert complete.num_bytes == 3 * LAYOUT.layers * LAYOUT.block_bytes
        assert (made.mover.corrupt(), made.sender.resent(), flips) == (1, 1, [])
    finally:
        made.stop()


@each_transport
def test_a_link_that_corrupts_everything_fails_by_name(name):
    made = Pair(flipping(name, list(range(100))))
    try:
        made.grant(ticket_of(), 0, [5], 1)
        made.push_all(ticket_of(), [3])
        events = [made.events.get(timeout=10)]  # a Noted may come before
        while not isinstance(events[-1], facts.Quiesced):
            events.append(made.events.get(timeout=10))
        assert isinstance(events[-2], facts.ReceiveFailed)
        assert events[-2].error.code() == "digest_mismatch"
    finally:
        made.stop()


def packed(layout, region, units, heads):
    """The bytes of each (layer, unit of 8 tokens, head)."""
    cells = Cells(layout, memoryview(bytes(region.view)), layout.window, units, 8, heads)
    return list(pieces_of(cells.gather(Scratch())))


@each_transport
@pytest.mark.parametrize(
    "changes",
    [{"block_size": 8, "blocks": 16}, {"block_size": 32, "blocks": 4}, {"order": "HND"}, {"tp_size": 2, "tp_rank": 1}],
    ids=["smaller-blocks", "larger-blocks", "HND", "tensor-parallel"],
)
def test_layouts_may_differ(name, changes):
    """40 tokens from 16-token blocks; what lies behind them in the destination's last block is zeroed."""
    there = replace(LAYOUT, **changes)
    made = Pair(name, destination=there)
    made.region.view[:] = b"\xff" * len(made.region.view)
    try:
        blocks = list(range(-(-40 // there.block_size)))
        made.mover.admit(ticket_of(), 0, blocks)
        made.sender.open(ticket_of(), made.endpoint, 40, time.monotonic() + 60)
        assert isinstance(made.sent.get(timeout=5), facts.Granted)
        made.push_all(ticket_of(), [6, 1, 3])
        made.next(facts.Noted)
        made.next(facts.Complete)
        sent = packed(LAYOUT, made.source, Units([6, 1, 3], 0, 5), there.heads)
        assert sent == packed(there, made.region, Units(blocks, 0, 5), there.heads)
        if there.block_size == 32:
            assert not any(map(any, packed(there, made.region, Units([1], 3, 1), there.heads)))
    finally:
        made.stop()


@pytest.mark.parametrize("name", ["shm", "tcp", "torch"])
def test_a_change_of_dtype_must_be_declared(name):
    there = replace(LAYOUT, dtype="bfloat16")
    made = Pair(name, destination=there)
    with pytest.raises(PeerMismatch, match="dtype is float32 at the source, bfloat16 at the destination"):
        made.open(ticket_of(), 1)
    made.stop()
    made = Pair(name, destination=there, convert=True)
    try:
        assert made.move(ticket_of(), [3], [2]).num_bytes == LAYOUT.layers * LAYOUT.block_bytes // 2
    finally:
        made.stop()


def chaotic(rng: random.Random, share: float):
    """A Mailbox.post that drops, doubles and delays."""
    real, held = Mailbox.post, []

    def post(self, message) -> bool:
        draw = rng.random()
        if draw < share and not isinstance(message, Heartbeat):
            return True  # lost
        if draw < 2 * share:
            held.append((self, message))  # late
            return True
        for _ in range(rng.randint(0, 2)):
            with contextlib.suppress(IndexError):  # none is held; another thread may have taken the last one
                real(*held.pop(0))
        return real(self, message) and (draw > 3 * share or real(self, message))

    return post


@each_transport
def test_lost_doubled_and_late_messages_leak_nothing(name, monkeypatch):
    monkeypatch.setattr(Mailbox, "post", chaotic(random.Random(3), 0.08))
    made = Pair(name, lease_s=SHORT)
    try:
        for _, block in come_through(made, 12):
            assert made.same(block, block)
    finally:
        monkeypatch.undo()
        made.stop()


def come_through(made: Pair, count: int) -> Iterator[tuple[Ticket, int]]:
    """So many requests of one block, from that block to that block. -> those that are complete; all of them end."""
    for number in range(count):
        ticket, block = ticket_of(number), number % 8
        made.mover.admit(ticket, 0, [block])
        made.open(ticket, 1)
        deadline = threading.Timer(3.0, give_up, (made, ticket))  # as the roles do at a request's deadline
        deadline.start()
        while not isinstance(event := made.sent.get(timeout=15), facts.OpDone):
            if isinstance(event, facts.Granted):
                made.push_all(ticket, [block])
        while not isinstance(event := made.events.get(timeout=15), facts.Complete | facts.Quiesced):
            pass
        deadline.cancel()
        if isinstance(event, facts.Complete):
            yield ticket, block


def give_up(made: Pair, ticket: Ticket) -> None:
    made.sender.cancel(ticket, TercetError("deadline"))
    made.mover.cancel(ticket, TercetError("deadline"))


def test_a_hundred_restarts_on_one_address(monkeypatch):
    made = Pair("tcp")
    host = Endpoint.decode(made.endpoint).tcp[0]
    try:
        for epoch in range(EPOCH, EPOCH + 100):
            ticket = Ticket("r", epoch, epoch)
            made.sender.open(ticket, made.endpoint, 16, time.monotonic() + 60)
            made.mover.admit(ticket, 0, [2])
            assert isinstance(made.sent.get(timeout=5), facts.Granted)
            made.push_all(ticket, [3])
            assert isinstance(made.sent.get(timeout=5), facts.Released)
            assert isinstance(made.sent.get(timeout=5), facts.OpDone)
            assert made.same(3, 2)
            made.mover.stop()
            made.mover = KvReceiver(config("decode-0"), epoch + 1, made.region, [CLASSES["tcp"]()], made.events.put)
            made.endpoint = made.mover.start(host).encode()
        assert Endpoint.decode(made.endpoint).tcp == [host]
        assert threading.active_count() < 60
    finally:
        made.stop()


@each_transport
def test_fifty_first_contacts_are_one_handshake(name, monkeypatch):
    made, hellos = Pair(name), []
    real = KvReceiver._serve_control
    monkeypatch.setattr(KvReceiver, "_serve_control", lambda self, *args: (hellos.append(1), real(self, *args))[1])
    try:
        threads = [threading.Thread(target=made.open, args=(ticket_of(n), 1)) for n in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(hellos) == 1
        assert len(made.sender.live()) == 50
    finally:
        made.stop()


@pytest.mark.parametrize(
    ("changes", "layout", "named"),
    [
        ({"fingerprint": "other"}, LAYOUT, "another model"),
        ({"token": "wrong"}, LAYOUT, "prefill-0 does not know this cluster's token"),
        ({}, replace(LAYOUT, kv_heads=4), "kv_heads is 4 at the source, 2 at the destination"),
        ({}, replace(LAYOUT, dtype="float16"), "dtype"),
        ({}, replace(LAYOUT, layers=2, model_layers=2), "model_layers"),
    ],
)
@each_transport
def test_a_peer_that_does_not_match_is_refused_by_name(name, changes, layout, named):
    made = Pair(name, config("prefill-0", **changes), layout)
    try:
        with pytest.raises(PeerMismatch, match=named):
            made.open(ticket_of(), 1)
        assert made.mover.refused()["peer_mismatch"] == 1
        assert not any(made.region.view)
    finally:
        made.stop()


def test_another_protocol_version_is_refused_by_name(pair, monkeypatch):
    monkeypatch.setattr("tercet.transfer.mover.dialer.VERSION", messages.VERSION + 1)
    with pytest.raises(PeerMismatch, match=f"transfer protocol {messages.VERSION + 1} at prefill-0"):
        pair.open(ticket_of(), 1)


# ---- garbage


@pytest.fixture(scope="module")
def target():
    made = Receiving("tcp")
    yield made
    made.stop()


def greeted(made: Receiving, wire: str) -> socket.socket:
    """A stranger who knows the token, behind its handshake."""
    endpoint = Endpoint.decode(made.endpoint)
    sock = dial_tcp(endpoint.tcp[0], 5.0) if wire == "tcp" else dial_unix(endpoint.unix, 5.0)
    layout = [getattr(LAYOUT, name) for name in LAYOUT.__dataclass_fields__]
    challenge = taken(sock, messages.Challenge)
    hello = Hello(messages.VERSION, "stranger", "m", layout, wire, "", [], secret.nonce())
    sock.sendall(encode(proof.signed(hello, "t", challenge.nonce)))
    proof.check(taken(sock, Welcome), "t", hello.nonce)
    return sock


def taken(sock: socket.socket, kind: type) -> Any:
    number, body, _ = messages.decode_header(sock.recv(messages.HEADER.size, socket.MSG_WAITALL))
    message = messages.decode_body(number, sock.recv(body, socket.MSG_WAITALL))
    assert isinstance(message, kind), message
    return message


FRAMES = [
    encode(messages.Offer(ticket_of(), 3)),
    encode(Data(ticket_of(), 0, 1, 0, 1, 0, True, b"12345678"), 64) + bytes(64),
    encode(messages.Written(ticket_of(), 64, 0.5, NOTE)),
    encode(Heartbeat([ticket_of()], [1])),
]


@st.composite
def bad_frames(draw) -> bytes:
    frame = bytearray(draw(st.sampled_from(FRAMES)))
    for _ in range(draw(st.integers(0, 4))):
        frame[draw(st.integers(0, len(frame) - 1))] = draw(st.integers(0, 255))
    return bytes(frame[: draw(st.integers(1, len(frame)))]) if draw(st.booleans()) else bytes(frame)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.one_of(st.binary(min_size=1, max_size=200), bad_frames()), welcome=st.booleans())
def test_whatever_comes_ends_that_connection_only(target, junk, welcome):
    address = Endpoint.decode(target.endpoint).tcp[0]
    with greeted(target, "tcp") if welcome else dial_tcp(address, 5.0) as sock:
        sock.settimeout(10)
        try:
            sock.sendall(junk)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):
                pass
        except OSError:  # it was cut off before we were done
            pass
    assert target.mover.live() == []


def test_after_garbage_the_next_peer_is_served(target):
    made = Pair("tcp")
    try:
        made.mover.stop()
        made.mover, made.region, made.events, made.endpoint = (
            target.mover,
            target.region,
            target.events,
            target.endpoint,
        )
        made.move(ticket_of(99), [3], [1])
    finally:
        made.sender.stop()


def test_nobody_listens():
    made = Pair("tcp")
    made.mover.stop()
    with pytest.raises(PeerDown):
        made.open(ticket_of(), 1)
    made.sender.stop()


@each_transport
def test_an_idle_pair_uses_no_cpu(name):
    made = Pair(name)
    try:
        made.move(ticket_of(), [3], [2])
        before, began = time.process_time(), time.monotonic()
        time.sleep(2.0)
        share = (time.process_time() - before) / (time.monotonic() - began)
        assert share < 0.25, f"{share:.0%} of a core: it polls"  # a poller burns all of it; the figure is in RESULTS.md
    finally:
        made.stop()


@each_transport
def test_the_pair_is_measured_when_it_connects(name):
    made = Pair(name)
    try:
        made.sender.connect(made.endpoint)
        (state,) = made.sender.attested()
        assert (state.worker_id, state.transport, state.fault) == ("decode-0", name, "")
        assert state.bandwidth > 1e6
        assert 0 < state.latency_s < 1
        assert not any(made.region.view)  # probes land in the scratch
    finally:
        made.stop()


def test_auto_takes_what_was_measured_to_be_faster(monkeypatch, caplog):
    made = Pair("tcp")
    made.mover._transports = {"tcp": CLASSES["tcp"](), "torch": CLASSES["torch"]()}
    endpoint = replace(Endpoint.decode(made.endpoint), transports=["tcp", "torch"]).encode()
    made.sender._dialer._transports = tuple(made.mover._transports.values())
    try:
        made.sender.connect(endpoint)
        (state,) = made.sender.attested()
        monkeypatch.setattr(CLASSES["torch"], "outlet", lambda *_: (_ for _ in ()).throw(PeerDown("no group")))
        again = replace(Endpoint.decode(endpoint), epoch=8).encode()
        made.sender.connect(again)
        assert made.sender.attested()[-1].transport == "tcp"
        assert "no torch to the decode worker" in caplog.text
        assert state.transport in ("tcp", "torch")
    finally:
        made.stop()


def test_urgent_requests_are_written_first(monkeypatch):
    """With one link that is busy, what was pushed last but is due first goes out first."""
    made = Pair("tcp", links=1)
    order: list[str] = []
    real = Loader.parcel
    monkeypatch.setattr(Loader, "parcel", lambda *args: (order.append(args[3].ticket.request_id), real(*args))[1])
    try:
        tickets = [ticket_of(n) for n in range(3)]
        for number, (ticket, due) in enumerate(zip(tickets, (30, 20, 10), strict=True)):
            made.mover.admit(ticket, 0, [number])
            made.sender.open(ticket, made.endpoint, 16, time.monotonic() + due)
            assert isinstance(made.sent.get(timeout=5), facts.Granted)
        with made.sender._lock:  # nothing is written meanwhile
            for ticket in tickets:
                made.sender._run(made.sender._outbound.push(ticket, 0, 0, [1]))
        until = time.monotonic() + 5
        while len(order) < 3 and time.monotonic() < until:
            time.sleep(0.01)
        assert order == ["r2", "r1", "r0"]
    finally:
        made.stop()


def num_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@each_transport
def test_no_file_descriptor_is_left(name):
    made, counts = Pair(name), []
    try:
        for number in range(6):
            made.move(ticket_of(number), [3], [2])
            made.sender.stop()
            until = time.monotonic() + 5
            while made.mover._peers and time.monotonic() < until:
                time.sleep(0.02)
            counts.append(num_fds())
            made.sender = KvSender(config("prefill-0"), made.source, [CLASSES[name]()], made.sent.put)
            while not made.sent.empty():
                made.sent.get()
        while num_fds() > counts[1] + 2 and time.monotonic() < until + 5:  # the last threads are on their way out
            time.sleep(0.02)
        assert num_fds() <= counts[1] + 2, counts
    finally:
        made.stop()


def test_every_transport_says_what_it_is():
    for cls in ALL:
        assert issubclass(cls, Transport)
        told = sys.modules[cls.__module__].__doc__ or ""
        assert re.search("cop(y|ies)", told, re.IGNORECASE), f"{cls.name} does not say where it copies"
        assert re.search("cancel", told, re.IGNORECASE), f"{cls.name} does not say what its cancel can promise"
        assert re.search("pump", told, re.IGNORECASE), f"{cls.name} does not say who must pump it"
