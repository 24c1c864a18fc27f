"""What `nixl_gpu` asks of a GPU, with one made of shared memory and a real NIXL. That nothing is read before it
is computed is in tests/integration/test_transfer_device.py; bytes, facts and faults are in all transports' suites."""

from __future__ import annotations

import queue
import signal
import threading
import time
from dataclasses import replace

import msgpack
import pytest

from tercet.errors import PeerDown, PeerMismatch, ProtocolViolation
from tercet.transfer.memory.layout import KvLayout
from tercet.transfer.protocol import facts
from tercet.transfer.protocol.messages import Probe
from tercet.transfer.transports import nixl
from tercet.transfer.transports.contract import Endpoint, Parcel
from tests import movers
from tests.chaos.test_transfer_faults import LEASE_S, Writer
from tests.fake_gpu import FakeNixl, SharedGpu
from tests.movers import ticket_of

LARGE = KvLayout(layers=3, blocks=32, block_size=128, kv_heads=8, head_dim=128, dtype="float32")
pytestmark = pytest.mark.skipif(FakeNixl.missing() is not None, reason="NIXL is not here")


@pytest.fixture
def pair():
    made = movers.Pair(FakeNixl.name)
    yield made
    made.stop()


def failing(*_: object) -> None:
    raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")


def test_both_ends_name_their_own_kind_of_memory_and_device():
    parcel = Parcel(Probe(8), 1000, [(10, 20, 8), (30, 40, 4)])
    here, there = nixl._Place("VRAM", 3, 1000), nixl._Place("VRAM", 5, 2000)
    source, target = nixl._descriptors(parcel, here, there)
    assert source.tolist() == [[1010, 8, 3], [1030, 4, 3]]
    assert target.tolist() == [[2020, 8, 5], [2040, 4, 5]]
    gpu = SharedGpu()
    gpu.kind, gpu.number = "VRAM", 3
    region = movers.SeenRegion(movers.LAYOUT, gpu)
    assert nixl._Place.of(region) == nixl._Place("VRAM", 3, region.memory, gpu)
    region.close()


def test_memory_that_nixl_cannot_register_is_refused_by_name(pair):
    """As a GPU's memory, where its UCX finds no CUDA. NIXL itself sees that this is host memory."""
    pair.source.gpu.kind = "VRAM"
    with pytest.raises(PeerDown, match="no nixl agent: "):
        pair.open(ticket_of(), 1)


def test_each_thread_enters_the_gpu_before_it_uses_the_library(pair):
    pair.move(ticket_of(), [3], [5])
    (ours,), (theirs,) = pair.sender._peers.values(), pair.mover._peers.values()
    assert {thread.ident for thread in ours.threads} <= pair.source.gpu.entered
    assert {link.thread.ident for link in theirs.links} <= pair.region.gpu.entered


def test_a_block_is_free_only_when_the_gpu_has_settled(pair, monkeypatch):
    """NIXL may have had the GPU copy what came, and a destroyed agent does not wait for that."""
    settled = threading.Event()
    monkeypatch.setattr(pair.region.gpu, "settle", lambda: settled.wait(20))
    pair.grant(ticket_of(), 0, [5], 1)
    next(iter(pair.sender._peers.values())).shutdown()
    assert isinstance(pair.next(facts.ReceiveFailed).error, PeerDown)
    with pytest.raises(queue.Empty):
        pair.events.get(timeout=0.3)
    settled.set()
    pair.next(facts.Quiesced)


def test_a_gpu_that_cannot_say_so_leaves_the_end_to_the_writers_word(pair, monkeypatch, caplog):
    monkeypatch.setattr(pair.region.gpu, "settle", failing)
    pair.grant(ticket_of(), 0, [5], 1)
    next(iter(pair.sender._peers.values())).shutdown()
    pair.next(facts.ReceiveFailed)
    with pytest.raises(queue.Empty):
        pair.events.get(timeout=0.5)
    assert "may not have ended" in caplog.text
    while pair.sender.connected(pair.endpoint):
        threading.Event().wait(0.01)
    pair.sender.connect(pair.endpoint)  # its HELLO says that the pair before is over
    pair.next(facts.Quiesced)


def test_layers_that_fail_on_the_gpu_are_never_written(pair, monkeypatch):
    pair.grant(ticket_of(), 0, [5], 1)
    (peer,) = pair.sender._peers.values()
    monkeypatch.setattr(peer.links[0][1]._stream, "synchronise", failing)
    pair.push_all(ticket_of(), [3])
    assert isinstance(pair.next(facts.ReceiveFailed).error, PeerDown)
    assert isinstance(pair.sent.get(timeout=5), facts.SendFailed)
    assert isinstance(pair.sent.get(timeout=5), facts.OpDone)
    pair.next(facts.Quiesced)
    assert not any(pair.region.view)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_nothing_lands_in_a_free_block_after_a_write_was_cut_off(number):
    """Real processes, and a write of 96 MB that has begun to land and not ended."""
    receiver, writer = movers.Receiving(FakeNixl.name, LARGE, lease_s=LEASE_S), Writer(FakeNixl.name, layout=LARGE)
    blocks = list(range(LARGE.blocks))
    try:
        receiver.mover.admit(ticket_of(), 0, blocks)
        writer.say("open", ticket_of(), receiver.endpoint, LARGE.blocks * LARGE.block_size)
        writer.next("Granted")
        writer.say("push_all", ticket_of(), blocks)
        until = time.monotonic() + 20
        while not any(receiver.region.block(0, 0)[:64]) and time.monotonic() < until:
            time.sleep(1e-4)
        writer.signal(number)
        receiver.next(facts.ReceiveFailed)
        receiver.next(facts.Quiesced)
        assert not all(any(receiver.region.block(LARGE.layers - 1, block)[:64]) for block in blocks)
        receiver.region.bytes.fill_(165)
        if number == signal.SIGSTOP:
            writer.signal(signal.SIGCONT)
            assert [writer.told.get(timeout=20)[0] for _ in range(2)] == ["SendFailed", "OpDone"]
        time.sleep(0.3)
        assert (receiver.region.bytes == 165).all()
    finally:
        writer.end()
        receiver.stop()


@pytest.mark.parametrize("place", [7, [], ["DRAM", 0], ["DRAM", "0", 0], ["DRAM", 0, None], [0, 0, 0]])
def test_a_welcome_without_a_place_is_refused(pair, monkeypatch, place):
    real = FakeNixl.inlet

    def inlet(self, context):
        made = real(self, context)
        metadata, _ = msgpack.unpackb(made.blob)
        made.blob = msgpack.packb([metadata, place])
        return made

    monkeypatch.setattr(FakeNixl, "inlet", inlet)
    with pytest.raises(ProtocolViolation, match="no nixl agent in the WELCOME"):
        pair.open(ticket_of(), 1)


def test_host_memory_and_a_gpus_do_not_meet(pair):
    """Their digests differ."""
    endpoint = replace(Endpoint.decode(pair.endpoint), transports=["nixl"]).encode()
    with pytest.raises(PeerMismatch, match=f"no transport reaches .*{FakeNixl.name}.*nixl"):
        pair.sender.connect(endpoint)
