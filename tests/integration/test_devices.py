"""A cache that lies elsewhere than the memory which transfers reach: the same tokens, whatever crosses between them.

The stand-in for a device is memory of its own on the host, so that every copy that a GPU needs is needed here too; on a
machine with a GPU the same runs there.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from tercet.cluster.unbuilt import refuse_unbuilt
from tercet.core import Role
from tercet.devices import DEVICES
from tercet.engine import kv_cache, runner
from tercet.engine.kv_cache import StagedCache
from tercet.errors import PeerDown, UnsupportedSpec
from tercet.roles.worker import Worker
from tercet.spec import ClusterSpec, PoolSpec
from tercet.transfer.memory.layout import KvLayout
from tercet.transfer.memory.region import Region
from tercet.transfer.mover.parcels import Loader
from tests.helpers import TOKEN, cluster, spec_of
from tests.tiny import VOCAB, tiny_model

rng = random.Random(6)
LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 129, 200)
PROMPTS = [[rng.randrange(VOCAB) for _ in range(n)] for n in LENGTHS]
CPU = torch.device("cpu")


def staged(monkeypatch, which: set[Role]) -> None:
    """Let workers of these roles compute in memory of their own, which is filled with NaN."""
    roles = itertools.cycle([])

    def start(self, *args):
        nonlocal roles
        roles = iter([self._who.role])
        return real_start(self, *args)

    def cache_of(region, dtype, device):
        if next(roles) not in which:
            return kv_cache.cache_of(region, dtype, device)
        made = StagedCache(region, dtype, CPU)
        made.tensor.fill_(torch.nan)
        return made

    real_start = Worker.start
    monkeypatch.setattr(Worker, "start", start)
    monkeypatch.setattr(runner, "cache_of", cache_of)


async def tokens_of(made, prompts) -> list[list[int]]:
    return [[e.token_id for e in (await made.generate(p, max_tokens=6, ignore_eos=True))[0]] for p in prompts]


_expected: list[list[int]] = []


async def expected() -> list[list[int]]:
    if not _expected:
        async with cluster(spec_of("aggregated", decoders=1, source=tiny_model())) as made:
            _expected.extend(await tokens_of(made, PROMPTS))
    return _expected


SIDES = [{Role.PREFILL}, {Role.DECODE}, {Role.PREFILL, Role.DECODE}]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("which", SIDES, ids=["prefill", "decode", "both"])
async def test_handovers_between_caches_give_the_same_tokens(which, transport, monkeypatch):
    """Twice, so that the second time prefix caches serve what was computed, and what has landed."""
    wanted = await expected()
    staged(monkeypatch, which)
    spec = spec_of("pd", decoders=1, source=tiny_model(), transfer__transport=transport, scheduler__token_budget=48)
    async with cluster(spec) as made:
        for worker in made.workers.values():
            assert isinstance(worker.engine._executor._runner._cache, StagedCache) == (worker._who.role in which)
        assert await tokens_of(made, PROMPTS) == wanted
        assert await tokens_of(made, PROMPTS) == wanted


async def test_aggregated_runs_in_a_cache_of_its_own(monkeypatch):
    wanted = await expected()
    staged(monkeypatch, {Role.AGGREGATED})
    async with cluster(spec_of("aggregated", decoders=1, source=tiny_model())) as made:
        assert await tokens_of(made, PROMPTS) == wanted


async def test_blocks_of_a_handover_that_failed_are_taken_too(monkeypatch):
    """The link breaks behind some blocks; the next attempt counts on them."""
    wanted = await expected()
    staged(monkeypatch, {Role.PREFILL, Role.DECODE})
    spec = spec_of("pd", decoders=1, source=tiny_model(), transfer__transport="tcp", scheduler__token_budget=32)
    async with cluster(spec) as made:
        real, broken = Loader.parcel, []

        def parcel(self, way, pair, write):
            if write.index >= 4 and not broken:
                broken.append(write)
                raise PeerDown("the link broke")
            return real(self, way, pair, write)

        monkeypatch.setattr(Loader, "parcel", parcel)
        events, done = await made.generate(PROMPTS[-1], max_tokens=6, ignore_eos=True)
        assert done.attempts == 2
        assert [e.token_id for e in events] == wanted[-1]


def test_only_the_named_blocks_are_copied():
    region = Region(KvLayout(layers=2, blocks=4, block_size=16, kv_heads=2, head_dim=8, dtype="float32"))
    cache = StagedCache(region, torch.float32, CPU)
    host = torch.frombuffer(region.view, dtype=torch.float32).view(region.layout.shape)
    host.copy_(torch.randn(host.shape))
    before = host.clone()
    cache.begin([2, 0])
    assert torch.equal(cache.tensor[:, [0, 2]], before[:, [0, 2]])
    assert not cache.tensor[:, [1, 3]].any()
    cache.tensor.normal_()
    published: list[bool] = []
    cache.publish(1, [3], lambda: published.append(True))
    assert published
    assert torch.equal(host[1, 3], cache.tensor[1, 3])
    host[1, 3] = before[1, 3]
    assert torch.equal(host, before)


async def test_a_gpu_worker_is_refused_by_name_where_torch_sees_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    spec = spec_of("aggregated", decoders=1, source=tiny_model()).model_dump()
    spec["pools"] = {"default": {"accelerator": "gpu", "gpus": 1}}
    spec["roles"][Role.AGGREGATED]["gpus"] = 1
    worker = Worker("worker-0", Role.AGGREGATED, 1, ClusterSpec.model_validate(spec), "127.0.0.1", TOKEN)
    with pytest.raises(UnsupportedSpec, match=r"accelerator gpu: torch .* sees no CUDA device here"):
        await worker.start()


@pytest.mark.parametrize("kind", PoolSpec.model_fields["accelerator"].annotation.__args__)
def test_every_accelerator_that_a_spec_may_name_is_in_the_table(kind):
    spec = spec_of("aggregated", source=tiny_model()).model_dump(exclude_unset=True)
    del spec["transfer"]
    counts = {} if kind == "cpu" else {f"{kind}s": 1}
    spec["pools"] = {"default": {"accelerator": kind, **dict.fromkeys(counts, 2)}}
    spec["roles"][Role.AGGREGATED].update(counts)
    refuse_unbuilt(ClusterSpec.model_validate(spec))
    assert DEVICES[kind].kind == kind


def test_an_npu_without_torch_npu_is_refused_by_name():
    with pytest.raises(UnsupportedSpec, match=r"accelerator npu: needs torch_npu, which is not installed"):
        DEVICES["npu"].torch_device()
