"""Who is let in at the gateway's two ports: every route, every method of gRPC, limits, TLS, renewed certificates."""

import asyncio
import base64
import contextlib
import socket
import ssl
import struct
import time
from pathlib import Path

import aiohttp
import grpc
import openai
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from yarl import URL

from tercet.client import Client
from tercet.cluster.ports import ask_ports
from tercet.errors import InvalidRequest, NoWorkers, RateLimited, Unauthenticated
from tercet.roles.gateway.http_server import OPEN
from tercet.roles.gateway.keys import digest
from tercet.watched import LOOK_EVERY_S
from tercet.wire.gen import inference_pb2 as pb
from tercet.wire.gen import inference_pb2_grpc
from tests.certificates import Authority
from tests.fakes.gateway import running
from tests.fakes.router import FakeRouter

KEY = "tercet-key-of-a"
BEARER = {"Authorization": f"Bearer {KEY}"}
BASIC = {"Authorization": "Basic " + base64.b64encode(f"me:{KEY}".encode()).decode()}
ASK = {"messages": [{"role": "user", "content": "hello"}]}
CHAT = "/v1/chat/completions"


def keys(folder: Path, **limits: int) -> str:
    path = folder / "keys.yaml"
    other = {"name": "b", "sha256": digest(b"of-b")}
    path.write_text(yaml.safe_dump({"keys": [{"name": "a", "sha256": digest(KEY.encode()), **limits}, other]}))
    return str(path)


@pytest.fixture
async def router():
    return FakeRouter()


@pytest.fixture
async def guarded(router, tmp_path):
    async with running(router, doors={"api_keys": keys(tmp_path), "cors_origins": ["https://a.page"]}) as pair:
        yield pair


@pytest.fixture
async def http(guarded):
    async with aiohttp.ClientSession(guarded[1].http_url) as session:
        yield session


def routes(gateway):
    """Every route that there is, read off the application, and some that there are not."""
    app = gateway._http.app
    found = {(route.method, route.resource.canonical) for route in app.router.routes() if route.resource is not None}
    filled = {(method, path.replace("{id}", "x").replace("{path}", "x")) for method, path in found}
    assert ("POST", CHAT) in filled
    paths = {path for _, path in filled} | {"/", "/none", "/healthz", "/health/", "/ready/x", "//health", "/HEALTH"}
    return sorted((method, path) for path in paths for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE"))


async def test_every_route_and_method_takes_a_key_but_for_health_and_readiness(guarded, http, router):
    for method, path in routes(guarded[0]):
        where = URL(guarded[1].http_url + path, encoded=True)
        async with http.request(method, where, json=ASK) as answer:
            if path in OPEN:
                assert answer.status in (200, 204, 405, 503), (method, path)
                continue
            assert answer.status == 401, (method, path)
            assert answer.headers["WWW-Authenticate"].startswith(("Bearer", "Basic"))
            if method != "HEAD":
                assert (await answer.json())["error"]["code"] == "unauthenticated"
    assert not router.requests
    async with http.get("/v1/models", headers=BEARER) as answer:
        assert answer.status == 200


@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/metrics", "/health%2f", "/ready?x=/health"])
@pytest.mark.parametrize("given", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, BASIC])
async def test_a_wrong_key_is_no_key(http, path, given):
    expected = 200 if path.startswith("/ready") else 401
    async with http.get(path, headers=given) as answer:
        assert answer.status in {expected, 503 if expected == 200 else 401}


async def test_a_password_opens_the_page_alone_and_nothing_that_changes_anything(http):
    for method in ("GET", "HEAD"):
        async with http.request(method, "/dashboard", headers=BASIC) as answer:
            assert answer.status == 200
    for method, path in (("POST", "/dashboard"), ("GET", "/dashboardx"), ("GET", "/v1/models"), ("POST", CHAT)):
        async with http.request(method, path, headers=BASIC, json=ASK) as answer:
            assert answer.status == 401, (method, path)
    async with http.get("/dashboard") as answer:
        assert answer.headers["WWW-Authenticate"].startswith("Basic realm=")


