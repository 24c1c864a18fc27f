"""The unmodified openai client against a real gateway on a real socket; only the router and tokenizer are fakes."""

import asyncio

import openai
import pytest

from tercet.errors import Overloaded, WorkerLost
from tests.fakes.gateway import running
from tests.fakes.router import TIMES, FakeRouter
from tests.fakes.tokenizer import CONTEXT, EOS

SAYS = "The capital of France is Paris."
ASK = [{"role": "user", "content": "What is the capital of France?"}]
PROMPT_TOKENS = len("<u>" + ASK[0]["content"] + "<a>")


@pytest.fixture
async def router():
    return FakeRouter(SAYS)


@pytest.fixture
async def client(router):
    async with (
        running(router) as (_, info),
        openai.AsyncOpenAI(base_url=f"{info.http_url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


async def test_chat(client):
    answer = await client.chat.completions.create(model="fake-model", messages=ASK)
    assert answer.choices[0].message.content == SAYS
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == PROMPT_TOKENS
    assert answer.usage.completion_tokens == len(SAYS) + 1  # the end-of-sequence token counts
    assert answer.usage.prompt_tokens_details.cached_tokens == 16
    timings = answer.model_extra["timings"]
    assert timings["queue_s"] == TIMES.of("queue")
    assert timings["workers"] == {"prefill": "prefill-0", "decode": "decode-1"}
    assert timings["ttft_s"] > 0


async def test_chat_stream(client):
    stream = await client.chat.completions.create(
        model="fake-model", messages=ASK, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content for c in chunks[:-1]) == SAYS
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == PROMPT_TOKENS + len(SAYS) + 1
    assert chunks[-1].model_extra["timings"]["transport"] == "shm"


async def test_a_stream_without_usage_ends_with_the_timings(client):
    stream = await client.chat.completions.create(model="fake-model", messages=ASK, stream=True, max_tokens=2)
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].model_extra["timings"]["kv_bytes"] == TIMES.kv_bytes


async def test_multi_byte_characters_come_whole(client, router):
    router.text = "Grüße, 東京 🗼!"
    stream = await client.chat.completions.create(model="fake-model", messages=ASK, stream=True)
    pieces = [c.choices[0].delta.content async for c in stream]
    assert "".join(pieces) == router.text
    assert "\ufffd" not in "".join(pieces)


async def test_completions_of_texts_and_token_ids(client, router):
    router.script = lambda request: bytes(request.token_ids).upper()
    answer = await client.completions.create(model="fake-model", prompt=["ab", "cd"], max_tokens=50)
    assert [(c.index, c.text) for c in answer.choices] == [(0, "AB"), (1, "CD")]
    answer = await client.completions.create(
        model="fake-model", prompt=[list(b"ef")], max_tokens=50, extra_body={"return_token_ids": True}
    )
    assert answer.choices[0].text == "EF"
    assert answer.choices[0].prompt_token_ids == list(b"ef")
    assert answer.choices[0].token_ids == [*b"EF", EOS]


async def test_token_ids_in_a_stream(client):
    stream = await client.chat.completions.create(
        model="fake-model", messages=ASK, stream=True, extra_body={"return_token_ids": True}
    )
    chunks = [chunk async for chunk in stream]
    assert len(chunks[0].prompt_token_ids) == PROMPT_TOKENS
    assert [i for c in chunks for i in c.choices[0].token_ids] == [*SAYS.encode(), EOS]


async def test_stop_strings_span_tokens_and_close_the_router(client, router):
    router.gate = asyncio.Event()
    router.gate.set()
    answer = await client.chat.completions.create(model="fake-model", messages=ASK, stop=["France", "nowhere"])
    assert answer.choices[0].message.content == "The capital of "
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len("The capital of France")
    assert answer.usage.prompt_tokens_details is None  # the worker had no time to say
    assert router.aborted == [router.requests[0].request_id]


async def test_a_stop_token_gives_no_text(client):
    answer = await client.chat.completions.create(
        model="fake-model", messages=ASK, extra_body={"stop_token_ids": [ord("c")], "return_token_ids": True}
    )
    assert answer.choices[0].message.content == "The "
    assert answer.choices[0].token_ids == list(b"The c")


async def test_n_samples_have_seeds_of_their_own(client, router):
    router.script = lambda request: str(request.params.seed).encode()
    answer = await client.chat.completions.create(model="fake-model", messages=ASK, n=3, seed=7)
    assert [c.message.content for c in answer.choices] == ["7", "8", "9"]
    assert answer.usage.prompt_tokens == PROMPT_TOKENS
    stream = await client.chat.completions.create(model="fake-model", messages=ASK, n=2, seed=2**63 - 1, stream=True)
    texts = ["", ""]
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content
    assert texts == [str(2**63 - 1), str(-(2**63))]


async def test_logprobs_in_both_forms(client):
    answer = await client.chat.completions.create(
        model="fake-model", messages=ASK, max_tokens=2, logprobs=True, top_logprobs=2
    )
    first = answer.choices[0].logprobs.content[0]
    assert (first.token, first.logprob, first.bytes) == ("T", -0.5, [84])
    assert [(t.token, t.logprob) for t in first.top_logprobs] == [("T", -0.5), ("A", -1.5)]
    answer = await client.completions.create(model="fake-model", prompt="x", max_tokens=3, logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens == ["T", "h", "e"]
    assert logprobs.text_offset == [0, 1, 2]
    assert logprobs.top_logprobs[1] == {"h": -0.5}


async def test_models(client):
    assert [m.id for m in (await client.models.list()).data] == ["fake-model"]


async def test_defaults_of_the_two_endpoints(client, router):
    await client.chat.completions.create(model="fake-model", messages=ASK)
    await client.completions.create(model="fake-model", prompt="x")
    assert [r.params.max_tokens for r in router.requests] == [CONTEXT - PROMPT_TOKENS, 16]
    assert router.requests[0].params.seed is not None  # a retry must sample the same tokens


@pytest.mark.parametrize(("error", "status"), [(Overloaded("full"), 503), (WorkerLost("gone"), 502)])
async def test_a_failure_before_the_first_token_has_its_status(client, router, error, status):
    router.error = error
    with pytest.raises(openai.APIStatusError) as caught:
        await client.chat.completions.create(model="fake-model", messages=ASK, stream=True)
    assert caught.value.status_code == status
    assert caught.value.body["code"] == error.code()
    assert caught.value.body["type"] == "server_error"


async def test_a_failure_in_mid_stream_is_an_error_event(client, router):
    router.error, router.error_after = WorkerLost("decode-1 died"), 3
    stream = await client.chat.completions.create(model="fake-model", messages=ASK, stream=True)
    assert [(await anext(stream)).choices[0].delta.content for _ in range(3)] == ["T", "h", "e"]
    with pytest.raises(openai.APIError, match="decode-1 died"):
        await anext(stream)


async def test_one_failed_sample_ends_the_others(client, router):
    router.gate = asyncio.Event()
    router.gate.set()

    def script(request):
        if request.request_id.endswith("-1"):
            router.error = WorkerLost("one leg fell")
        return b"x"

    router.script = script
    with pytest.raises(openai.APIStatusError, match="one leg fell"):
        await client.chat.completions.create(model="fake-model", messages=ASK, n=3)
    assert router.running == 0
