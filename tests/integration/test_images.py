"""Prompts with images through real workers and the router: what transformers answers, and what goes wrong."""

from __future__ import annotations

import asyncio
import dataclasses
import io

import pytest

from tercet.core import Role
from tercet.errors import InvalidRequest, ProtocolViolation
from tercet.models.vision.prompt import image_digest
from tests.helpers import cluster, request_of, spec_of
from tests.tiny import tiny_model
from tests.unit.test_engine_images import NEW, Model


@pytest.fixture(scope="module", params=["qwen2.5-vl", "qwen3-vl", "idefics3"])
def model(request, tmp_path_factory):
    return Model(request.param, tmp_path_factory.mktemp("model"))


def file_of(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def asked(model, chosen, seed=0, lead=5):
    """-> a request, and transformers' answer. lead: tokens before the first picture."""
    ids, images, answer = model.prompt(chosen, seed, lead)
    contents = [file_of(model.pictures[i]) for i in chosen]
    shown = tuple(
        dataclasses.replace(image, content=content, digest=image_digest(content, "m"))
        for image, content in zip(images, contents, strict=True)
    )
    request = request_of(ids, max_tokens=NEW, ignore_eos=True, temperature=0.0)
    return dataclasses.replace(request, images=shown), answer


def embeddings_of(worker):
    """That its engine holds."""
    return [] if worker.legs.engine is None else worker.engine._executor._runner._embeddings


async def answered(made, request):
    events = [event async for event in made.router.generate(request)]
    return [event.token_id for event in events if hasattr(event, "token_id")], events[-1]


TOPOLOGIES = ["aggregated", "pd", "ep-d", "epd", "e-pd"]


@pytest.mark.parametrize("topology", TOPOLOGIES)
async def test_tokens_are_transformers(topology, model):
    """Several at once, several pictures in a prompt, and again from the caches."""
    async with cluster(spec_of(topology, decoders=1, source=str(model.directory), kv__block_size=8)) as made:
        requests = [asked(model, chosen, seed) for seed, chosen in enumerate(([0], [1, 3, 0], [2], [0], [3, 3]))]
        found = await asyncio.gather(*(answered(made, request) for request, _ in requests))
        assert [tokens for tokens, _ in found] == [answer for _, answer in requests]
        request, answer = requests[1]
        tokens, done = await answered(made, dataclasses.replace(request, request_id="again"))
        assert tokens == answer
        assert done.cached_tokens > 0
        encoding = {"aggregated": "aggregated-0", "epd": "encode-0", "e-pd": "encode-0"}.get(topology, "prefill-0")
        load = made.workers[encoding].legs.load()
        assert (load.encoder_cache_queries, load.encoder_cache_hits) == (11, 7)
        assert load.encoder_patches == sum(len(patches.values) for patches in model.patches)
        assert not any(map(embeddings_of, made.workers.values()))


@pytest.mark.parametrize("topology", TOPOLOGIES)
async def test_a_picture_that_cannot_be_read_ends_its_request_alone(topology, model):
    async with cluster(spec_of(topology, decoders=1, source=str(model.directory))) as made:
        (good, answer), (bad, _) = asked(model, [0]), asked(model, [1, 2], 1)
        images = (bad.images[0], dataclasses.replace(bad.images[1], content=bad.images[1].content[:90]))
        broken = dataclasses.replace(bad, images=images)
        first, second = await asyncio.gather(answered(made, good), answered(made, broken), return_exceptions=True)
        assert first[0] == answer
        assert isinstance(second, InvalidRequest)
        wrong = dataclasses.replace(bad, images=(dataclasses.replace(bad.images[0], grid=(1, 1, 1)),))
        with pytest.raises(ProtocolViolation, match="an image of"):
            await answered(made, wrong)
        beyond = dataclasses.replace(bad, token_ids=bad.token_ids[:3])
        with pytest.raises(ProtocolViolation, match="of a prompt of 3 tokens"):
            await answered(made, beyond)


async def test_who_goes_while_pictures_are_encoded_leaves_nothing(model):
    async with cluster(spec_of("pd", decoders=1, source=str(model.directory))) as made:
        for seed, wait_s in enumerate((0.0, 0.001, 0.005, 0.02, 0.05)):
            request, _ = asked(model, [0, 1, 2], seed)
            task = asyncio.create_task(answered(made, dataclasses.replace(request, request_id=f"r{seed}")))
            await asyncio.sleep(wait_s)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        request, answer = asked(model, [3], 9)
        assert (await answered(made, request))[0] == answer
        await made.settled()
        assert not any(map(embeddings_of, made.workers.values()))


async def test_a_model_that_takes_none_says_so(model):
    async with cluster(spec_of("aggregated", decoders=1, source=tiny_model())) as made:
        request, _ = asked(model, [0])
        with pytest.raises(InvalidRequest, match="this model takes no images"):
            await answered(made, request)
        assert [*made.workers] == [f"{Role.AGGREGATED.value}-0"]


async def test_who_is_preempted_where_it_is_decoded_goes_on_elsewhere(model):
    """The decode worker cannot compute its prompt again: it is handed over once more, and no token is lost."""
    lead = 5 + -len(model.prompt([2])[0]) % 8  # full blocks, so that each needs one more for its second token
    requests = [asked(model, [2], seed, lead) for seed in range(4)]
    blocks = len(requests[0][0].token_ids) // 8 * 2 + 1
    spec = spec_of("pd", decoders=1, source=str(model.directory), kv__block_size=8)
    tight = spec.roles[Role.DECODE].kv.model_copy(update={"blocks": blocks, "prefix_cache": False})
    decode = spec.roles[Role.DECODE].model_copy(update={"kv": tight})
    async with cluster(spec.model_copy(update={"roles": spec.roles | {Role.DECODE: decode}})) as made:
        for again in range(20):  # until two were decoded at once, which a busy machine delays
            asked_now = [
                dataclasses.replace(request, request_id=f"{again}-{i}") for i, (request, _) in enumerate(requests)
            ]
            found = await asyncio.gather(*(answered(made, request) for request in asked_now))
            assert [tokens for tokens, _ in found] == [answer for _, answer in requests]
            if made.router.loads()["decode-0"].preemptions > 0:
                break
        assert sum(done.attempts for _, done in found) > len(requests)
