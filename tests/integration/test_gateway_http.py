"""What the openai client cannot show: raw bodies, statuses, disconnects, limits, health, metrics."""

import asyncio
import io
import json
import math
import re
import socket
import subprocess
import sys

import aiohttp
import pytest

from tercet.core import Role, WorkerInfo
from tercet.errors import ClusterError, Overloaded, WorkerLost
from tercet.roles.gateway.gateway import Gateway
from tests.fakes.gateway import running, spec
from tests.fakes.router import FakeRouter
from tests.fakes.tokenizer import CONTEXT, MODEL, VOCAB

ASK = {"messages": [{"role": "user", "content": "hello"}]}
JSON = {"Content-Type": "application/json"}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
async def router():
    return FakeRouter()


@pytest.fixture
async def http(router):
    async with running(router) as (_, info), aiohttp.ClientSession(info.http_url, headers=JSON) as session:
        yield session


async def failures(http, code):
    text = await (await http.get("/metrics")).text()
    found = re.search(rf'^tercet_request_failure_total{{code="{code}"}} (\S+)', text, re.MULTILINE)
    return float(found[1]) if found else 0.0


async def until(condition):
    while not condition():
        await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("path", "fields", "status", "says", "param"),
    [
        (COMPLETIONS, {"prompt": ""}, 400, "prompt must not be empty", "prompt"),
        (COMPLETIONS, {"prompt": []}, 400, "prompt must not be empty", "prompt"),
        (COMPLETIONS, {"prompt": "x" * 200}, 400, f"prompt has 200 tokens.* holds {CONTEXT}", "prompt"),
        (COMPLETIONS, {"prompt": "x" * 9000}, 400, f"prompt has 9000 tokens.* holds {CONTEXT}", "prompt"),
        (COMPLETIONS, {"prompt": "x" * 20000}, 400, "prompt has 20000 characters, at most 128 can fit", "prompt"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": CONTEXT}, 400, f"max_tokens {CONTEXT} .*{CONTEXT}", "max_tokens"),
        (COMPLETIONS, {"prompt": [VOCAB]}, 400, f"token id {VOCAB} is outside the vocabulary", "prompt"),
        (COMPLETIONS, {"prompt": [-1]}, 400, "token id -1 is outside the vocabulary", "prompt"),
        (COMPLETIONS, {"prompt": ["x"] * 1025}, 400, "prompt takes at most 1024 items, got 1025", "prompt"),
        (COMPLETIONS, {"prompt": ["x"] * 1000, "n": 3}, 400, "1000 prompts times n 3 is more", "prompt"),
        (CHAT, {"temperature": -1}, 400, "temperature must be .*, got -1", "temperature"),
        (CHAT, {"temperature": math.nan}, 400, "temperature must be .*, got nan", "temperature"),
        (CHAT, {"top_p": math.nan}, 400, "top_p must be .*, got nan", "top_p"),
        (CHAT, {"min_p": -0.1}, 400, "min_p must be", "min_p"),
        (CHAT, {"top_k": -2}, 400, "top_k must be", "top_k"),
        (CHAT, {"presence_penalty": math.inf}, 400, "presence_penalty must be .*, got inf", "presence_penalty"),
        (CHAT, {"temperature": 10**400}, 400, "temperature", "temperature"),
        (CHAT, {"max_tokens": 0}, 400, "max_tokens must be at least 1", "max_tokens"),
        (CHAT, {"seed": 2**64}, 400, "seed must be from -9223372036854775808", "seed"),
        (CHAT, {"n": 17}, 400, "n must be from 1 to 16, got 17", "n"),
        (CHAT, {"n": 0}, 400, "n must be from 1 to 16, got 0", "n"),
        (CHAT, {"stop": "x" * 257}, 400, "stop strings may have 256 characters each", "stop"),
        (CHAT, {"stop": ["x"] * 17}, 400, "stop takes at most 16 items, got 17", "stop"),
        (CHAT, {"stop_token_ids": [VOCAB]}, 400, "stop_token_ids: token id", "stop_token_ids"),
        (CHAT, {"model": "gpt-9"}, 404, "model 'gpt-9' is not served here", "model"),
        (CHAT, {"tools": [{}]}, 400, "tools is not supported", "tools"),
        (CHAT, {"messages": [{"role": "assistant", "content": "x"}]}, 400, "begin with system or user", "messages"),
    ],
)
async def test_bad_input(http, router, path, fields, status, says, param):
    response = await http.post(path, data=json.dumps(({} if path == COMPLETIONS else ASK) | fields))
    error = (await response.json())["error"]
    assert response.status == status
    assert re.search(says, error["message"])
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert router.requests == []  # never a worker's business
    assert await failures(http, error["code"]) == 1


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b'{"messages": [', 400, "not valid JSON"),
        (b'{"messages": "\xff\xfe"}', 400, "not valid UTF-8"),
        (b"x" * 10_000_000, 413, "larger than 4194304 bytes"),
    ],
)
async def test_bodies_that_are_no_requests(http, body, status, says):
    response = await http.post(CHAT, data=io.BytesIO(body))
    assert response.status == status
    assert says in (await response.json())["error"]["message"]


