"""KV in a GPU's memory, with a GPU made of shared memory (tests/fake_gpu.py): what transports between such memories do
beyond what every transport must, which tests/integration/test_transfer_conformance.py holds for them too."""

from __future__ import annotations

import queue
import random
import signal
import time
from dataclasses import replace
from typing import get_args

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.cluster import preflight
from tercet.cluster.unbuilt import refuse_unbuilt
from tercet.core import Role
from tercet.engine.kv_cache import cache_of
from tercet.errors import ClusterError, PeerDown, PeerMismatch, ProtocolViolation, SpecError, UnsupportedSpec
from tercet.kernels.kinds import Kernels
from tercet.roles import computing, memory, part
from tercet.spec import ClusterSpec, TransferSpec
from tercet.transfer.memory.device import DeviceUnits
from tercet.transfer.memory.layout import KvLayout, Pair, Units, runs_of
from tercet.transfer.memory.pack import Cells
from tercet.transfer.memory.region import Region
from tercet.transfer.mover.receiver import KvReceiver
from tercet.transfer.mover.sender import KvSender
from tercet.transfer.protocol import facts
from tercet.transfer.transports import table
from tercet.transfer.transports.contract import Endpoint
from tercet.transfer.transports.cuda_ipc import CudaIpcTransport
from tercet.transfer.transports.nixl import NixlGpuTransport, NixlTransport
from tercet.transfer.transports.shm import ShmTransport
from tercet.transfer.transports.tcp import TcpTransport
from tercet.transfer.transports.ucx import UcxTransport
from tests import movers
from tests.chaos.test_transfer_faults import Scene, Writer
from tests.fake_gpu import FAKES, SeenRegion, SharedGpu
from tests.helpers import cluster, spec_of
from tests.movers import LAYOUT, fill, ticket_of
from tests.tiny import VOCAB, tiny_model

FAKE = "cuda_ipc_fake"
ON_GPUS = ["cuda_ipc", "nixl_gpu"]
each_fake = pytest.mark.parametrize(
    "cls", [pytest.param(cls, marks=pytest.mark.skipif(cls.missing() is not None, reason="not here")) for cls in FAKES]
)
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture
def pair():
    made = movers.Pair(FAKE)
    yield made
    made.stop()


@pytest.fixture
def apart(monkeypatch):
    """A pair whose ends take each other for processes of their own, so that one maps the other's memory."""
    real = CudaIpcTransport.inlet

    def inlet(self, context):
        made = real(self, context)
        pid, *rest = msgpack.unpackb(made.blob)
        made.blob = msgpack.packb([pid + 1, *rest])
        return made

    monkeypatch.setattr(CudaIpcTransport, "inlet", inlet)
    made = movers.Pair(FAKE)
    yield made
    made.stop()


# ---- units in a GPU's memory, against those in the host's


SIDES = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from([8, 16, 32]),
        "order": st.sampled_from(["NHD", "HND"]),
        "tp_size": st.sampled_from([1, 2, 4]),
        "dtype": st.sampled_from(["float32", "bfloat16", "int8"]),
        "head_dim": st.sampled_from([3, 4, 8]),
        "parts": st.sampled_from([1, 2]),
    }
)


def side(**changes) -> KvLayout:
    base = {"layers": 3, "blocks": 6, "kv_heads": 4, "model_layers": 5, "first_layer": 1}
    return KvLayout(**base | changes)


