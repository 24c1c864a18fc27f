"""The lines that real gateways and workers write about requests: what is in them, and that no prompt is."""

from __future__ import annotations

import asyncio
import json
import logging
import re

import aiohttp
import grpc
import pytest

from tercet import logs
from tercet.roles.gateway.gateway import Gateway
from tercet.roles.gateway.tokenising import Tokenising
from tercet.spec import GatewaySpec, ListenSpec, LoggingSpec
from tercet.wire.gen import inference_pb2 as pb
from tercet.wire.gen import inference_pb2_grpc
from tests.chaos.test_deaths import Processes
from tests.helpers import TOKEN, LocalCluster, spec_of
from tests.tiny import tiny_model

SECRET = "xyzzyplugh"
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(autouse=True)
def _log_as_before():
    root, own, raises = logging.getLogger(), logging.getLogger("tercet"), logging.raiseExceptions
    before, levels = list(root.handlers), (root.level, own.level)
    yield
    root.handlers[:] = before
    root.setLevel(levels[0])
    own.setLevel(levels[1])
    logging.raiseExceptions = raises


class Served:
    def __init__(self, gateway, info, cluster):
        self.gateway, self.info, self.cluster = gateway, info, cluster

    async def post(self, path, body, headers=None):
        """-> status, request id."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | (headers or {})
        url = f"{self.info.http_url}{path}"
        async with aiohttp.ClientSession() as http, http.post(url, data=data, headers=headers) as answer:
            await answer.read()
            return answer.status, answer.headers["X-Request-Id"]

    async def get(self, path):
        """-> status."""
        async with aiohttp.ClientSession(self.info.http_url) as http, http.get(path) as answer:
            return answer.status

    async def by_grpc(self, **asked):
        async with grpc.aio.insecure_channel(self.info.grpc_address) as channel:
            call = inference_pb2_grpc.InferenceStub(channel).Generate(pb.GenerateRequest(**asked))
            return [answer async for answer in call]


async def during(work, spec, kind=LocalCluster):
    """Do `work(served)` on a cluster that logs as this process's gateway and its workers do."""
    anywhere = GatewaySpec(http=ListenSpec(port=0), grpc=ListenSpec(port=0))
    whole = spec_of("pd", decoders=1, source=tiny_model()).model_copy(update={"logging": spec, "gateway": anywhere})
    logs.configure(spec, hears_clients=True, role="gateway")
    made = kind(whole)
    await made.start()
    gateway = Gateway(whole, TOKEN)
    info = await gateway.start()
    try:
        await gateway.set_workers(list(made.infos.values()))
        while not gateway.status()["ready"]:
            await asyncio.sleep(0.02)
        await work(Served(gateway, info, made))
    finally:
        await gateway.stop()
        await made.stop()


def chat(content=SECRET, **options):
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 4} | options


WRITTEN = [  # path, body, headers
    (CHAT, chat(), {}),
    (CHAT, chat(stream=True), {}),
    (COMPLETION, {"prompt": SECRET, "max_tokens": 4, "echo": True, "stop": SECRET, "user": SECRET}, {}),
    (COMPLETION, {"prompt": [SECRET, SECRET], "max_tokens": 2}, {}),
    (CHAT, chat(SECRET * 2000), {}),  # longer than the context
    (CHAT, chat(temperature=SECRET), {}),
    (CHAT, chat(model=SECRET), {}),
    (CHAT, chat(**{SECRET: SECRET}), {}),  # an unknown parameter
    (CHAT, {"messages": SECRET}, {}),
    (CHAT, {"messages": [{"role": SECRET, "content": [{"type": SECRET, "text": SECRET}]}]}, {}),
    (CHAT, f'{{"messages": "{SECRET}'.encode(), {}),
    (CHAT, SECRET.encode(), {"Content-Type": SECRET}),
    (CHAT, SECRET.encode(), {"Content-Encoding": SECRET}),
    (CHAT, SECRET.encode(), {"Content-Encoding": "gzip"}),
    (f"{CHAT}?q={SECRET}", chat(), {"Authorization": SECRET, "X-Request-Timeout": SECRET, "traceparent": SECRET}),
    (COMPLETION, {"prompt": [10**9]}, {}),
    (f"/{SECRET}", {}, {}),
    (f"/v1/models/{SECRET}", {}, {}),  # which takes no POST
]
PATHS = [f"{path}/{SECRET}" for path in ("", "/v1/models", "/dashboard/requests", "/dashboard/static", "/health")]


