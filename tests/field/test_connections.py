"""Clients that begin and do not go on: heads, bodies, openings and connections that keep the gateway waiting."""

import asyncio
import contextlib
import json
import re
import resource
import socket
import struct
import time
from contextlib import asynccontextmanager
from dataclasses import replace

import aiohttp
import grpc
import pytest

from tercet.cluster.ports import ask_ports
from tercet.wire.connections import (
    AT_ONCE,
    SPARE,
    ConnectionLimits,
    ConnectionPhase,
    Connections,
)
from tercet.wire.gen import inference_pb2 as pb
from tercet.wire.gen import inference_pb2_grpc
from tercet.wire.listening import FEWEST, SPARE_FILES, most_connections
from tests import http2
from tests.fakes.gateway import running
from tests.fakes.router import FakeRouter
from tests.gateway_process import gateway_process

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "hello"}]}
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
QUICK = {"head_timeout_s": 0.3, "idle_timeout_s": 0.3, "body_grace_s": 0.3}
SHAPE = re.compile(rb'\{"error": \{"message": ".+", "type": "\w+", "code": "(\w+)", "param": ')


@asynccontextmanager
async def connected(info):
    host, _, port = info.http_url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.close()


async def answer_to(info, data):
    """What comes back until the gateway closes the connection."""
    async with connected(info) as (reader, writer), asyncio.timeout(10):
        writer.write(data)
        return await reader.read()


async def until(condition):
    while not condition():
        await asyncio.sleep(0.005)


async def served(info):
    """Whether a new client is served at once."""
    async with aiohttp.ClientSession(info.http_url) as http, asyncio.timeout(5), http.post(CHAT, json=ASK) as answer:
        return answer.status == 200


@pytest.mark.parametrize(
    ("begun", "status", "code"),
    [
        (b"POST /v1/chat/comp", b"408", b"request_timeout"),
        (HEAD % 100, b"408", b"request_timeout"),  # no empty line yet
        (HEAD % 100 + b"\r\n", b"408", b"request_timeout"),
        (HEAD % 100 + b'\r\n{"messages"', b"408", b"request_timeout"),
        (HEAD % 100 + b"Expect: 100-continue\r\n\r\n", b"100", b"request_timeout"),
        (
            HEAD.replace(b"Content-Length: %d", b"Transfer-Encoding: chunked") + b"\r\n5\r\nhel",
            b"408",
            b"request_timeout",
        ),
    ],
)
async def test_who_begins_and_stops_is_told_and_cut(begun, status, code):
    async with running(FakeRouter(), **QUICK) as (_, info):
        answer = await answer_to(info, begun)
        assert answer.startswith(b"HTTP/1.1 " + status)
        assert SHAPE.search(answer)[1] == code
        assert await served(info)


async def test_a_head_byte_by_byte_has_one_deadline():
    async with running(FakeRouter(), **QUICK) as (_, info), connected(info) as (reader, writer):
        began = time.monotonic()
        drip = asyncio.create_task(_drip(writer, b"GET /health HTTP/1.1\r\nX: " + b"x" * 1000))
        with contextlib.suppress(ConnectionError):  # it went on sending
            assert (await reader.read()).startswith(b"HTTP/1.1 408")
        drip.cancel()
        assert time.monotonic() - began < 5


async def test_a_body_must_come_at_a_rate():
    async with running(FakeRouter(), min_body_rate=1000, **QUICK) as (_, info), connected(info) as (reader, writer):
        writer.write(HEAD % 100_000 + b"\r\n")
        drip = asyncio.create_task(_drip(writer, b"x" * 100_000, pause_s=0.05))
        with contextlib.suppress(ConnectionError):
            assert b"the request's body came too slowly" in await reader.read()
        drip.cancel()


async def test_a_slow_body_at_the_rate_is_served():
    body = json.dumps(ASK | {"user": "x" * 3000}).encode()
    async with running(FakeRouter(), min_body_rate=1000, **QUICK) as (_, info), connected(info) as (reader, writer):
        writer.write(HEAD % len(body) + b"Connection: close\r\n\r\n")
        for start in range(0, len(body), 100):  # 0.6 s, and 3 s are allowed
            writer.write(body[start : start + 100])
            await asyncio.sleep(0.02)
        assert (await reader.read()).startswith(b"HTTP/1.1 200")


async def _drip(writer, data, pause_s=0.02):
    for byte in data:
        writer.write(bytes([byte]))
        await asyncio.sleep(pause_s)


