"""One client beside others: its requests take room as they come, and each choice of them is one of its own."""

import asyncio
import json

import aiohttp
import grpc
import openai
import pytest

from tercet.wire.gen import inference_pb2 as pb
from tercet.wire.gen import inference_pb2_grpc
from tests.fakes.gateway import running
from tests.fakes.router import FakeRouter

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ASK = {"messages": [{"role": "user", "content": "hello"}]}


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def key(name):
    return {"Authorization": f"Bearer {name}"}


async def test_many_prompts_leave_room_for_others():
    """256 prompts in a gateway of 8: they run 8 at a time, and others are let in at once, the same client's too."""
    router = FakeRouter()
    router.gate = asyncio.Event()
    async with (
        running(router, max_inflight_requests=8) as (gateway, info),
        aiohttp.ClientSession(info.http_url) as http,
    ):
        many = {"prompt": ["ab"] * 256, "max_tokens": 2}
        greedy = asyncio.create_task(http.post(COMPLETIONS, json=many, headers=key("greedy")))
        await until(lambda: router.running == 8)
        names = ("greedy", "a", "b")
        others = [asyncio.create_task(http.post(CHAT, json=ASK, headers=key(name))) for name in names]
        await until(lambda: router.running == 11)
        router.gate.set()
        assert [(await other).status for other in others] == [200] * 3
        answer = await (await greedy).json()
        assert len(answer["choices"]) == 256
        assert [choice["index"] for choice in answer["choices"]] == list(range(256))
        assert gateway._frontend.inflight == 0


async def test_no_more_than_the_limit_of_one_request_run_at_once():
    router = FakeRouter(delay_s=0.001)
    most = 0
    generate = router.generate

    async def counting(request):
        nonlocal most
        async for event in generate(request):
            most = max(most, router.running)
            yield event

    router.generate = counting
    async with running(router, max_inflight_requests=5) as (_, info), aiohttp.ClientSession(info.http_url) as http:
        answer = await http.post(COMPLETIONS, json={"prompt": ["ab"] * 40, "n": 2, "max_tokens": 3})
        assert len((await answer.json())["choices"]) == 80
    assert most == 5


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_of_many_prompts_that_goes_away_gives_its_room_back(stream):
    router = FakeRouter()
    router.gate = asyncio.Event()
    async with (
        running(router, max_inflight_requests=4) as (gateway, info),
        aiohttp.ClientSession(info.http_url) as http,
    ):
        many = {"prompt": ["ab"] * 100, "stream": stream}
        task = asyncio.create_task(http.post(COMPLETIONS, json=many))
        await until(lambda: router.running == 4)
        task.cancel()
        await until(lambda: gateway._frontend.inflight == 0)
        assert router.running == 0
        router.gate.set()
        assert (await http.post(CHAT, json=ASK)).status == 200


async def test_the_choices_that_wait_end_with_the_deadline():
    router = FakeRouter()
    router.gate = asyncio.Event()
    async with (
        running(router, max_inflight_requests=2) as (gateway, info),
        aiohttp.ClientSession(info.http_url) as http,
    ):
        answer = await http.post(COMPLETIONS, json={"prompt": ["ab"] * 10, "timeout": 0.2})
        assert answer.status == 504
        assert gateway._frontend.inflight == 0


async def test_clients_are_told_apart_by_key_then_by_address():
    router = FakeRouter()
    async with running(router) as (_, info), aiohttp.ClientSession(info.http_url) as http:
        for headers in (key("one"), key("one"), key("two"), {}):
            await http.post(CHAT, json=ASK, headers=headers)
        async with grpc.aio.insecure_channel(info.grpc_address) as channel:
            generate = inference_pb2_grpc.InferenceStub(channel).Generate
            for metadata in ((("authorization", "Bearer one"),), ()):
                assert [r async for r in generate(pb.GenerateRequest(text="hi"), metadata=metadata)]
    one, again, two, nobody, one_by_grpc, nobody_by_grpc = (request.client for request in router.requests)
    assert one == again == one_by_grpc != two
    assert nobody == nobody_by_grpc == "address-127.0.0.1"
    assert "one" not in one  # a digest of it


# ---- what is of a choice, not of its request


@pytest.fixture
async def router():
    return FakeRouter()


@pytest.fixture
async def client(router):
    async with (
        running(router) as (_, info),
        openai.AsyncOpenAI(base_url=f"{info.http_url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


@pytest.mark.parametrize("seed", [None, 7, 2**63 - 2, -(2**63)])
@pytest.mark.parametrize("n", [1, 3])
async def test_equal_prompts_have_seeds_of_their_own(client, router, seed, n):
    await client.completions.create(model="fake-model", prompt=["x"] * 4, n=n, seed=seed)
    seeds = [request.params.seed for request in sorted(router.requests, key=lambda r: int(r.request_id.split("-")[-1]))]
    assert len(set(seeds)) == 4 * n
    assert all(-(2**63) <= s < 2**63 for s in seeds)
    if seed is not None:
        assert seeds[0] == seed
        assert [(s - seed) % 2**64 for s in seeds] == list(range(4 * n))


async def test_every_choice_has_its_own_text_stop_and_end(client, router):
    """Choices that come interleaved: half a character, half a stop string and the end of one are nobody else's."""
    says = {b"a": "é stop here", b"b": "🗼 sto", b"c": "plain", b"d": "ééé"}
    router.script = lambda request: says[bytes(request.token_ids)].encode()
    prompts = [prompt.decode() for prompt in says]
    whole = await client.completions.create(model="fake-model", prompt=prompts, stop="stop", max_tokens=20)
    assert [c.text for c in whole.choices] == ["é ", "🗼 sto", "plain", "ééé"]
    texts, ends = [""] * 4, [None] * 4
    stream = await client.completions.create(
        model="fake-model", prompt=prompts, stop="stop", max_tokens=20, stream=True
    )
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert texts == ["é ", "🗼 sto", "plain", "ééé"]
    assert ends == ["stop"] * 4


async def test_every_choice_has_its_own_offsets(client, router):
    router.script = lambda request: bytes(request.token_ids).upper()
    answer = await client.completions.create(model="fake-model", prompt=["abc", "de"], n=2, logprobs=1, max_tokens=9)
    for choice in answer.choices:
        length = 3 if choice.index < 2 else 2
        assert choice.logprobs.text_offset == [*range(length), length]  # the end token is behind the text
        assert len(choice.logprobs.token_logprobs) == length + 1


async def test_every_choice_has_its_own_room_in_the_context(client, router):
    body = {"prompt": ["x" * 100, "x"], "max_tokens": 20}
    await client.completions.create(model="fake-model", **body)
    assert [request.params.max_tokens for request in router.requests] == [20, 20]
    assert len({request.request_id for request in router.requests}) == 2


async def test_offsets_count_characters_not_tokens(client, router):
    router.text = "é🗼x"
    answer = await client.completions.create(model="fake-model", prompt="x", logprobs=0, max_tokens=20)
    logprobs = answer.choices[0].logprobs
    assert logprobs.text_offset == [0, 0, 1, 1, 1, 1, 2, 3]
    assert [json.dumps(top) for top in logprobs.top_logprobs][-2] == '{"x": -0.5}'