async def test_a_body_of_unannounced_length_is_cut_off_too(http):
    async def chunks():
        for _ in range(160):
            yield b"x" * 65536

    response = await http.post(CHAT, data=chunks())
    assert response.status == 413
    assert (await response.json())["error"]["code"] == "body_too_large"


async def test_unknown_paths_and_methods_answer_in_the_same_shape(http):
    for response, status in ((await http.get("/v2/x"), 404), (await http.get(CHAT), 405)):
        assert response.status == status
        assert (await response.json())["error"]["type"] == "invalid_request_error"


async def test_a_full_gateway_answers_503_and_recovers(router):
    router.gate = asyncio.Event()
    async with (
        running(router, max_inflight_requests=2) as (_, info),
        aiohttp.ClientSession(info.http_url) as http,
    ):
        held = [asyncio.create_task(http.post(CHAT, json=ASK)) for _ in range(2)]
        await until(lambda: router.running == 2)
        refused = await http.post(CHAT, json=ASK)
        assert refused.status == 503
        assert refused.headers["Retry-After"] == "1"
        assert (await refused.json())["error"]["code"] == Overloaded.code()
        router.gate.set()
        assert [(await task).status for task in held] == [200, 200]
        assert (await http.post(CHAT, json=ASK)).status == 200


@pytest.mark.parametrize("fields", [{"stream": True}, {"stream": False}, {"stream": True, "n": 3}])
async def test_a_client_that_goes_away_aborts_its_request(http, router, fields):
    router.gate = asyncio.Event()
    task = asyncio.create_task(http.post(CHAT, json=ASK | fields))
    await until(lambda: router.running == fields.get("n", 1))
    task.cancel()
    await until(lambda: router.running == 0)
    assert len(router.aborted) == fields.get("n", 1)
    assert await failures(http, "cancelled") == 1


async def test_a_client_that_goes_away_in_mid_stream_aborts_its_request(http, router):
    router.delay_s = 0.01
    response = await http.post(CHAT, json=ASK | {"stream": True, "ignore_eos": True})
    await response.content.readline()
    response.close()
    await until(lambda: router.aborted)
    assert router.running == 0


@pytest.mark.parametrize("headers", [{"X-Request-Timeout": "0.1"}, {}])
async def test_a_deadline_ends_in_504(http, router, headers):
    router.gate = asyncio.Event()
    body = ASK if headers else ASK | {"timeout": 0.1}
    response = await http.post(CHAT, json=body, headers=headers)
    assert response.status == 504
    assert (await response.json())["error"]["code"] == "deadline_exceeded"
    assert router.running == 0


async def test_a_client_that_does_not_read_is_ended_at_its_deadline(http, router):
    """A write to it blocks once the socket buffers are full; the deadline must still free the workers."""
    router.text = "x" * 200
    url = http._base_url
    fields = {"prompt": ["x"] * 16, "n": 16, "stream": True, "logprobs": 20, "max_tokens": 120, "timeout": 1}
    body = json.dumps(fields).encode()  # asks for tens of MB
    head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (COMPLETIONS.encode(), len(body))
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await asyncio.to_thread(client.connect, (url.host, url.port))
        client.sendall(head + body)
        while await failures(http, "deadline_exceeded") == 0:
            await asyncio.sleep(0.05)
    assert router.running == 0


async def test_the_stream_of_a_failure_has_no_done(http, router):
    router.error, router.error_after = WorkerLost("gone"), 2
    response = await http.post(CHAT, json=ASK | {"stream": True})
    events = (await response.text()).strip().split("\n\n")
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "worker_lost"
    assert await failures(http, "worker_lost") == 1


