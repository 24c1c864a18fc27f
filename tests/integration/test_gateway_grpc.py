"""gRPC over a real channel: tokens and text, deadline, cancellation, statuses, health, reflection."""

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tercet.errors import WorkerLost
from tercet.wire.gen import inference_pb2 as pb
from tercet.wire.gen import inference_pb2_grpc
from tests.fakes.gateway import running
from tests.fakes.router import FakeRouter
from tests.fakes.tokenizer import CONTEXT, EOS, VOCAB

SERVICE = "tercet.v1.Inference"
TEXT = pb.GenerateRequest(text="hi")


@pytest.fixture
async def router():
    return FakeRouter()


@pytest.fixture
async def gateway(router):
    async with running(router) as (gateway, info):
        gateway.grpc_address = info.grpc_address
        yield gateway


@pytest.fixture
async def channel(gateway):
    async with grpc.aio.insecure_channel(gateway.grpc_address) as channel:
        yield channel


@pytest.fixture
async def inference(channel):
    return inference_pb2_grpc.InferenceStub(channel)


async def until(condition):
    while not condition():
        await asyncio.sleep(0.005)


async def test_text_in_tokens_and_text_out(inference, router):
    router.text = "Zürich"
    responses = [r async for r in inference.Generate(TEXT)]
    assert "".join(r.delta.text for r in responses) == "Zürich"
    assert [i for r in responses for i in r.delta.token_ids] == [*"Zürich".encode(), EOS]
    done = responses[-1].done
    assert (done.finish_reason, done.prompt_tokens, done.completion_tokens, done.cached_tokens) == ("stop", 2, 8, 16)
    assert done.timings.transport == "shm"
    assert dict(done.workers) == {"prefill": "prefill-0", "decode": "decode-1"}
    assert len({r.request_id for r in responses}) == 1


async def test_token_ids_chat_and_every_sampling_field(inference, router):
    sampling = pb.Sampling(
        max_tokens=3, temperature=0.5, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.1, presence_penalty=0.2,
        frequency_penalty=0.3, seed=-7, stop_token_ids=[1], ignore_eos=True, logprobs=2,
    )  # fmt: skip
    ids = pb.GenerateRequest(tokens=pb.TokenIds(ids=[5, 6]), sampling=sampling, request_id="mine")
    responses = [r async for r in inference.Generate(ids)]
    request = router.requests[0]
    assert (request.request_id, request.token_ids) == ("mine", (5, 6))
    for name in ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
                 "frequency_penalty", "seed", "ignore_eos", "logprobs"):  # fmt: skip
        assert getattr(request.params, name) == getattr(sampling, name)
    assert request.params.stop_token_ids == (1,)
    assert responses[0].delta.logprobs[0].logprob == -0.5
    chat = pb.GenerateRequest(chat=pb.Chat(messages=[pb.Message(role="user", content="hi")]))
    assert len([r async for r in inference.Generate(chat)]) > 1
    assert bytes(router.requests[1].token_ids) == b"<u>hi<a>"
    assert router.requests[1].params.max_tokens == CONTEXT - len("<u>hi<a>")


@pytest.mark.parametrize(
    ("request_", "status", "says"),
    [
        (pb.GenerateRequest(), "INVALID_ARGUMENT", "invalid_request: prompt must not be empty"),
        (pb.GenerateRequest(text=""), "INVALID_ARGUMENT", "invalid_request: prompt must not be empty"),
        (pb.GenerateRequest(chat=pb.Chat()), "INVALID_ARGUMENT", "invalid_request: prompt must not be empty"),
        (pb.GenerateRequest(text="x" * 500), "INVALID_ARGUMENT", "context_too_long: prompt has 500 tokens"),
        (pb.GenerateRequest(tokens=pb.TokenIds(ids=[VOCAB])), "INVALID_ARGUMENT", "invalid_request: prompt: token id"),
        (pb.GenerateRequest(text="x", model="gpt-9"), "NOT_FOUND", "model_not_found: model 'gpt-9'"),
        (pb.GenerateRequest(text="x", request_id="a b"), "INVALID_ARGUMENT", "invalid_request: request_id must match"),
        (
            pb.GenerateRequest(text="x", sampling=pb.Sampling(temperature=float("nan"))),
            "INVALID_ARGUMENT",
            "invalid_request: temperature must be a number from 0 to 100, got nan",
        ),
        (
            pb.GenerateRequest(text="x", sampling=pb.Sampling(stop=["x"] * 17)),
            "INVALID_ARGUMENT",
            "invalid_request: stop",
        ),
    ],
)
async def test_bad_input(inference, router, request_, status, says):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(aiter(inference.Generate(request_)))
    assert caught.value.code().name == status
    assert caught.value.details().startswith(says)
    assert router.requests == []


async def test_a_message_too_large(inference):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(aiter(inference.Generate(pb.GenerateRequest(text="x" * 10_000_000))))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_failure_in_mid_stream_is_a_status(inference, router):
    router.error, router.error_after = WorkerLost("decode-1 died"), 2
    call = inference.Generate(TEXT)
    assert [(await call.read()).delta.text for _ in range(2)] == ["T", "h"]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert caught.value.details() == "worker_lost: decode-1 died"


async def test_cancelling_aborts_the_request(inference, router):
    router.delay_s = 0.01
    call = inference.Generate(pb.GenerateRequest(text="x", sampling=pb.Sampling(ignore_eos=True)))
    await call.read()
    call.cancel()
    await until(lambda: router.aborted)
    assert router.running == 0


async def test_the_calls_deadline_is_the_requests(inference, router):
    router.gate = asyncio.Event()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(aiter(inference.Generate(TEXT, timeout=0.2)))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: router.running == 0)


async def test_a_request_id_in_flight_is_refused(inference, router):
    router.gate = asyncio.Event()
    first = inference.Generate(pb.GenerateRequest(text="x", request_id="one"))
    await until(lambda: router.running == 1)
    with pytest.raises(grpc.aio.AioRpcError, match="'one' is in flight already"):
        await anext(aiter(inference.Generate(pb.GenerateRequest(text="x", request_id="one"))))
    router.gate.set()
    assert [r async for r in first][-1].done.finish_reason == "stop"


async def test_a_request_id_of_another_client_is_no_hindrance(inference, router):
    router.gate = asyncio.Event()
    ask = pb.GenerateRequest(text="x", request_id="one")
    calls = [inference.Generate(ask, metadata=(("authorization", f"Bearer {key}"),)) for key in ("a", "b")]
    await until(lambda: router.running == 2)
    router.gate.set()
    for call in calls:
        assert [r async for r in call][-1].done.finish_reason == "stop"


@pytest.mark.parametrize("service", ["", SERVICE])
async def test_health_follows_readiness(channel, router, service):
    health = health_pb2_grpc.HealthStub(channel)
    watch = health.Watch(health_pb2.HealthCheckRequest(service=service))

    async def until_it_says(status):
        while (await watch.read()).status != status:
            pass

    await until_it_says(health_pb2.HealthCheckResponse.SERVING)
    router.missing = ["decode"]
    await until_it_says(health_pb2.HealthCheckResponse.NOT_SERVING)
    router.missing = []
    await until_it_says(health_pb2.HealthCheckResponse.SERVING)
    watch.cancel()


async def test_reflection_describes_the_service(channel):
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    questions = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
    ]
    listed, described = [r async for r in stub.ServerReflectionInfo(iter(questions))]
    names = {s.name for s in listed.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names
    assert described.file_descriptor_response.file_descriptor_proto