async def test_no_answer_tells_the_versions_of_the_software(guarded, http):
    streamed = {"json": ASK | {"stream": True}, "headers": BEARER}
    preflight = {"Origin": "https://a.page", "Access-Control-Request-Method": "POST"}
    for method, path, given in (
        ("GET", "/health", {}),
        ("GET", "/v1/models", {"headers": BEARER}),
        ("GET", "/v1/models", {}),
        ("GET", "/none", {"headers": BEARER}),
        ("DELETE", "/health", {}),
        ("POST", CHAT, {"json": {}, "headers": BEARER}),
        ("POST", CHAT, streamed),
        ("OPTIONS", CHAT, {"headers": preflight}),
    ):
        async with http.request(method, path, **given) as answer:
            assert "Server" not in answer.headers, (method, path)
    host, port = guarded[1].http_url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"no HTTP\r\n\r\n")
    answer = await reader.read()
    writer.close()
    assert b" 400 Bad Request" in answer
    assert b"server:" not in answer.lower()


async def test_a_browser_may_ask_before_it_has_sent_the_key(http):
    asked = {"Origin": "https://a.page", "Access-Control-Request-Method": "POST"}
    async with http.options(CHAT, headers=asked | {"Access-Control-Request-Headers": "authorization"}) as answer:
        assert answer.status == 204
        assert answer.headers["Access-Control-Allow-Headers"] == "authorization"
    async with http.post(CHAT, json=ASK, headers={"Origin": "https://a.page"}) as answer:
        assert answer.status == 401
        assert answer.headers["Access-Control-Allow-Origin"] == "https://a.page"


async def test_no_body_is_read_of_who_has_no_key(guarded):
    """Nor is it asked for, where the client waits for that."""
    host, port = guarded[1].http_url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 4000000\r\n"
    writer.write(head.encode() + b"Expect: 100-continue\r\n\r\n")
    assert b"401" in await reader.readline()
    writer.close()


async def call(channel, method, key=None, message=b""):
    metadata = (("authorization", f"Bearer {key}"),) if key else ()
    stub = channel.unary_unary(method)
    try:
        await stub(message, metadata=metadata, timeout=5)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_every_grpc_method_takes_a_key(guarded, router):
    gateway, info = guarded
    methods = [name.decode() for name in gateway._grpc.methods]
    assert len(methods) >= 5
    async with grpc.aio.insecure_channel(info.grpc_address) as channel:
        for method in [*methods, "/tercet.v1.Inference/None", "/x/y"]:
            for key in (None, "wrong", "of-a"):
                assert await call(channel, method, key) is grpc.StatusCode.UNAUTHENTICATED, (method, key)
        assert await call(channel, "/grpc.health.v1.Health/Check", KEY) is grpc.StatusCode.OK
        assert await call(channel, "/x/y", KEY) is grpc.StatusCode.UNIMPLEMENTED
        assert not router.requests
        metadata = (("authorization", f"Bearer {KEY}"),)
        stub = inference_pb2_grpc.InferenceStub(channel)
        assert [r async for r in stub.Generate(pb.GenerateRequest(text="hi"), metadata=metadata)]
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), metadata=metadata)
        assert (await anext(aiter(watch))).status
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        listed = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(asked, metadata=metadata)
        assert len([r async for r in listed]) == 1
    assert router.requests[-1].client == "name-a"


async def test_clients_that_people_have(guarded):
    _, info = guarded
    async with openai.AsyncOpenAI(base_url=f"{info.http_url}/v1", api_key=KEY) as client:
        answer = await client.chat.completions.create(model="", messages=ASK["messages"], max_tokens=8)
        assert answer.choices[0].message.content
    async with openai.AsyncOpenAI(base_url=f"{info.http_url}/v1", api_key="wrong") as client:
        with pytest.raises(openai.AuthenticationError, match="not known here"):
            await client.models.list()
    ours = Client(info.http_url, api_key=KEY)
    assert await asyncio.to_thread(lambda: ours.chat("hello", max_tokens=8).text)
    with pytest.raises(Unauthenticated):
        await asyncio.to_thread(Client(info.http_url, api_key="wrong").models)
    with pytest.raises(InvalidRequest, match="no header can carry"):
        Client(info.http_url, api_key="a\nb")


