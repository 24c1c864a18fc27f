"""Encode workers and the router: who encodes what, what moves, what is waited for, and what is told of it."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
import shutil
import threading
import time

import openai
import pytest
from safetensors.torch import load_file, save_file

from tercet.core import UNTIL_FIRST_TOKEN, Role
from tercet.errors import TercetError, UnsupportedModel
from tercet.roles.gateway.gateway import Gateway
from tercet.roles.worker import Worker
from tercet.spec import EMBEDDING_BLOCK, GatewaySpec, ImagesSpec, ListenSpec
from tests.helpers import TOKEN, LocalCluster, cluster, spec_of
from tests.integration.test_images import answered, asked
from tests.integration.test_images_http import Served, part_of
from tests.tiny import tiny_model
from tests.unit.test_engine_images import Model
from tests.unit.test_models_vision import pictures

BLOCKS = {"images": {"blocks": 128}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Model("qwen3-vl", tmp_path_factory.mktemp("model"))


def spec(model, topology="epd", **changes):
    return spec_of(topology, decoders=1, source=str(model.directory), kv__block_size=8, **BLOCKS | changes)


def renamed(request, name):
    return dataclasses.replace(request, request_id=str(name))


def legs_of(made, monkeypatch):
    """-> the encode legs that the router starts from now on, each with its worker's id."""
    started = []
    for view, link in made.router._links.items():

        def start(leg, view=view, real=link.start):
            if leg.kind is Role.ENCODE:
                started.append((view.info.worker_id, leg))
            real(leg)

        monkeypatch.setattr(link, "start", start)
    return started


@pytest.mark.parametrize("topology", ["epd", "e-pd"])
async def test_the_images_of_a_request_spread_and_files_move_once(model, topology, monkeypatch):
    async with cluster(spec(model, topology, encoders=2)) as made:
        started = legs_of(made, monkeypatch)
        request, answer = asked(model, [0, 1, 2, 3])
        tokens, done = await answered(made, request)
        assert tokens == answer
        assert dict(done.workers)["encode"] == "encode-0, encode-1"
        assert [len(leg.images) for _, leg in started] == [2, 2]
        assert all(image.content for _, leg in started for image in leg.images)
        holders = {image.digest: worker for worker, leg in started for image in leg.images}
        started.clear()
        request, answer = asked(model, [3, 2, 1, 0], 1)  # another prompt with the same pictures
        assert (await answered(made, request))[0] == answer
        assert {image.digest: worker for worker, leg in started for image in leg.images} == holders
        assert not any(image.content for _, leg in started for image in leg.images)


async def test_what_was_forgotten_is_sent_again(model, monkeypatch):
    async with cluster(spec(model, images={"blocks": 128, "cache_bytes": 0})) as made:
        started = legs_of(made, monkeypatch)
        for seed in range(3):
            request, answer = asked(model, [0, 1], seed)
            assert (await answered(made, request))[0] == answer
        assert [[bool(image.content) for image in leg.images] for _, leg in started] == [
            [True, True], [False, False], [True, True], [False, False], [True, True],
        ]  # fmt: skip
        load = made.workers["encode-0"].legs.load()
        assert (load.encoder_cache_queries, load.encoder_cache_hits) == (6, 0)


async def test_fifty_at_once_are_encoded_once(model):
    async with cluster(spec(model, encoders=2)) as made:
        requests = [asked(model, [1], seed) for seed in range(5)]
        found = await asyncio.gather(*(answered(made, renamed(requests[n % 5][0], n)) for n in range(50)))
        assert [tokens for tokens, _ in found] == [requests[n % 5][1] for n in range(50)]
        loads = [made.workers[f"encode-{n}"].legs.load() for n in range(2)]
        assert sum(load.encoder_patches for load in loads) == len(model.patches[1].values)
        assert sum(load.encoder_cache_queries - load.encoder_cache_hits for load in loads) == 1


async def test_two_hundred_at_one_encode_worker_all_end(model):
    async with cluster(spec(model)) as made:
        requests = [asked(model, chosen, seed) for seed, chosen in enumerate(([0], [1, 2], [3], [2, 0, 1], [1]))]
        found = await asyncio.gather(
            *(answered(made, renamed(requests[n % 5][0], n)) for n in range(200)), return_exceptions=True
        )
        wrong = [error for error in found if isinstance(error, BaseException) and not isinstance(error, TercetError)]
        assert not wrong
        good = [n for n, each in enumerate(found) if not isinstance(each, BaseException)]
        assert len(good) == 200
        assert all(found[n][0] == requests[n % 5][1] for n in good)


async def test_a_region_of_one_prompt_serves_many(model):
    """Images wait for room at both ends, in their order, and none waits for ever."""
    whole, small = spec(model), ImagesSpec(blocks=3, cache_bytes=0)  # the largest picture takes them all
    assert max(each.shape[1] for each in model.encoded) > 2 * EMBEDDING_BLOCK
    roles = {role: its.model_copy(update={"images": small}) for role, its in whole.roles.items()}
    async with cluster(whole.model_copy(update={"roles": roles})) as made:
        requests = [asked(model, chosen, seed) for seed, chosen in enumerate(([0, 1, 2], [3, 3], [1, 0], [2, 2, 2]))]
        found = await asyncio.gather(*(answered(made, renamed(requests[n % 4][0], n)) for n in range(40)))
        assert [tokens for tokens, _ in found] == [requests[n % 4][1] for n in range(40)]


