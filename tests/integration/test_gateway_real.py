"""The gateway over real workers and the real model; `cluster` checks at its end that no block has leaked."""

import asyncio

import grpc
import openai
import pytest

from tercet.roles.gateway.gateway import Gateway
from tercet.spec import GatewaySpec, ListenSpec
from tercet.wire.gen import inference_pb2 as pb
from tercet.wire.gen import inference_pb2_grpc
from tests.helpers import TOKEN, cluster, spec_of

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"model": "smollm2-135m-instruct", "messages": QUESTION, "temperature": 0, "max_tokens": 12}


@pytest.mark.parametrize("topology", ["pd", "aggregated"])
async def test_one_answer_over_every_door(topology):
    async with cluster(spec_of(topology, decoders=1)) as made:
        anywhere = GatewaySpec(http=ListenSpec(port=0), grpc=ListenSpec(port=0))
        gateway = Gateway(made.spec.model_copy(update={"gateway": anywhere}), TOKEN, made.router)
        info = await gateway.start()
        try:
            while not gateway.status()["ready"]:  # by its own probe: no request has been sent yet
                await asyncio.sleep(0.02)
            async with openai.AsyncOpenAI(base_url=f"{info.http_url}/v1", api_key="none", max_retries=0) as client:
                answer = await _check_http(client)
                await _check_aborts(client)
            assert await _by_grpc(info.grpc_address) == answer
        finally:
            await gateway.stop()


async def _check_http(client):
    """-> the answer's text. Whole, streamed and from token ids it is the same."""
    whole = await client.chat.completions.create(**GREEDY, extra_body={"return_token_ids": True})
    text = whole.choices[0].message.content
    assert "Paris" in text
    timings = whole.model_extra["timings"]
    assert timings["ttft_s"] >= timings["prefill_s"] > 0
    assert (timings["transport"] == "shm") == ("decode" in timings["workers"]) == (timings["kv_bytes"] > 0)
    stream = await client.chat.completions.create(**GREEDY, stream=True, logprobs=True, top_logprobs=1)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == text
    likely = [entry for chunk in chunks for entry in chunk.choices[0].logprobs.content]
    assert all(entry.top_logprobs[0].token == entry.token for entry in likely)  # greedy
    again = await client.completions.create(
        model=GREEDY["model"], prompt=whole.model_extra["prompt_token_ids"], temperature=0, max_tokens=12
    )
    assert again.choices[0].text == text
    assert again.usage.prompt_tokens_details.cached_tokens > 0
    return text


async def _check_aborts(client):
    """A stop string and a client that goes away; the leak oracle sees what they leave behind."""
    stopped = await client.chat.completions.create(**GREEDY | {"max_tokens": 500}, stop="Paris")
    assert "Paris" not in stopped.choices[0].message.content
    assert stopped.choices[0].finish_reason == "stop"
    timings = stopped.model_extra["timings"]
    assert timings["first_decode_s"] > 0
    assert timings["workers"]
    assert (
        sum(timings[f"{stage}_s"] for stage in ("queue", "prefill", "transfer"))
        <= timings["ttft_s"] + timings["first_decode_s"]
    )
    assert stopped.usage.prompt_tokens_details.cached_tokens > 0
    stream = await client.chat.completions.create(**GREEDY | {"max_tokens": 500}, stream=True)
    await anext(stream)
    await stream.close()


async def _by_grpc(address):
    chat = pb.Chat(messages=[pb.Message(role=m["role"], content=m["content"]) for m in QUESTION])
    request = pb.GenerateRequest(chat=chat, sampling=pb.Sampling(temperature=0, max_tokens=12))
    async with grpc.aio.insecure_channel(address) as channel:
        responses = [r async for r in inference_pb2_grpc.InferenceStub(channel).Generate(request)]
    assert responses[-1].done.completion_tokens == sum(len(r.delta.token_ids) for r in responses)
    return "".join(r.delta.text for r in responses)