async def test_the_environment_gives_the_key(guarded, monkeypatch):
    monkeypatch.setenv("TERCET_API_KEY", KEY)
    assert await asyncio.to_thread(Client(guarded[1].http_url).models)


async def test_health_is_asked_without_a_key(guarded):
    await ask_ports(guarded[1], 5.0)


async def test_a_limit_is_told_by_429_and_when_to_come_back(router, tmp_path):
    doors = {"api_keys": keys(tmp_path, requests_per_minute=2)}
    async with running(router, doors=doors) as (_, info), aiohttp.ClientSession(info.http_url) as http:
        for status in (200, 200, 429):
            async with http.post(CHAT, json=ASK, headers=BEARER) as answer:
                assert answer.status == status
                body = await answer.json()
        assert 25 <= int(answer.headers["Retry-After"]) <= 30
        assert body["error"]["code"] == "rate_limited"
        for free in ("/v1/models", "/metrics"):
            async with http.get(free, headers=BEARER) as answer:
                assert answer.status == 200
        async with http.post(CHAT, json=ASK, headers={"Authorization": "Bearer of-b"}) as answer:
            assert answer.status == 200  # another one's limit is its own
        async with grpc.aio.insecure_channel(info.grpc_address) as channel:  # one limit for both ports
            metadata = (("authorization", f"Bearer {KEY}"),)
            stub = inference_pb2_grpc.InferenceStub(channel)
            answers = stub.Generate(pb.GenerateRequest(text="hi"), metadata=metadata)
            with pytest.raises(grpc.aio.AioRpcError, match="rate_limited") as refused:
                await anext(aiter(answers))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(RateLimited):
            await asyncio.to_thread(Client(info.http_url, api_key=KEY).chat, "hi")


async def test_tokens_are_counted_as_the_answer_says(router, tmp_path):
    doors = {"api_keys": keys(tmp_path, tokens_per_minute=100_000)}
    async with running(router, doors=doors) as (gateway, info), aiohttp.ClientSession(info.http_url) as http:
        used = 0
        for body in (ASK, ASK | {"n": 3}, ASK | {"stream": True, "stream_options": {"include_usage": True}}):
            async with http.post(CHAT, json=body, headers=BEARER) as answer:
                text = await answer.text()
                usage = yaml.safe_load(text if "n" in body or body is ASK else text.split("data: ")[-2])["usage"]
                used += usage["total_tokens"]
        bucket = gateway._frontend._quotas._use("a").tokens
        assert used > 0
        assert bucket.level(100_000, time.monotonic()) == pytest.approx(100_000 - used, abs=100_000 / 60 * 5)


async def test_requests_at_once(router, tmp_path):
    router.gate = asyncio.Event()
    doors = {"api_keys": keys(tmp_path, concurrent=1)}
    async with running(router, doors=doors) as (_, info), aiohttp.ClientSession(info.http_url, headers=BEARER) as http:
        first = asyncio.create_task(http.post(CHAT, json=ASK))
        while not router.requests:
            await asyncio.sleep(0.005)
        async with http.post(CHAT, json=ASK) as answer:
            assert answer.status == 429
        first.cancel()  # a client that has gone gives its place back
        await asyncio.gather(first, return_exceptions=True)
        router.gate.set()
        while True:
            async with http.post(CHAT, json=ASK) as answer:
                if answer.status == 200:
                    break
            await asyncio.sleep(0.02)


# ---- TLS


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "tls")


@pytest.fixture
async def behind_tls(router, authority):
    async with running(router, doors={"tls": authority.gateway()}) as pair:
        yield pair


def trusting(authority):
    return ssl.create_default_context(cafile=authority.path)