async def test_drain_lets_requests_finish_and_refuses_new_ones(router):
    router.gate = asyncio.Event()
    async with running(router) as (gateway, info), aiohttp.ClientSession(info.http_url) as http:
        held = asyncio.create_task(http.post(CHAT, json=ASK))
        await until(lambda: router.running == 1)
        drain = asyncio.create_task(gateway.drain(30))
        await until(lambda: gateway.status()["reason"] == "draining")
        refused = await http.post(CHAT, json=ASK)
        assert refused.status == 503
        assert "draining" in (await refused.json())["error"]["message"]
        router.gate.set()
        await drain
        assert (await held).status == 200


async def test_a_drain_that_takes_too_long_ends_requests_in_a_typed_error(router):
    router.gate = asyncio.Event()
    async with running(router) as (gateway, info), aiohttp.ClientSession(info.http_url) as http:
        held = asyncio.create_task(http.post(CHAT, json=ASK))
        await until(lambda: router.running == 1)
        await gateway.drain(0.05)
        response = await held
        assert response.status == 503
        assert "stopping" in (await response.json())["error"]["message"]
    assert router.closed


async def test_ready_only_after_a_real_request_and_healthy_only_with_every_role(router):
    router.proven = False
    router.missing = ["decode"]
    async with running(router) as (gateway, info), aiohttp.ClientSession(info.http_url) as http:
        health = await http.get("/health")
        assert health.status == 503
        assert "decode" in (await health.json())["reason"]
        assert (await http.get("/ready")).status == 503
        router.error = WorkerLost("not yet")
        router.missing = []
        assert (await http.get("/health")).status == 200
        await until(lambda: "not yet" in str(gateway.status()["reason"]))
        assert (await http.get("/ready")).status == 503
        router.error = None
        await until(lambda: router.proven)
        assert (await http.get("/ready")).status == 200
        assert router.requests[-1].params.max_tokens == 2


async def test_health_says_why_nothing_new_is_taken(router):
    async with running(router) as (gateway, info), aiohttp.ClientSession(info.http_url) as http:
        await gateway.drain(0, "Ray is lost")
        await gateway.drain(0)  # the first reason stands
        for path in ("/health", "/ready"):
            answer = await http.get(path)
            assert (answer.status, (await answer.json())["reason"]) == (503, "Ray is lost")
        assert gateway.status()["reason"] == "Ray is lost"


async def test_metrics(http):
    await (await http.post(CHAT, json=ASK)).read()
    text = await (await http.get("/metrics")).text()
    for series in (
        'tercet_request_success_total{finished_reason="stop"} 1.0',
        "tercet_time_to_first_token_seconds_count 1.0",
        "tercet_e2e_request_latency_seconds_count 1.0",
        "tercet_time_per_output_token_seconds_count 1.0",
        "tercet_prompt_tokens_total 11.0",
        "tercet_generation_tokens_total 32.0",
        "tercet_request_prefill_time_seconds_sum 0.004",
        'tercet_kv_transfer_bytes_total{transport="shm"} 4096.0',
        'tercet_kv_cache_usage_perc{worker="decode-1"} 0.6',
        'tercet_num_requests_running{worker="decode-1"} 0.0',
        "tercet_gateway_inflight_requests 0.0",
    ):
        assert series in text


async def test_metrics_say_which_role_a_live_worker_has(router):
    async with running(router) as (gateway, info):
        workers = [WorkerInfo(name, Role.DECODE, 1, "", "", "") for name in ("decode-1", "gone-2")]
        await gateway.set_workers(workers)
        async with aiohttp.ClientSession(info.http_url) as http:
            text = await (await http.get("/metrics")).text()
    series = [line for line in text.splitlines() if line.startswith("tercet_worker_info")]
    assert series == ['tercet_worker_info{role="decode",worker="decode-1"} 1.0']


@pytest.mark.parametrize("name", ["http", "grpc"])
async def test_a_port_in_use_is_named(router, name):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        wanted = spec()
        listen = wanted.gateway.model_copy(update={name: wanted.gateway.http.model_copy(update={"port": port})})
        gateway = Gateway(wanted.model_copy(update={"gateway": listen}), "token", router, MODEL)
        with pytest.raises(ClusterError, match=rf"port {port} on 127.0.0.1 is in use.*gateway.{name}.port"):
            await gateway.start()
    assert router.closed


def test_the_gateway_imports_neither_torch_nor_ray():
    code = "import sys, tercet.roles.gateway.gateway; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