@pytest.mark.parametrize("topology", ["epd", "e-pd"])
async def test_text_before_an_image_is_computed_while_it_is_encoded(model, topology):
    async with cluster(spec(model, topology)) as made:
        encoder = made.workers["encode-0"].legs.handlers[Role.ENCODE].encoder
        gate, real = threading.Event(), encoder._encode
        encoder._encode = lambda batch: (gate.wait(20), real(batch))[1]
        computing = made.workers["prefill-0" if topology == "epd" else "aggregated-0"].engine
        before = computing.computed
        request, answer = asked(model, [0], lead=40)
        task = asyncio.create_task(answered(made, request))
        async with asyncio.timeout(10):
            while computing.computed == before:
                await asyncio.sleep(0.01)
        assert not task.done()
        gate.set()
        tokens, done = await task
        assert tokens == answer
        assert done.times.of("encode") > 0


@pytest.mark.parametrize("topology", ["epd", "e-pd"])
async def test_who_goes_at_any_moment_leaves_nothing(model, topology):
    rng = random.Random(3)
    async with cluster(spec(model, topology, images={"blocks": 128, "cache_bytes": 0}, encoders=2)) as made:
        prompts = [asked(model, chosen, seed) for seed, chosen in enumerate(([0, 1], [2], [3, 1, 0]))]
        for round_ in range(30):
            tasks = [
                asyncio.create_task(answered(made, renamed(rng.choice(prompts)[0], f"{round_}-{n}"))) for n in range(4)
            ]
            await asyncio.sleep(rng.choice([0, 0.001, 0.003, 0.006, 0.01, 0.02]))
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await made.settled()
        request, answer = prompts[0]
        assert (await answered(made, request))[0] == answer


async def test_an_encode_worker_that_leaves_hands_nothing_over_and_nothing_is_lost(model):
    async with cluster(spec(model, encoders=2)) as made:
        requests = [asked(model, chosen, seed) for seed, chosen in enumerate(([0, 1], [2, 3], [1]))]
        tasks = [asyncio.create_task(answered(made, renamed(requests[n % 3][0], n))) for n in range(30)]
        await asyncio.sleep(0.02)
        await made.workers["encode-0"].drain(0.0)
        assert [tokens for tokens, _ in await asyncio.gather(*tasks)] == [requests[n % 3][1] for n in range(30)]


async def test_one_fault_of_the_tower_ends_its_requests_alone(model):
    async with cluster(spec(model, encoders=1)) as made:
        encoder = made.workers["encode-0"].legs.handlers[Role.ENCODE].encoder
        real, encoder._encode = encoder._encode, None  # which cannot be called
        request, answer = asked(model, [0])
        with pytest.raises(TercetError, match="unexpected TypeError"):
            await answered(made, request)
        encoder._encode = real
        assert (await answered(made, renamed(request, "again")))[0] == answer


@pytest.mark.parametrize("topology", ["aggregated", "pd", "epd", "e-pd"])
async def test_stages_sum_to_the_time_to_the_first_token(topology, tmp_path):
    served = Served("qwen", tmp_path)
    spec = spec_of(topology, decoders=1, source=str(served.directory), **BLOCKS)
    async with cluster(spec) as made:
        anywhere = GatewaySpec(http=ListenSpec(port=0), grpc=ListenSpec(port=0))
        gateway = Gateway(made.spec.model_copy(update={"gateway": anywhere}), TOKEN, made.router)
        info = await gateway.start()
        try:
            async with openai.AsyncOpenAI(base_url=f"{info.http_url}/v1", api_key="none", max_retries=0) as client:
                content = [{"type": "text", "text": "look"}, part_of(pictures(1)[0])]
                whole = await client.chat.completions.create(
                    model=tmp_path.name, messages=[{"role": "user", "content": content}], max_tokens=4, temperature=0
                )
            timings = whole.model_extra["timings"]
            stages = [timings[f"{stage}_s"] for stage in ("gateway", *UNTIL_FIRST_TOKEN)]
            assert all(seconds >= 0 for seconds in stages)
            assert sum(stages) == pytest.approx(timings["ttft_s"], abs=1e-3)
            assert timings["encode_s"] > 0
            assert (timings["embed_transfer_s"] > 0) == (Role.ENCODE in spec.roles)
            text = gateway._metrics.exposition().decode()
            assert "tercet_request_encode_time_seconds_count 1.0" in text
            assert 'tercet_encoder_cache_queries_total{worker="' in text
            assert ("tercet_embedding_blocks{" in text) == (Role.ENCODE in spec.roles)
        finally:
            await gateway.stop()