async def test_both_ports_speak_tls_and_nothing_else(behind_tls, authority):
    _, info = behind_tls
    assert info.http_url.startswith("https://")
    async with aiohttp.ClientSession(info.http_url) as http:
        async with http.post(CHAT, json=ASK | {"stream": True}, ssl=trusting(authority)) as answer:
            assert "[DONE]" in await answer.text()
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await http.get("/health")
    client = Client(info.http_url, ca=authority.path)
    assert await asyncio.to_thread(lambda: client.chat("hello", max_tokens=8).text)
    with pytest.raises(NoWorkers, match=r"certificate verify failed.*name its authority by --ca FILE"):
        await asyncio.to_thread(Client(info.http_url).models)
    with pytest.raises(NoWorkers, match="may speak TLS: try https://"):
        await asyncio.to_thread(Client(info.http_url.replace("https", "http")).models)
    credentials = grpc.ssl_channel_credentials(authority.path.read_bytes())
    async with grpc.aio.secure_channel(info.grpc_address, credentials) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        assert [r async for r in stub.Generate(pb.GenerateRequest(text="hi"))]
    async with grpc.aio.insecure_channel(info.grpc_address) as channel:
        assert await call(channel, "/grpc.health.v1.Health/Check") is grpc.StatusCode.UNAVAILABLE
    async with aiohttp.ClientSession(info.http_url.replace("https", "http")) as http:
        with pytest.raises(aiohttp.ClientError):
            await http.get("/health")
    await ask_ports(info, 5.0)