@pytest.mark.parametrize(("form", "kind"), [("json", Processes), ("text", LocalCluster)])
async def test_no_line_has_what_a_client_wrote(form, kind, capfd, monkeypatch):
    """However it is written, and whatever goes wrong; at level debug, in any process."""
    told = {}

    async def work(served):
        for path, body, headers in WRITTEN:
            status, request_id = await served.post(path, body, headers)
            told[request_id] = status
        for path in PATHS:
            await served.get(path)
        await served.by_grpc(text=SECRET, sampling=pb.Sampling(max_tokens=2), request_id="over-grpc")
        for asked in ({"text": SECRET, "model": SECRET}, {"chat": pb.Chat(messages=[pb.Message(role=SECRET)])}):
            with pytest.raises(grpc.aio.AioRpcError):
                await served.by_grpc(**asked, request_id=f"{SECRET}!")  # which is no id
        await stray(served.info)
        with monkeypatch.context() as patch:
            patch.setattr(Tokenising, "encoded", breaks)
            told[(await served.post(CHAT, chat()))[1]] = 500
        await served.gateway.set_workers([])
        monkeypatch.setattr(served.gateway._router._decisions, "_patience", lambda request, now: now)
        status, request_id = await served.post(CHAT, chat())
        told[request_id] = status

    await during(work, LoggingSpec(level="debug", format=form), kind)
    lines = capfd.readouterr().err
    assert {200, 400, 404, 415, 500, 503} <= {*told.values()}
    assert "RuntimeError" in lines  # it is told, without its words
    assert "in breaks" in lines
    assert SECRET not in lines
    own = {request_id: len(re.findall(rf"tercet\.access.*{request_id}", lines)) for request_id in (*told, "over-grpc")}
    assert set(own.values()) == {1}, own


async def breaks(self, prompts, client, add_special=True):
    try:
        raise KeyError(prompts[0])
    except KeyError as error:
        raise RuntimeError(f"{prompts} cannot be read") from error


async def stray(info):
    """Bytes that are no HTTP, and a message that is no protobuf."""
    host, port = info.http_url.removeprefix("http://").rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"{SECRET} {SECRET}\r\n\r\n".encode())
    await reader.read()
    writer.close()
    async with grpc.aio.insecure_channel(info.grpc_address) as channel:
        call = channel.unary_stream("/tercet.v1.Inference/Generate", request_serializer=bytes)
        with pytest.raises(grpc.aio.AioRpcError):
            await call(b"\xff" + SECRET.encode()).read()


async def test_a_line_of_json_says_what_was_done_and_by_whom(capfd):
    ids = []

    async def work(served):
        ids.append((await served.post(COMPLETION, {"prompt": "abc", "max_tokens": 4, "ignore_eos": True}))[1])
        ids.append((await served.post(CHAT, {"messages": 3}))[1])

    await during(work, LoggingSpec(format="json"))
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    done, wrong = [line for line in lines if line["logger"] == logs.ACCESS]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", done["ts"])
    assert (done["level"], done["role"], done["message"]) == ("info", "gateway", f"POST {COMPLETION}")
    assert (done["request_id"], done["status"], done["client"]) == (ids[0], 200, "address-127.0.0.1")
    assert (done["prompt_tokens"], done["completion_tokens"], done["attempts"]) == (3, 4, 1)
    assert done["workers"] == "prefill:prefill-0,decode:decode-0"
    assert 0 < done["ttft_s"] <= done["duration_s"]
    assert (wrong["request_id"], wrong["status"], wrong["error"]) == (ids[1], 400, "invalid_request")
    assert not any("prompts" in line or "trace_id" in line for line in lines)


async def test_a_line_names_the_route_and_not_the_path(capfd):
    async def work(served):
        for path in ("/v1/models", *PATHS):
            await served.get(path)
        await served.post("/v1/models", {})

    await during(work, LoggingSpec(format="json"))
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [(line["message"], line["status"]) for line in lines if line["logger"] == logs.ACCESS] == [
        ("GET /v1/models", 200),
        ("GET unknown", 404),
        ("GET /v1/models/{id}", 404),
        ("GET /dashboard/requests/{id}", 404),
        ("GET /dashboard/static/{name}", 404),
        ("GET unknown", 404),
        ("POST /v1/models", 405),
    ]


async def test_prompts_are_in_the_line_if_asked_for_up_to_a_length(capfd):
    async def work(served):
        await served.post(CHAT, chat(f"{SECRET} {'y' * 1900}"))
        await served.post(COMPLETION, {"prompt": [1, 2, 3], "max_tokens": 2})

    await during(work, LoggingSpec(format="json", prompts=True))
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    texts, ids = [line["prompts"] for line in lines if line["logger"] == logs.ACCESS]
    assert texts == [f"{SECRET} {'y' * 1900}"]
    assert ids == ["(1, 2, 3)"]
