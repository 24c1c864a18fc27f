"""One trace for each request, from real processes' parts to a real collector over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys

import aiohttp
import grpc

from tercet.roles.gateway.gateway import Gateway
from tercet.spec import GatewaySpec, ListenSpec, TracingSpec
from tercet.wire.gen import inference_pb2 as pb
from tercet.wire.gen import inference_pb2_grpc
from tests.chaos.test_deaths import Processes
from tests.helpers import TOKEN, LocalCluster, spec_of
from tests.integration.test_images_http import Served, part_of
from tests.otlp import collector
from tests.tiny import tiny_model
from tests.unit.test_models_vision import pictures

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "xyzzyplugh"


@contextlib.asynccontextmanager
async def served(endpoint, ratio=1.0, topology="pd", source=None, kind=LocalCluster, **changes):
    """-> the cluster, its gateway, and the HTTP and gRPC addresses; all spans are sent when it ends."""
    tracing = TracingSpec(otlp_endpoint=endpoint, sample_ratio=ratio)
    anywhere = GatewaySpec(http=ListenSpec(port=0), grpc=ListenSpec(port=0))
    spec = spec_of(topology, source=source or tiny_model(), **{"decoders": 1} | changes)
    made = kind(spec.model_copy(update={"tracing": tracing, "gateway": anywhere}))
    await made.start()
    gateway = Gateway(made.spec, TOKEN)
    info = await gateway.start()
    try:
        await gateway.set_workers(list(made.infos.values()))
        while not gateway.status()["ready"]:
            await asyncio.sleep(0.02)
        yield made, gateway, info
    finally:
        await gateway.stop()
        await made.stop()


async def post(info, headers=None, path="chat/completions", **body):
    asked = {"max_tokens": 5, "temperature": 0, "ignore_eos": True} | body
    told = {"prompt": SECRET} if path == "completions" else {"messages": [{"role": "user", "content": SECRET}]}
    asked = told | asked
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{info.http_url}/v1/{path}", json=asked, headers=headers or {}) as answer,
    ):
        return answer.status, answer.headers["X-Request-Id"], await answer.json()


def only(spans, name):
    [span] = [span for span in spans if span.name == name]
    return span


async def test_one_trace_from_the_client_over_all_stages():
    with collector() as seen:
        async with served(seen.endpoint) as (_, _, info):
            sent = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
            status, request_id, answer = await post(info, sent)
            assert status == 200
        spans = seen.of(TRACE)
    root = only(spans, f"chat {answer['model']}")
    attempt, prefill, decode = only(spans, "attempt 0"), only(spans, "prefill"), only(spans, "decode")
    parents = {span.name: span.parent for span in spans}
    assert root.parent == PARENT
    assert {span.state for span in spans} == {"vendor=1"}
    assert attempt.parent == root.id
    assert prefill.parent == decode.parent == attempt.id
    assert parents["prefill.compute"] == parents["kv.transfer"] == prefill.id
    assert parents["decode.generate"] == decode.id
    assert all(root.start <= span.start <= span.end for span in spans)
    assert all(
        span.end <= root.end for span in spans if span.name in ("prefill.compute", "decode.generate", "attempt 0")
    )
    assert (root.service, prefill.service, prefill.instance) == ("tercet-gateway", "tercet-worker", "prefill-0")
    assert decode.instance == "decode-0"
    assert root.told["tercet.request_id"] == request_id
    assert root.told["gen_ai.operation.name"] == "chat"
    assert root.told["gen_ai.usage.output_tokens"] == answer["usage"]["completion_tokens"] == 5
    assert root.told["gen_ai.usage.input_tokens"] == answer["usage"]["prompt_tokens"]
    assert root.told["gen_ai.response.finish_reasons"] == ["length"]
    assert root.told["http.response.status_code"] == 200
    assert prefill.told["tercet.request_id"] in request_id
    assert (attempt.told["tercet.worker.prefill"], attempt.told["tercet.worker.decode"]) == ("prefill-0", "decode-0")
    transfer = only(spans, "kv.transfer")
    assert transfer.told["tercet.kv.bytes"] == answer["timings"]["kv_bytes"] > 0
    assert transfer.told["tercet.kv.transport"] == answer["timings"]["transport"]
    assert only(spans, "prefill.compute").told["tercet.chunks"] == 1
    assert set(decode.events) == {"first_token", "kv_landed"}
    assert not any(span.failed for span in spans)
    assert SECRET not in repr(seen.spans)


async def by_grpc(info, headers=(), **body):
    request = pb.GenerateRequest(text=SECRET, sampling=pb.Sampling(max_tokens=4, ignore_eos=True), **body)
    async with grpc.aio.insecure_channel(info.grpc_address) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Generate(request, metadata=tuple(headers))
        return [answer async for answer in call]


async def test_who_decides_whether_there_is_a_trace_and_which():
    with collector() as seen:
        async with served(seen.endpoint, ratio=1.0) as (_, _, info):
            await by_grpc(info, [("traceparent", f"00-{TRACE}-{PARENT}-01")], request_id="of-grpc")
            for header in ("", "00-zz-1-01", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01", "x" * 600):
                await post(info, {"traceparent": header}, "completions")
            await post(info, {"traceparent": f"00-{'1' * 32}-{PARENT}-00"})  # its caller wants no trace
        first, spans = seen.of(TRACE), seen.spans
        async with served(seen.endpoint, ratio=0.0) as (_, _, info):
            await post(info)
            await post(info, {"traceparent": f"00-{'2' * 32}-{PARENT}-01"})
        later = seen.spans[len(spans) :]
    assert {span.name for span in first} >= {"attempt 0", "prefill", "kv.transfer", "decode"}
    [root] = [span for span in first if span.parent == PARENT]
    assert (root.told["tercet.request_id"], root.told["rpc.response.status_code"]) == ("of-grpc", "OK")
    assert root.name.startswith("text_completion ")
    roots = [span for span in spans if not span.parent]
    assert len(roots) == len({span.trace for span in roots}) == 5
    assert not [span for span in spans if span.trace == "1" * 32]
    assert {span.trace for span in later} == {"2" * 32}


async def test_spans_of_a_stream_end_when_its_client_goes():
    with collector() as seen:
        async with served(seen.endpoint) as (made, _, info):
            body = {"prompt": SECRET, "max_tokens": 1500, "ignore_eos": True, "stream": True}
            async with (
                aiohttp.ClientSession() as http,
                http.post(f"{info.http_url}/v1/completions", json=body) as answer,
            ):
                await answer.content.readline()
            await made.settled(20)
        spans = seen.spans
    root = next(span for span in spans if not span.parent)
    assert {span.name for span in spans} >= {"attempt 0", "prefill", "decode", "decode.generate"}
    assert root.told["error.type"] == only(spans, "attempt 0").told["error.type"] == "cancelled"
    assert only(spans, "decode").told["error.type"] == "cancelled"
    assert not any(span.failed for span in spans)  # what a client does is no error here


async def test_a_failure_is_told_and_a_client_s_own_fault_is_none():
    with collector() as seen:
        async with served(seen.endpoint, limits__worker_wait_s=0.2) as (_, gateway, info):
            status, *_ = await post(info, temperature=-1)
            assert status == 400
            await gateway.set_workers([])
            status, *_ = await post(info)
            assert status == 503
        wrong, failed = sorted(seen.spans, key=lambda span: span.start)
    assert (wrong.told["error.type"], wrong.told["http.response.status_code"], wrong.failed) == (
        "invalid_request",
        400,
        False,
    )
    assert (failed.told["error.type"], failed.told["http.response.status_code"], failed.failed) == (
        "no_workers",
        503,
        True,
    )


async def test_a_collector_that_is_down_costs_spans_and_nothing_else():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    async with served(f"http://127.0.0.1:{port}") as (_, gateway, info):
        assert (await post(info))[0] == 200
        async with asyncio.timeout(30):
            while not gateway._spans.dropped:
                await asyncio.sleep(0.05)
        async with aiohttp.ClientSession() as http, http.get(f"{info.http_url}/metrics") as answer:
            assert f"tercet_gateway_spans_dropped_total {gateway._spans.dropped}.0" in await answer.text()
        with collector(port) as seen:
            assert (await post(info, {"traceparent": f"00-{TRACE}-{PARENT}-01"}))[0] == 200
            await asyncio.to_thread(seen.wait, {"attempt 0"}, TRACE, 60.0)
        closing = asyncio.create_task(gateway.stop())  # it does not wait for a collector that has gone again
        async with asyncio.timeout(15):
            await closing


async def test_images_have_spans_where_they_are_encoded(tmp_path):
    source, sent = str(Served("qwen", tmp_path).directory), {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    with collector() as seen:
        async with served(seen.endpoint, topology="epd", source=source, images={"blocks": 128}) as (_, _, info):
            content = [{"type": "text", "text": "look"}, *(part_of(picture) for picture in pictures(2))]
            status, *_ = await post(info, sent, messages=[{"role": "user", "content": content}])
            assert status == 200
        spans = seen.of(TRACE)
    encode, attempt = only(spans, "encode"), only(spans, "attempt 0")
    assert encode.parent == attempt.id
    assert attempt.told["tercet.worker.encode"] == ["encode-0"]
    encoded = [span for span in spans if span.name == "encode.image"]
    moved = [span for span in spans if span.name == "embedding.transfer"]
    assert len(encoded) == len(moved) == 2
    assert {span.parent for span in (*encoded, *moved)} == {encode.id}
    assert all(span.told["tercet.tokens"] > 0 for span in encoded)
    assert all(span.told["tercet.embedding.bytes"] > 0 for span in moved)


async def test_one_worker_that_does_all_has_its_parts():
    with collector() as seen:
        async with served(seen.endpoint, topology="aggregated") as (_, _, info):
            assert (await post(info, path="completions"))[0] == 200
        spans = seen.spans
    whole, compute, decode = (only(spans, name) for name in ("aggregated", "prefill.compute", "decode.generate"))
    assert compute.parent == decode.parent == whole.id
    assert whole.start <= compute.start <= compute.end <= decode.end


async def test_a_killed_worker_leaves_its_attempt_and_the_next_goes_on():
    """Workers are processes, which send their own spans; what the killed one did is told by the gateway alone."""
    body = {"prompt": SECRET, "max_tokens": 300, "temperature": 0, "ignore_eos": True, "stream": True}
    with collector() as seen:
        async with served(seen.endpoint, kind=Processes, decoders=2) as (made, gateway, info):
            url = f"{info.http_url}/v1/completions"
            async with aiohttp.ClientSession() as http, http.post(url, json=body) as answer:
                await answer.content.readline()
                running = next(iter(gateway._router._decisions._running.values()))
                victim = running.attempt.plan.decode.info.worker_id
                made.signal(victim, signal.SIGKILL)
                assert (await answer.text()).rstrip().endswith("[DONE]")
        spans = seen.spans
    first, second = only(spans, "attempt 0"), only(spans, "attempt 1")
    assert (first.failed, first.told["error.type"], first.told["tercet.worker.decode"]) == (True, "worker_lost", victim)
    assert (second.failed, second.told["tercet.worker.decode"] != victim) == (False, True)
    root = next(span for span in spans if not span.parent)
    assert first.parent == second.parent == root.id
    assert first.end <= second.start
    assert not root.failed
    assert [span.instance for span in spans if span.name == "decode"] == [second.told["tercet.worker.decode"]]
    assert root.told["gen_ai.usage.output_tokens"] == 300


def test_nothing_is_imported_while_it_is_off():
    """Nor is any object of the SDK made: its modules are not there."""
    lines = (
        "import sys",
        "import tercet.roles.gateway.gateway, tercet.roles.worker, tercet.roles.rank, tercet.cluster.actors",
        "from tests.helpers import spec_of",
        "from tercet.roles.worker import Worker",
        "from tercet.roles.gateway.gateway import Gateway",
        "from tests.fakes.router import FakeRouter",
        "from tests.fakes.tokenizer import MODEL",
        "spec = spec_of()",
        "Worker('decode-0', 'decode', 1, spec, '127.0.0.1', 'token')",
        "Gateway(spec, 'token', FakeRouter(), MODEL)",
        "assert not [m for m in sys.modules if m.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))]",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, timeout=100)