def certificate_of(url):
    host, port = url.removeprefix("https://").split(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection((host, int(port)), 5) as bare, context.wrap_socket(bare) as spoken:
        return spoken.getpeercert(binary_form=True)


async def test_a_new_certificate_is_shown_without_a_restart_and_a_broken_one_is_not(behind_tls, authority, caplog):
    _, info = behind_tls
    before = await asyncio.to_thread(certificate_of, info.http_url)
    async with aiohttp.ClientSession(info.http_url) as http:
        async with http.get("/v1/models", ssl=trusting(authority)) as answer:
            assert answer.status == 200
        spec = authority.gateway()
        while (after := await asyncio.to_thread(certificate_of, info.http_url)) == before:
            await asyncio.sleep(0.1)
        async with http.get("/v1/models", ssl=trusting(authority)) as answer:  # what stood goes on
            assert answer.status == 200
    await asyncio.to_thread(Path(spec.key).write_text, "no key")
    while "are no certificate and its key" not in caplog.text:
        assert await asyncio.to_thread(certificate_of, info.http_url) == after
        await asyncio.sleep(LOOK_EVERY_S / 5)
    assert await asyncio.to_thread(certificate_of, info.http_url) == after


async def test_old_versions_of_tls_are_refused(behind_tls):
    host, port = behind_tls[1].http_url.removeprefix("https://").split(":")

    def old():
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            context.maximum_version = ssl.TLSVersion.TLSv1_1
        with socket.create_connection((host, int(port)), 5) as bare:
            context.wrap_socket(bare)

    with pytest.raises(ssl.SSLError):
        await asyncio.to_thread(old)


async def test_who_begins_tls_and_does_not_go_on_counts_and_is_closed_in_time(router, authority):
    limits = {"head_timeout_s": 0.5, "max_connections": 4}
    async with running(router, doors={"tls": authority.gateway()}, **limits) as (gateway, info):
        host, port = info.http_url.removeprefix("https://").split(":")
        started = time.monotonic()
        strangers = [await asyncio.open_connection(host, int(port)) for _ in range(40)]
        for _, writer in strangers[::2]:
            writer.write(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a ClientHello
        async with aiohttp.ClientSession(info.http_url) as http, http.get("/health", ssl=trusting(authority)) as answer:
            assert answer.status in (200, 503)
        for reader, writer in strangers:
            assert await reader.read() == b""
            writer.close()
        assert time.monotonic() - started < 20
        assert gateway._connections.closed["evicted"] + gateway._connections.closed["slow_head"] >= 20


async def test_plain_bytes_and_noise_end_the_connection_alone(behind_tls, authority):
    host, port = behind_tls[1].grpc_address.split(":")
    for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\0" * 1000, b"\x16\x03\x01\xff\xff" + b"x" * 70000):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(noise)
        with contextlib.suppress(ConnectionError):
            await asyncio.wait_for(reader.read(), 15)
        writer.close()
    credentials = grpc.ssl_channel_credentials(authority.path.read_bytes())
    async with grpc.aio.secure_channel(behind_tls[1].grpc_address, credentials) as channel:
        assert await call(channel, "/grpc.health.v1.Health/Check") is grpc.StatusCode.OK


RESET = struct.pack("ii", 1, 0)  # of SO_LINGER: the end is a RST


@pytest.mark.parametrize("door", ["http", "grpc"])
async def test_a_reset_at_any_moment_of_the_start_ends_the_connection_alone(behind_tls, authority, door, caplog):
    gateway, info = behind_tls
    host, port = {"http": info.http_url.removeprefix("https://"), "grpc": info.grpc_address}[door].split(":")
    hello = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        trusting(authority).wrap_bio(ssl.MemoryBIO(), hello, server_hostname=host).do_handshake()
    begun = hello.read()
    for sent in (0, 1, 5, len(begun) - 1, len(begun)):
        for pause_s in (0, 0, 0, 0.02):
            stranger = socket.create_connection((host, int(port)))
            stranger.sendall(begun[:sent])
            await asyncio.sleep(pause_s)
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            stranger.close()
    async with asyncio.timeout(20):
        while len(gateway._connections):
            await asyncio.sleep(0.02)
    async with aiohttp.ClientSession(info.http_url) as http, http.get("/health", ssl=trusting(authority)) as answer:
        assert answer.status in (200, 503)
    assert not [record for record in caplog.records if record.levelname in {"ERROR", "WARNING"}]


def tls_client(address, receive=None):
    """A connection over TLS that is in nobody's hands but ours."""
    host, port = address.removeprefix("https://").split(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    bare = socket.socket()
    if receive is not None:
        bare.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    bare.settimeout(20)
    bare.connect((host, int(port)))
    return context.wrap_socket(bare)


async def test_an_answer_comes_whole_over_tls_to_a_slow_reader_whose_connection_ends_behind_it(router, authority):
    router.script = lambda request: b"x" * 200_000
    doors = {"tls": authority.gateway()}
    async with running(router, doors=doors, max_chars_per_token=10**6) as (_, info):

        def slowly():
            body = b'{"prompt": "x", "max_tokens": 120, "ignore_eos": true, "logprobs": 5}'
            head = "POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\n"
            head += f"Content-Length: {len(body)}\r\n\r\n"
            with tls_client(info.http_url, receive=4096) as client:
                client.sendall(head.encode() + body)
                time.sleep(3)
                got = b""
                while piece := client.recv(1000):
                    got += piece
            return got

        answer = await asyncio.to_thread(slowly)
        head, _, body = answer.partition(b"\r\n\r\n")
        length = int(dict(line.split(b": ") for line in head.split(b"\r\n")[1:])[b"Content-Length"])
        assert len(body) == length


async def test_who_ends_tls_and_does_not_read_holds_nothing(router, authority):
    """Its answers lie below TLS, where TLS does not count them."""
    limits = {"head_timeout_s": 0.5, "idle_timeout_s": 1.0, "max_connections": 4}
    async with running(router, doors={"tls": authority.gateway()}, **limits) as (gateway, info):

        def clog():
            client = tls_client(info.http_url, receive=4096)
            ask = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
            client.setblocking(False)
            with contextlib.suppress(ssl.SSLWantWriteError, ssl.SSLWantReadError, BlockingIOError):
                for _ in range(3000):
                    client.send(ask * 20)
            client.settimeout(1)
            with contextlib.suppress(OSError):
                client.send(b"POST /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 10\r\n\r\n")
            with contextlib.suppress(OSError):
                client.settimeout(0.2)
                client.unwrap()  # says that it ends, and reads nothing
            return client

        clients = [await asyncio.to_thread(clog) for _ in range(4)]
        started = time.monotonic()
        while len(gateway._connections):
            assert time.monotonic() - started < 30, "connections that nobody closes"
            await asyncio.sleep(0.1)
        assert gateway._connections._sweeper.when() > asyncio.get_running_loop().time() - 5  # it still looks
        async with (
            aiohttp.ClientSession(info.http_url) as http,
            http.get("/v1/models", ssl=trusting(authority)) as answer,
        ):
            assert answer.status == 200
        for client in clients:
            client.close()
