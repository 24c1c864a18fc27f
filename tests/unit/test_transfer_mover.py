"""The mover over real sockets, both transports: bytes, facts, faults. Sender and receiver are threads of one process
here; tests/chaos kills and stops real ones."""

from __future__ import annotations

import os
import queue
import socket
import time

import pytest

from tercet.errors import LeaseExpired, PeerDown, PeerMismatch, TercetError
from tercet.transfer import inbound, outbound
from tercet.transfer.layout import KvLayout
from tercet.transfer.messages import Commit, Ticket
from tercet.transfer.receiver import KvReceiver, MoverConfig
from tercet.transfer.region import Region
from tercet.transfer.sender import KvSender
from tercet.transfer.shm import ShmTransport
from tercet.transfer.tcp import TcpTransport

LAYOUT = KvLayout(layers=3, blocks=8, block_size=16, kv_heads=2, head_dim=8, dtype="float32", itemsize=4)
TRANSPORTS = {"shm": ShmTransport, "tcp": TcpTransport}


def config(name: str, **changes: object) -> MoverConfig:
    base = {"fingerprint": "m", "token": "t", "lease_s": 1.0, "heartbeat_s": 0.2, "integrity": True}
    return MoverConfig(worker_id=name, **(base | changes))


class Pair:
    """One sender and one receiver, with queues of their events."""

    def __init__(self, transport: str, sender: MoverConfig | None = None, layout: KvLayout = LAYOUT) -> None:
        self.source, self.destination = Region(layout), Region(LAYOUT)
        self.source.view[:] = os.urandom(len(self.source.view))
        self.sent: queue.Queue[object] = queue.Queue()
        self.received: queue.Queue[object] = queue.Queue()
        way = TRANSPORTS[transport]()
        self.receiver = KvReceiver(config("decode-0"), 7, self.destination, [way], self.received.put)
        self.endpoint = self.receiver.start("127.0.0.1").encode()
        self.sender = KvSender(sender or config("prefill-0"), self.source, [TRANSPORTS[transport]()], self.sent.put)

    def grant(self, ticket: Ticket, first: int, blocks: list[int], total: int) -> None:
        self.receiver.admit(ticket, first, blocks)
        self.sender.open(ticket, self.endpoint, total)
        assert self.sent.get(timeout=5) == outbound.Granted(ticket, first)

    def push_all(self, ticket: Ticket, blocks: list[int]) -> None:
        for layer in range(LAYOUT.layers):
            self.sender.push(ticket, layer, 0, blocks)
        self.sender.commit(commit_of(ticket))

    def same(self, source: int, destination: int) -> bool:
        return all(
            self.source.block(layer, source) == self.destination.block(layer, destination)
            for layer in range(LAYOUT.layers)
        )

    def stop(self) -> None:
        self.sender.stop()
        self.receiver.stop()


def commit_of(ticket: Ticket) -> Commit:
    return Commit(ticket, 0, 0, 42, None, [], [], 0, 0.0, 0.0, 0.0, "")


@pytest.fixture(params=["shm", "tcp"])
def pair(request):
    made = Pair(request.param)
    yield made
    made.stop()


def test_bytes_arrive_exactly_where_they_were_granted(pair):
    ticket = Ticket("r", 0, 7)
    before = bytes(pair.destination.view)
    pair.grant(ticket, first=1, blocks=[5, 2], total=3)
    pair.push_all(ticket, [3, 6, 7])
    committed, complete = pair.received.get(timeout=5), pair.received.get(timeout=5)
    assert isinstance(committed, inbound.Committed)
    assert committed.commit.token_id == 42
    assert isinstance(complete, inbound.Complete)
    assert complete.num_bytes == 2 * LAYOUT.layers * LAYOUT.block_bytes
    assert pair.same(6, 5)
    assert pair.same(7, 2)
    for layer in range(LAYOUT.layers):  # nothing else changed
        for block in (0, 1, 3, 4, 6, 7):
            start = LAYOUT.offset(layer, block)
            assert pair.destination.block(layer, block) == before[start : start + LAYOUT.block_bytes]
    assert pair.sent.get(timeout=5) == outbound.Released(ticket)
    assert pair.sent.get(timeout=5) == outbound.OpDone(ticket)
    assert pair.sender.live() == pair.receiver.live() == []


def test_full_prefix_hit_moves_no_byte(pair):
    ticket = Ticket("r", 0, 7)
    pair.grant(ticket, first=3, blocks=[], total=3)
    pair.push_all(ticket, [3, 6, 7])
    assert isinstance(pair.received.get(timeout=5), inbound.Committed)
    assert pair.received.get(timeout=5).num_bytes == 0


def test_offer_before_admission_is_granted_at_admission(pair):
    ticket = Ticket("r", 0, 7)
    pair.sender.open(ticket, pair.endpoint, 1)
    time.sleep(0.05)
    pair.receiver.admit(ticket, 0, [4])
    assert pair.sent.get(timeout=5) == outbound.Granted(ticket, 0)