def some_units(layout: KvLayout, unit: int, count: int, rng: random.Random) -> Units:
    per_block = layout.block_size // unit
    skip = rng.randrange(per_block)
    return Units(rng.sample(range(layout.blocks), -(-(skip + count) // per_block)), skip, count)


@settings(max_examples=40, deadline=None)
@given(src=SIDES, dst=SIDES, count=st.integers(1, 4), seed=st.integers(0, 99))
def test_digests_know_neither_degree_nor_order_nor_place_and_zeroing_is_exact(src, dst, count, seed):
    rng = random.Random(seed)
    common = {key: src[key] for key in ("dtype", "head_dim", "parts")}
    ours = side(**src | {"tp_rank": rng.randrange(src["tp_size"])})
    theirs = side(**dst | common | {"tp_rank": rng.randrange(dst["tp_size"])})
    if not set(ours.heads) & set(theirs.heads):
        return
    moved = Pair(ours, theirs)
    if not moved.heads:
        return
    source, target = SeenRegion(ours, SharedGpu()), SeenRegion(theirs, SharedGpu())
    fill(source, seed)
    fill(target, seed + 1)
    here, there = (some_units(layout, moved.unit, count, rng) for layout in (ours, theirs))
    for at, to, size in runs_of(moved, moved.layers, here, there):
        target.bytes[to : to + size] = source.bytes[at : at + size]
    units = [
        DeviceUnits(region, moved.layers, place, moved.unit, moved.heads)
        for region, place in ((source, here), (target, there))
    ]
    digests = [each.digests(7) for each in units]
    assert torch.equal(*digests)
    assert digests[0].shape == (len(moved.layers), count, len(moved.heads))
    assert len(set(digests[0].flatten().tolist())) == digests[0].numel()
    expected = bytearray(bytes(target.view))
    Cells(theirs, memoryview(expected), moved.layers, there, moved.unit, moved.heads).zero()
    units[1].zero()
    assert bytes(target.view) == expected
    for region in (source, target):
        region.close()


# ---- the engine's work and the copy


@each_fake
@pytest.mark.parametrize("integrity", [True, False])
def test_nothing_is_read_before_it_is_computed(cls, integrity):
    made = movers.Pair(cls.name, integrity=integrity)
    try:
        made.grant(ticket_of(), 0, [5], 1)
        computed = bytes(made.source.block(2, 3))
        made.source.block(2, 3)[:] = b"\xff" * len(computed)
        for layer in LAYOUT.window:
            made.source.publish(layer, [3])
        late = made.source.gpu.marks[-1]
        late.passed.clear()  # the last layer is still being computed
        made.push_all(ticket_of(), [3])
        with pytest.raises(queue.Empty):
            made.events.get(timeout=0.3)
        assert not any(made.region.block(2, 5))
        made.source.block(2, 3)[:] = computed
        late.passed.set()
        made.next(facts.Noted)
        made.next(facts.Complete)
        assert made.mover.corrupt() == 0
        assert made.same(3, 5)
    finally:
        made.stop()


def test_a_step_behind_delays_no_write(pair):
    """The engine has launched the next step, of other blocks, before the writes of this one begin."""
    for layer in LAYOUT.window:
        pair.source.publish(layer, [3])
        pair.source.publish(layer, [4])
        pair.source.gpu.marks[-1].passed.clear()
    pair.move(ticket_of(), [3], [5])
    assert pair.same(3, 5)


def test_the_model_works_in_the_region_and_nothing_waits_for_it():
    region = SeenRegion(LAYOUT, SharedGpu())
    cache = cache_of(region, torch.float32, torch.device("cpu"))
    cache.tensor[1, 2] = 3.0
    assert bytes(region.block(1, 2)) == torch.full((LAYOUT.block_bytes // 4,), 3.0).numpy().tobytes()
    assert region.computed(range(3), [2, 4]) == []
    published: list[bool] = []
    cache.publish(1, [2], lambda: published.append(True))
    cache.begin([2])
    assert published
    assert region.computed(range(3), [2, 4]) == region.gpu.marks
    assert len(region.gpu.marks) == 1
    before = cache.mark()
    cache.publish(2, [4, 3], lambda: None)
    cache.wait(before)
    assert region.computed(range(3), [2, 4]) == region.gpu.marks[1:]
    cache.wait(cache.mark())
    assert region.computed(range(3), [2, 3, 4]) == []
    region.close()


@each_fake
async def test_the_tokens_are_those_of_host_memory(cls, monkeypatch):
    """Whole workers. What was not written looks like NaN."""
    rng = random.Random(4)
    prompts = [[rng.randrange(VOCAB) for _ in range(length)] for length in (1, 15, 16, 17, 33, 100)]

    async def tokens(made):
        return [[e.token_id for e in (await made.generate(p, max_tokens=6, ignore_eos=True))[0]] for p in prompts]

    async with cluster(spec_of("pd", source=tiny_model())) as made:
        expected = await tokens(made)
    regions = []

    def region_of(layout, transport, kernels, cores):
        regions.append(SeenRegion(layout, SharedGpu()))
        regions[-1].bytes.fill_(0xFF)
        return regions[-1]

    monkeypatch.setattr(computing, "region_of", region_of)
    monkeypatch.setattr(part, "usable", lambda name, tls: [cls()])
    async with cluster(spec_of("pd", source=tiny_model())) as made:
        assert await tokens(made) == expected
        result = (await made.generate(prompts[-1], max_tokens=2))[1]
        assert result.times.transport == cls.name
        broken = next(iter(made.workers.values()))
        await broken.health()
        broken._parts[0]._region.broken = "the GPU's driver has failed: out of order"
        with pytest.raises(ClusterError, match="driver has failed: out of order"):
            await broken.health()
    assert len(regions) == 3


# ---- the peer's memory


def test_the_peers_memory_is_unmapped_when_the_pair_ends(apart):
    apart.move(ticket_of(), [3, 6], [5, 2])
    assert apart.same(3, 5)
    gpu = apart.source.gpu
    assert len(gpu.opened) == 1
    apart.sender.stop()
    until = time.monotonic() + 5
    while gpu.opened and time.monotonic() < until:
        time.sleep(0.01)
    assert gpu.opened == []
    assert len(gpu.mapped) == 1  # its own


def test_gpus_without_peer_access_are_refused_by_name(apart):
    apart.source.gpu.alone, apart.region.gpu.uuid = True, "elsewhere"
    with pytest.raises(
        PeerMismatch, match=r"on GPU elsewhere cannot be mapped on GPU fake-\d+: .*PEER_ACCESS_UNSUPPORTED"
    ):
        apart.open(ticket_of(), 1)
    assert apart.source.gpu.opened == []


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\xc1",
        *map(msgpack.packb, [7, [1, "u", 1, 1], [1, "u", "1", 1, bytes(64)], [1, "u", 1, 1, bytes(63)]]),
    ],
)
def test_a_welcome_without_a_handle_is_refused(pair, monkeypatch, blob):
    real = CudaIpcTransport.inlet

    def inlet(self, context):
        made = real(self, context)
        made.blob = blob
        return made

    monkeypatch.setattr(CudaIpcTransport, "inlet", inlet)
    with pytest.raises(ProtocolViolation, match="no CUDA IPC handle in the WELCOME"):
        pair.open(ticket_of(), 1)


def test_memory_that_is_shorter_than_it_was_said_to_be_is_refused(apart, monkeypatch):
    monkeypatch.setattr(apart.region, "num_bytes", apart.region.num_bytes + 1)
    with pytest.raises(PeerMismatch, match=r"is not \d+ bytes long"):
        apart.open(ticket_of(), 1)


def test_nothing_is_written_behind_the_end(pair, monkeypatch):
    """A peer whose layout is larger than the memory that it gives."""
    monkeypatch.setattr(pair.region, "num_bytes", LAYOUT.total_bytes)  # without the scratch of the probes
    with pytest.raises(ProtocolViolation, match="behind the end"):
        pair.open(ticket_of(), 1)


def test_a_copy_that_fails_ends_the_pair_by_name(pair, monkeypatch):
    pair.grant(ticket_of(), 0, [5], 1)
    monkeypatch.setattr("tests.fake_gpu.SharedStream.copy", failing("CUDA_ERROR_INVALID_VALUE"))
    pair.push_all(ticket_of(), [3])
    assert isinstance(pair.next(facts.ReceiveFailed).error, PeerDown)
    assert isinstance(pair.sent.get(timeout=5), facts.SendFailed)
    assert isinstance(pair.sent.get(timeout=5), facts.OpDone)
    monkeypatch.undo()
    until = time.monotonic() + 5
    while pair.sender.connected(pair.endpoint) and time.monotonic() < until:
        time.sleep(0.01)
    pair.sender.connect(pair.endpoint)
    pair.next(facts.Quiesced)  # the next pair says that all that was begun has ended


def test_copies_that_may_not_have_ended_keep_their_blocks(pair, monkeypatch, caplog):
    """The driver fails in such a way that nobody knows whether the GPU still writes. Then neither end reuses a block
    until the writer's process is dead."""
    pair.grant(ticket_of(), 0, [5], 1)
    stream = pair.sender._peers[pair.endpoint].links[0][1]._stream
    monkeypatch.setattr(stream, "synchronise", lambda: failing("CUDA_ERROR_ILLEGAL_ADDRESS")())
    pair.push_all(ticket_of(), [3])
    assert isinstance(pair.next(facts.ReceiveFailed).error, PeerDown)
    assert isinstance(pair.sent.get(timeout=5), facts.SendFailed)
    for events in (pair.events, pair.sent):
        with pytest.raises(queue.Empty):
            events.get(timeout=0.5)
    assert "may not have ended" in caplog.text
    assert pair.source.broken == "the GPU's driver has failed: CUDA_ERROR_ILLEGAL_ADDRESS"


def failing(text: str):
    def fail(*_):
        raise RuntimeError(text)

    return fail


def test_a_killed_writer_leaves_a_receiver_that_serves_the_next():
    """Real processes: it is killed with half of a write done; its mapping is of no consequence."""
    scene = Scene(FAKE)
    try:
        scene.until_half()
        scene.writer.signal(signal.SIGKILL)
        scene.receiver.next(facts.ReceiveFailed)
        scene.receiver.next(facts.Quiesced)
        scene.reuse()
        scene.writer.end()
        scene.writer = Writer(FAKE)
        scene.whole(1)
    finally:
        scene.end()


# ---- refusals


def test_memory_and_transport_must_fit():
    device, host = SeenRegion(LAYOUT, SharedGpu()), Region(LAYOUT)
    for cls in (ShmTransport, TcpTransport, UcxTransport, NixlTransport):
        with pytest.raises(SpecError, match=f"{cls.name} moves KV in host memory, and here it lies in a GPU's memory"):
            KvReceiver(movers.config("d"), 1, device, [cls()], print)
    for cls in (CudaIpcTransport, NixlGpuTransport):
        with pytest.raises(SpecError, match=f"{cls.name} moves KV in a GPU's memory, and here it lies in host memory"):
            KvSender(movers.config("p"), host, [cls()], print)
    for region in (device, host):
        region.close()


def test_a_worker_on_another_host_is_out_of_reach(pair):
    there = replace(Endpoint.decode(pair.endpoint), host_id="elsewhere").encode()
    with pytest.raises(PeerMismatch, match="which is on another host"):
        pair.sender.connect(there)


def test_only_a_named_transport_puts_kv_into_a_gpus_memory():
    names = ["auto", *(cls.name for cls in table.ALL)]
    assert [name for name in names if table.in_device_memory(name)] == ON_GPUS
    assert not {*ON_GPUS} & {transport.name for transport in table.usable("auto")}


def test_every_transport_has_its_name_in_the_spec():
    assert {*get_args(TransferSpec.model_fields["transport"].annotation)} == {"auto", *(cls.name for cls in table.ALL)}


@NO_GPU
@pytest.mark.parametrize("name", ON_GPUS)
def test_without_a_gpu_it_is_refused_before_anything_starts(name):
    spec = ClusterSpec.model_validate(
        {
            "pools": {"g": {"accelerator": "gpu", "gpus": 2}},
            "roles": {role: {"pool": "g", "gpus": 1} for role in (Role.PREFILL, Role.DECODE)},
            "transfer": {"transport": name},
        }
    )
    refuse_unbuilt(spec)
    with pytest.raises(SpecError, match=rf"transfer\.transport: {name} cannot be used here: "):
        preflight.refuse_missing_transport(spec)
    with pytest.raises(SpecError, match=f"{name} cannot be used here"):
        memory.region_of(LAYOUT, name, Kernels(), [])


@pytest.mark.parametrize("name", ON_GPUS)
def test_a_pool_of_cpus_is_refused(name):
    spec = spec_of("pd", transfer__transport=name)
    with pytest.raises(
        UnsupportedSpec, match=rf"{name} moves KV between GPUs, and pool .* has accelerator cpu; use auto"
    ):
        refuse_unbuilt(spec)


def test_a_full_gpu_is_named(monkeypatch):
    monkeypatch.setattr(memory, "usable", lambda name: [])
    monkeypatch.setattr("tercet.transfer.memory.cuda.CudaGpu", lambda device, copy_runs: SharedGpu())
    monkeypatch.setattr(SharedGpu, "allocate", failing("cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY, out of memory"))
    with pytest.raises(
        UnsupportedSpec, match=r"cuda_ipc: no .* GB for 8 blocks of KV in the GPU's memory: .*OUT_OF_MEMORY"
    ):
        memory.region_of(LAYOUT, "cuda_ipc", Kernels(), [])