@pytest.mark.parametrize("role", [Role.ENCODE, Role.PREFILL])
async def test_a_model_that_does_not_see_has_no_encode_workers(role):
    worker = Worker(f"{role}-0", role, 1, spec_of("epd", decoders=1, source=tiny_model(), **BLOCKS), "127.0.0.1", TOKEN)
    with pytest.raises(UnsupportedModel, match="takes no images"):
        await worker.start()


async def test_a_cluster_is_ready_once_an_image_has_passed(tmp_path):
    """Its encode workers have a part in it: a pair that answers text alone is not ready."""
    served = Served("idefics3", tmp_path)
    async with cluster(spec_of("epd", decoders=1, source=str(served.directory), **BLOCKS)) as made:
        encoder = made.workers["encode-0"].legs.handlers[Role.ENCODE].encoder
        gate, real = threading.Event(), encoder._encode
        encoder._encode = lambda batch: (gate.wait(20), real(batch))[1]
        anywhere = GatewaySpec(http=ListenSpec(port=0), grpc=ListenSpec(port=0))
        gateway = Gateway(made.spec.model_copy(update={"gateway": anywhere}), TOKEN, made.router)
        await gateway.start()
        try:
            await made.generate([5, 6, 7])
            await asyncio.sleep(0.5)
            assert not gateway.status()["ready"]
            gate.set()
            async with asyncio.timeout(10):
                while not gateway.status()["ready"]:
                    await asyncio.sleep(0.02)
            load = made.workers["encode-0"].legs.load()
            assert load.encoder_cache_queries - load.encoder_cache_hits == 1
        finally:
            await gateway.stop()


async def test_bfloat16_gives_the_same_tokens_in_every_topology(model):
    """Kernels may compute in another dtype than the weights'."""
    requests = [asked(model, chosen, seed)[0] for seed, chosen in enumerate(([0, 1], [2], [3, 1, 0]))]
    found = {}
    for topology in ("aggregated", "pd", "epd", "e-pd"):
        whole = spec(model, topology)
        narrow = whole.model_copy(update={"model": whole.model.model_copy(update={"dtype": "bfloat16"})})
        async with cluster(narrow) as made:
            found[topology] = [(await answered(made, request))[0] for request in requests]
    assert all(tokens == found["aggregated"] for tokens in found.values()), found


def slowed(worker, seconds):
    """Let each pass of its tower take so long, and get on meanwhile."""
    legs = worker.legs
    encoder = legs.handlers[Role.ENCODE].encoder if Role.ENCODE in legs.handlers else legs.images.encoder
    real, layers = encoder._encode, itertools.count()
    done = [0]

    def encode(batch):
        for _ in range(round(seconds / 0.05)):
            time.sleep(0.05)
            done[0] = next(layers)
        return real(batch)

    encoder._encode, encoder._layers = encode, lambda: done[0]


LEASE = {"transfer__lease_s": 0.6, "transfer__heartbeat_s": 0.2}


@pytest.mark.parametrize("topology", ["pd", "epd", "e-pd"])
async def test_an_image_may_take_longer_than_a_lease(model, topology):
    async with cluster(spec(model, topology, **LEASE)) as made:
        slowed(made.workers["prefill-0" if topology == "pd" else "encode-0"], 2.0)
        request, answer = asked(model, [0])
        tokens, done = await answered(made, request)
        assert tokens == answer
        assert done.attempts == 1


async def test_images_wait_longer_than_a_lease_for_room(model):
    whole, small = spec(model, "e-pd", **LEASE), ImagesSpec(blocks=3, cache_bytes=0)
    roles = {role: its.model_copy(update={"images": small}) for role, its in whole.roles.items()}
    async with cluster(whole.model_copy(update={"roles": roles})) as made:
        slowed(made.workers["encode-0"], 0.4)
        requests = [asked(model, [1], seed, lead=3 + seed) for seed in range(6)]
        found = await asyncio.gather(*(answered(made, request) for request, _ in requests))
        assert [tokens for tokens, _ in found] == [answer for _, answer in requests]
        assert {done.attempts for _, done in found} == {1}


async def test_an_encode_worker_with_another_tower_is_refused(model, tmp_path):
    """Of the same shape: its embeddings would be silently wrong."""
    shutil.copytree(model.directory, other := tmp_path / "model")
    file = other / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "visual" in name)
    weights[name] = weights[name] + 0.125
    save_file(weights, file, {"format": "pt"})
    whole = spec(model, limits__retries=0)
    changed = whole.model_copy(update={"model": whole.model.model_copy(update={"source": str(other)})})
    made = LocalCluster(whole)
    workers = {
        role: Worker(f"{role}-0", role, 1, changed if role is Role.ENCODE else whole, "127.0.0.1", TOKEN)
        for role in whole.roles
    }
    try:
        await made.router.set_workers([await worker.start() for worker in workers.values()])
        while made.router.missing_roles():
            await asyncio.sleep(0.01)
        with pytest.raises(TercetError, match="serves another model"):
            await answered(made, asked(model, [0])[0])
    finally:
        await made.router.close()
        for worker in workers.values():
            await worker.stop()