async def test_what_the_gateway_closes_is_counted_by_its_reason():
    async with running(FakeRouter(), **QUICK) as (_, info):
        await answer_to(info, b"POST /v1")
        await answer_to(info, b"")
        async with aiohttp.ClientSession(info.http_url) as http, http.get("/metrics") as metrics:
            text = await metrics.text()
    for series in ('_closed_total{reason="slow_head"} 1.0', '_closed_total{reason="idle"} 1.0', " 1.0"):
        assert f"\ntercet_gateway_connections{series}" in text


async def test_an_idle_connection_is_closed_without_a_word():
    async with running(FakeRouter(), **QUICK) as (_, info):
        assert await answer_to(info, b"") == b""
        answer = await answer_to(info, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("then", [b"close", b"keep-alive"])
async def test_an_answer_that_is_not_read_is_given_up_and_one_that_is_read_slowly_is_not(then):
    body = json.dumps(ASK | {"logprobs": True, "top_logprobs": 20, "n": 4, "ignore_eos": True}).encode()
    asked = HEAD % len(body) + b"Connection: " + then + b"\r\n\r\n" + body
    async with running(FakeRouter(), **QUICK) as (gateway, info), contextlib.AsyncExitStack() as stack:
        host, _, port = info.http_url.removeprefix("http://").rpartition(":")
        clients = [socket.socket(), socket.socket()]
        stack.callback(clients[0].close)
        stack.callback(clients[1].close)
        for client, buffer in zip(clients, (4096, 32768), strict=True):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            await asyncio.to_thread(client.connect, (host, int(port)))
        await until(lambda: len(gateway._connections) == 2)
        for guard in gateway._connections._all:  # so that the system holds little of the answer
            guard.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        for client in clients:
            client.sendall(asked)
            client.setblocking(False)
        slow = clients[1]
        answer = b""
        async with asyncio.timeout(20):
            while not answer.endswith(b'"finish_reason":"length"}]}'):  # some 400 KB
                piece = await asyncio.get_running_loop().sock_recv(slow, 8192)
                assert piece, answer[-300:]
                answer += piece
                await asyncio.sleep(0.01)
            await until(lambda: gateway._connections.closed["idle"] >= 1)
            await until(lambda: len(gateway._connections) == 0)


class Recorder(asyncio.Protocol):
    """Notes in which turn of the loop bytes came, and how many."""

    opens, at_first = ConnectionPhase.IDLE, 4096

    def __init__(self):
        self.turn, self.came, self.ended = 0, {}, False
        self._tick()

    def _tick(self):
        self.turn += 1
        if not self.ended:
            asyncio.get_running_loop().call_soon(self._tick)

    def data_received(self, data):
        assert not self.ended
        self.came[self.turn] = self.came.get(self.turn, 0) + len(data)

    def eof_received(self):
        self.ended = True


async def test_one_turn_of_the_loop_works_through_one_piece_of_a_connection():
    connections, recorder = Connections(ConnectionLimits(8, 10.0, 10.0)), Recorder()
    server = await connections.listen("127.0.0.1", 0, lambda guard: recorder)
    _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(b"x" * 20 * AT_ONCE)
    writer.close()
    async with asyncio.timeout(10):
        await until(lambda: recorder.ended)
    server.close()
    connections.close()
    assert sum(recorder.came.values()) == 20 * AT_ONCE
    assert max(recorder.came.values()) <= AT_ONCE


@pytest.mark.parametrize("path", [b"/v1/completions", b"/v1/chat/completions", b"/nope"])
@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
async def test_a_client_that_wants_to_be_invited_and_goes_is_no_fault_of_ours(path, how, caplog):
    head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 5\r\n" % path
    async with running(FakeRouter()) as (gateway, info):
        host, _, port = info.http_url.removeprefix("http://").rpartition(":")
        for _ in range(20):
            with socket.create_connection((host, int(port))) as client:
                client.sendall(head + b"Expect: 100-continue\r\n\r\n")
                if how == "half-close":
                    client.shutdown(socket.SHUT_WR)
                if how == "reset":
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await asyncio.sleep(0.01)
        async with asyncio.timeout(10):
            await until(lambda: not gateway._connections)
        assert b'code="internal_error"' not in gateway._metrics.exposition()
        assert await served(info)
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


async def test_http_1_0_knows_no_invitation():
    body = json.dumps(ASK).encode()
    async with running(FakeRouter()) as (_, info):
        head = (HEAD % len(body)).replace(b"HTTP/1.1", b"HTTP/1.0")
        answer = await answer_to(info, head + b"Expect: 100-continue\r\n\r\n" + body)
        assert answer.startswith(b"HTTP/1.0 200")


async def test_a_client_that_sent_ahead_is_seen_to_go():
    """aiohttp reads no further than some requests meanwhile."""
    router, body = FakeRouter(), json.dumps(ASK).encode()
    router.gate = asyncio.Event()
    async with running(router, head_timeout_s=60.0) as (gateway, info), asyncio.timeout(10):
        async with connected(info) as (_, writer):
            writer.write(HEAD % len(body) + b"\r\n" + body + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 300)
            await until(lambda: router.running == 1)
            (guard,) = gateway._connections._all
            await until(lambda: not guard.transport.is_reading())
        await until(lambda: router.running == 0)


async def test_nobody_sends_ahead_for_long():
    """More than the system's buffers hold: its end could not be seen."""
    router, body = FakeRouter(), json.dumps(ASK).encode()
    router.gate = asyncio.Event()
    upgrade = b"Connection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    async with running(router, **QUICK) as (gateway, info), connected(info) as (_, writer), asyncio.timeout(10):
        writer.write(HEAD % len(body) + upgrade + body + b"x" * 10_000_000)
        await until(lambda: router.running == 1)
        await until(lambda: gateway._connections.closed["sent_ahead"] == 1)
        await until(lambda: router.running == 0)


CHUNKED = HEAD.replace(b"Content-Length: %d", b"Connection: close\r\nTransfer-Encoding: chunked") + b"\r\n"


def in_chunks(data, size):
    pieces = (data[start : start + size] for start in range(0, len(data), size))
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@pytest.mark.parametrize("framed", [b"1\r\na\r\n", b"1;" + b"x" * 1000 + b"\r\na\r\n"])
async def test_what_frames_a_body_is_bounded_by_the_body(framed):
    async with running(FakeRouter()) as (gateway, info), connected(info) as (_, writer), asyncio.timeout(10):
        writer.write(CHUNKED + framed * (300_000 // len(framed)))
        await until(lambda: gateway._connections.closed["small_chunks"] == 1)
        assert gateway._metrics._failure.labels("invalid_request")._value.get() == 1
        assert await served(info)


@pytest.mark.parametrize(("size", "of"), [(1, 10_000), (12, 300_000)])
async def test_chunks_as_clients_send_them_are_taken(size, of):
    body = json.dumps(ASK | {"user": "x" * of}).encode()
    async with running(FakeRouter()) as (_, info):
        assert (await answer_to(info, CHUNKED + in_chunks(body, size))).startswith(b"HTTP/1.1 200")


async def test_what_is_served_is_never_cut_for_idleness():
    router = FakeRouter()
    router.gate = asyncio.Event()
    async with running(router, **QUICK) as (_, info), aiohttp.ClientSession(info.http_url) as http:
        held = asyncio.create_task(http.post(CHAT, json=ASK))
        await until(lambda: router.running == 1)
        async with grpc.aio.insecure_channel(info.grpc_address) as channel:
            call = inference_pb2_grpc.InferenceStub(channel).Generate(pb.GenerateRequest(text="hi"))
            await until(lambda: router.running == 2)
            await asyncio.sleep(1.0)  # more than three times what an idle one may take
            router.gate.set()
            assert (await held).status == 200
            assert [r async for r in call][-1].done.finish_reason == "stop"


async def test_the_longest_idle_connections_make_room():
    async with running(FakeRouter(), max_connections=8) as (gateway, info):
        async with asyncio.TaskGroup() as idle:
            for _ in range(60):
                idle.create_task(answer_to(info, b""))
            await until(lambda: gateway._connections.closed["evicted"] >= 60 - 8 - SPARE)
            for _ in range(20):
                assert await served(info)
            gateway._connections.close()
        assert len(gateway._connections) <= 8 + SPARE


async def test_who_is_served_makes_no_room_and_the_next_is_told():
    router = FakeRouter()
    router.gate = asyncio.Event()
    async with running(router, max_connections=3) as (gateway, info), aiohttp.ClientSession(info.http_url) as http:
        held = [asyncio.create_task(http.post(CHAT, json=ASK)) for _ in range(3)]
        await until(lambda: router.running == 3)
        for _ in range(2 * SPARE):
            async with http.post(CHAT, json=ASK) as answer:
                assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
                told = (await answer.json())["error"]
                assert (told["code"], "limits.max_connections" in told["message"]) == ("overloaded", True)
        async with grpc.aio.insecure_channel(info.grpc_address) as channel:
            with pytest.raises(grpc.aio.AioRpcError, match="all 3 connections are in use"):
                await inference_pb2_grpc.InferenceStub(channel).Generate(pb.GenerateRequest(text="hi")).read()
        await ask_ports(info, 5.0)  # who asks for health is answered, so that nobody takes the gateway for dead
        async with asyncio.TaskGroup() as idle:
            for _ in range(100):
                idle.create_task(answer_to(info, b""))
            await until(lambda: gateway._connections.closed["evicted"] >= 50)
            await ask_ports(info, 5.0)
            await idle.create_task(until(lambda: len(gateway._connections) <= 3 + SPARE))
            gateway._connections.limits = replace(gateway._connections.limits, idle_s=0.05)
        router.gate.set()
        assert [(await task).status for task in held] == [200] * 3
        assert await served(info)


async def test_unfinished_bodies_are_bounded_together_and_the_oldest_is_cut():
    async with running(FakeRouter(), max_body_bytes=100_000, max_held_bytes=300_000) as (gateway, info):
        async with asyncio.TaskGroup() as tasks:
            bodies = [tasks.create_task(answer_to(info, HEAD % 90_000 + b"\r\n" + b"x" * 80_000)) for _ in range(6)]
            await until(lambda: sum(body.done() for body in bodies) == 3)
            assert gateway._bodies._held_bytes <= 300_000
            assert all(SHAPE.search(body.result())[1] == b"overloaded" for body in bodies if body.done())
            assert await served(info)
            gateway._connections.close()
        assert gateway._bodies._held_bytes == 0


async def test_bodies_that_do_not_come_leave_connections_to_others():
    """Each counts as served, and the bound on connections alone would let them hold all of them."""
    async with running(FakeRouter(), max_connections=16) as (gateway, info), asyncio.TaskGroup() as tasks:
        begun = [tasks.create_task(answer_to(info, HEAD % 100 + b"\r\n{")) for _ in range(40)]
        await until(lambda: sum(task.done() for task in begun) == 36)
        assert await served(info)
        gateway._connections.close()


async def test_unfinished_grpc_messages_count_too():
    pieces = [http2.frame(http2.DATA, 0, 1, data) for data in (b"\0\0\1\0\0" + b"x" * 16_000, b"x" * 16_384)]
    begun = http2.opened(http2.call(http2.head()), *pieces)
    async with running(FakeRouter(), max_body_bytes=100_000, max_held_bytes=100_000) as (gateway, info):
        calls = [asyncio.create_task(http2.said_to(info.grpc_address, begun, 10)) for _ in range(12)]
        await until(lambda: gateway._metrics._failure.labels("overloaded")._value.get() >= 6)
        assert gateway._bodies._held_bytes <= 100_000
        assert await served(info)
        for call in calls:
            call.cancel()


@pytest.mark.parametrize("begun", [b"", http2.PREFACE[:10], http2.PREFACE, b"GET / HTTP/1.1\r\n\r\n", b"\0" * 24])
async def test_an_http2_connection_must_open_in_time(begun):
    async with running(FakeRouter(), **QUICK) as (_, info):
        began = time.monotonic()
        await http2.said_to(info.grpc_address, begun, 10)
        assert time.monotonic() - began < 5


async def test_an_idle_grpc_connection_is_told_to_come_again():
    async with running(FakeRouter(), **QUICK) as (_, info):
        answer = await http2.said_to(info.grpc_address, http2.opened(), 10)
        assert http2.frames_of(answer)[-1][0] == http2.GOAWAY
        async with grpc.aio.insecure_channel(info.grpc_address) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            for _ in range(2):
                assert len([r async for r in stub.Generate(pb.GenerateRequest(text="hi"))]) > 1
                await asyncio.sleep(1.0)  # the channel's connection is closed meanwhile


def test_slow_clients_at_a_low_limit_of_descriptors_lock_nobody_out(monkeypatch):
    """300 slow heads, 60 slow bodies, 1,100 idle connections, and then a new client."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = SPARE_FILES + 400

    async def attack(gateway):
        host, port = gateway.host_port
        held = []
        for data in [b"GET /x"] * 300 + [HEAD % 100 + b"\r\n{"] * 60 + [b""] * 1100:
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(data)
            held.append((reader, writer))
        for _ in range(20):
            async with aiohttp.ClientSession(gateway.http_url) as http, asyncio.timeout(2):
                assert (await http.post(CHAT, json=ASK | {"max_tokens": 2})).status == 200
        for _, writer in held:
            writer.close()

    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with gateway_process(files=wanted) as gateway:
        asyncio.run(attack(gateway))


def test_the_bound_follows_the_descriptors(monkeypatch):
    limits = {}
    monkeypatch.setattr(resource, "setrlimit", lambda kind, value: limits.update(new=value))
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 4096))
    assert most_connections(2048) == 2048
    assert limits["new"] == (4096, 4096)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 1024))
    assert 500 < most_connections(2048) < 1024 - SPARE_FILES
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (64, 64))
    assert most_connections(2048) == FEWEST