def test_stale_epoch_is_rejected(pair):
    ticket = Ticket("r", 0, 6)
    pair.sender.open(ticket, pair.endpoint, 1)
    failed = pair.sent.get(timeout=5)
    assert isinstance(failed, outbound.Failed)
    assert "epoch 7, not 6" in str(failed.error)


def test_cancel_at_the_receiver_is_proven_by_the_sender(pair):
    ticket = Ticket("r", 0, 7)
    pair.grant(ticket, 0, [1, 2], 2)
    pair.sender.push(ticket, 0, 0, [3, 4])
    pair.receiver.cancel(ticket, TercetError("gone"))
    assert isinstance(pair.received.get(timeout=5), inbound.Failed)
    assert pair.received.get(timeout=5) == inbound.Quiesced(ticket)
    assert isinstance(pair.sent.get(timeout=5), outbound.Failed)
    assert pair.sent.get(timeout=5) == outbound.OpDone(ticket)
    pair.destination.view[:] = bytes(len(pair.destination.view))
    pair.push_all(ticket, [3, 4])
    time.sleep(0.1)
    assert not any(pair.destination.view)


def test_cancel_at_the_sender_fails_and_quiesces_the_receiver(pair):
    ticket = Ticket("r", 0, 7)
    pair.grant(ticket, 0, [1], 1)
    pair.sender.cancel(ticket, TercetError("prefill failed"))
    failed = pair.received.get(timeout=5)
    assert "prefill failed" in str(failed.error)
    assert pair.received.get(timeout=5) == inbound.Quiesced(ticket)


def test_a_ticket_without_a_sender_fails_within_its_lease(pair):
    ticket = Ticket("r", 0, 7)
    pair.receiver.admit(ticket, 0, [1])
    failed = pair.received.get(timeout=5)
    assert isinstance(failed.error, LeaseExpired)
    assert pair.received.get(timeout=5) == inbound.Quiesced(ticket)


def test_heartbeats_keep_a_slow_ticket_alive(pair):
    ticket = Ticket("r", 0, 7)
    pair.grant(ticket, 0, [1], 1)
    time.sleep(2.0)  # twice the lease
    pair.push_all(ticket, [3])
    assert isinstance(pair.received.get(timeout=5), inbound.Committed)
    assert isinstance(pair.received.get(timeout=5), inbound.Complete)


def test_goodbye_quiesces_everything(pair):
    ticket = Ticket("r", 0, 7)
    pair.grant(ticket, 0, [1], 1)
    pair.sender.stop()
    assert isinstance(pair.received.get(timeout=5), inbound.Failed)
    assert pair.received.get(timeout=5) == inbound.Quiesced(ticket)


def test_a_flipped_bit_is_found(pair, monkeypatch):
    ticket = Ticket("r", 0, 7)
    pair.grant(ticket, 0, [1], 1)
    pair.sender.push(ticket, 0, 0, [3])
    pair.sender.push(ticket, 1, 0, [3])
    digests = pair.sender._digests
    monkeypatch.setattr(pair.sender, "_digests", lambda write: [d ^ 1 for d in digests(write)])
    pair.sender.push(ticket, 2, 0, [3])
    pair.sender.commit(commit_of(ticket))
    assert isinstance(pair.received.get(timeout=5), inbound.Committed)
    failed = pair.received.get(timeout=5)
    assert failed.error.code() == "digest_mismatch"


@pytest.mark.parametrize(
    ("changes", "layout", "named"),
    [
        ({"fingerprint": "other"}, LAYOUT, "another model"),
        ({"token": "wrong"}, LAYOUT, "wrong cluster token"),
        ({}, KvLayout(3, 8, 32, 2, 8, "float32", 4), "block_size"),
    ],
)
@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_peer_that_does_not_match_is_refused_by_name(transport, changes, layout, named):
    pair = Pair(transport, config("prefill-0", **changes), layout)
    try:
        with pytest.raises(PeerMismatch, match=named):
            pair.sender.open(Ticket("r", 0, 7), pair.endpoint, 1)
        assert pair.receiver.refused()["peer_mismatch"] == 1
    finally:
        pair.stop()


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n" * 10, b"\x00" * 64, b"TCT1" + b"\xff" * 60, b"TCT1"])
def test_garbage_on_the_transfer_port_ends_that_connection_only(garbage):
    pair = Pair("tcp")
    try:
        host, port = pair.receiver._listeners[0].getsockname()
        with socket.create_connection((host, port)) as stranger:
            stranger.sendall(garbage)
            stranger.shutdown(socket.SHUT_WR)
            stranger.settimeout(10)
            assert stranger.recv(1) == b""
        assert sum(pair.receiver.refused().values()) == 1
        ticket = Ticket("r", 0, 7)
        pair.grant(ticket, 0, [1], 1)
        pair.push_all(ticket, [3])
        assert isinstance(pair.received.get(timeout=5), inbound.Committed)
        assert isinstance(pair.received.get(timeout=5), inbound.Complete)
    finally:
        pair.stop()


def test_nobody_listens():
    pair = Pair("tcp")
    pair.receiver.stop()
    with pytest.raises(PeerDown):
        pair.sender.open(Ticket("r", 0, 7), pair.endpoint, 1)
    pair.sender.stop()
