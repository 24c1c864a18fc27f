"""Whatever bytes come to a gRPC port, the gateway's or a worker's: it keeps serving, and says what was wrong."""

import asyncio
import gc
import gzip
import itertools
import logging
import random
import zlib
from collections import Counter
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from hpack import Decoder

from tercet import secret
from tercet.core import Leg, Load, Role, SamplingParams, Ticket, TokenEvent, WorkerInfo
from tercet.wire import codec, connections
from tercet.wire.codec import leg_to_proto
from tercet.wire.connections import SPARE, ConnectionLimits, ConnectionPhase
from tercet.wire.gen import inference_pb2 as pb
from tercet.wire.gen import inference_pb2_grpc, worker_pb2, worker_pb2_grpc
from tercet.wire.worker_client import WorkerLink
from tercet.wire.worker_server import WorkerServer
from tests import http2
from tests.fakes.gateway import running
from tests.fakes.router import FakeRouter
from tests.http2 import DATA, END_HEADERS, END_STREAM, PING, call, frame, head, message

WHOLE = END_HEADERS | END_STREAM
CONNECT = b"/tercet.v1.Worker/Connect"


def heads(path: bytes) -> dict[str, list[tuple[bytes, bytes]]]:
    """Malformed in one way each."""
    return {
        "path that is not UTF-8": head(b"/\xff\xfe/Z"),
        "empty path": head(b""),
        "no path": head(path, **{":path": None}),
        "no head at all": [],
        "metadata that is not UTF-8": head(path, x_foo=b"\xff\xfe"),
        "metadata key that is not UTF-8": [*head(path), (b"x-\xff", b"a")],
        "metadata key in capitals": [*head(path), (b"X-Foo", b"a")],
        "empty metadata key": [*head(path), (b"", b"a")],
        "line break in metadata": head(path, x_foo=b"a\r\nb: c"),
        "authority that is not UTF-8": head(path, **{":authority": b"\xff"}),
        "binary metadata that is not base64": head(path, x_foo_bin=b"***"),
        "user agent that is not UTF-8": head(path, user_agent=b"\xff\xfe"),
        "content type that is not UTF-8": head(path, content_type=b"text/\xff"),
        "no content type": head(path, content_type=None),
        "another method": head(path, **{":method": b"GET"}),
        "unknown pseudo header": [(b":foo", b"a"), *head(path)],
        "pseudo header at the end": [*head(path), (b":path", path)],
        "no deadline at all": head(path, grpc_timeout=b""),
        "deadline of letters": head(path, grpc_timeout=b"zzz"),
        "deadline beyond numbers": head(path, grpc_timeout=b"9" * 400 + b"n"),
        "deadline beyond reading": head(path, grpc_timeout=b"9" * 5000 + b"H"),
        "encoding that is not UTF-8": head(path, grpc_encoding=b"\xff"),
        "content length that is none": head(path, content_length=b"x"),
        "connection header": head(path, connection=b"close"),
    }


def frames(path: bytes) -> dict[str, bytes]:
    """Against the protocol in one way each."""
    opened = call(head(path))
    return {
        "no frame of HTTP/2": b"GET / HTTP/1.1\r\n\r\n",
        "half a frame": frame(DATA, 0, 1, b"x" * 100)[:50],
        "unknown frame": frame(77, 0xFF, 3, b"x"),
        "data on no stream": frame(DATA, 0, 0, b"x"),
        "data on a stream that is not open": frame(DATA, 0, 9, b"x"),
        "even stream": call(head(path), stream=2),
        "stream that goes back": call(head(path), stream=5) + call(head(path), stream=3),
        "head twice": opened + opened,
        "broken compression": frame(http2.HEADERS, WHOLE, 1, b"\xff" * 40),
        "head beyond its bound": call([*head(path), *[(b"x%d" % i, b"y" * 100) for i in range(300)]]),
        "head without an end": frame(http2.HEADERS, 0, 1, b"") + frame(http2.CONTINUATION, 0, 1, b"\0") * 200,
        "push": frame(http2.PUSH_PROMISE, END_HEADERS, 1, b"\0\0\0\2"),
        "settings that are cut": frame(http2.SETTINGS, 0, 0, b"abc"),
        "window beyond numbers": frame(http2.SETTINGS, 0, 0, b"\0\4\xff\xff\xff\xff"),
        "window of zero": frame(http2.WINDOW_UPDATE, 0, 0, b"\0\0\0\0"),
        "window that overflows": frame(http2.WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff") * 3,
        "reset of a stream that is not open": frame(http2.RST_STREAM, 0, 7, b"\0\0\0\0"),
        "priority of itself": frame(http2.PRIORITY, 0, 1, b"\0\0\0\1\0"),
        "goaway": frame(http2.GOAWAY, 0, 0, b"\0" * 8),
        "frame beyond its bound": b"\xff\xff\xff\0\0\0\0\0\1",
        "more data than the window": opened + frame(DATA, 0, 1, b"x" * 16_000) * 10,
        "pings without end": frame(http2.PING, 0, 0, b"12345678") * 20_000,
        "settings without end": frame(http2.SETTINGS) * 20_000,
        "resets without end": b"".join(
            call(head(path), i) + frame(http2.RST_STREAM, 0, i, b"\0\0\0\x08") for i in range(1, 4000, 2)
        ),
        "streams without end": b"".join(call(head(path), i) for i in range(1, 4000, 2)),
        "empty data without end": opened + frame(DATA, 0, 1) * 20_000,
    }


RESET = frame(http2.RST_STREAM, 0, 1, b"\0\0\0\x08")
CRUMBS = {  # each asks for nothing, after a call has begun
    "acknowledged settings": frame(http2.SETTINGS, 1),
    "answered pings": frame(http2.PING, 1, 0, b"12345678"),
    "empty data": frame(DATA, 0, 1),
    "padding": frame(DATA, http2.PADDED, 1, b"\0"),
    "bytes one by one": frame(DATA, 0, 1, b"\0"),
    "window byte by byte": frame(http2.WINDOW_UPDATE, 0, 1, b"\0\0\0\1"),
    "another place": frame(http2.ALTSVC, 0, 0, b"\0\1aa"),
    "a stream without priority": frame(http2.PRIORITY, 0, 1, b"\0\0\0\0\0"),
}


class Handler:
    """A worker's role that says one token."""

    def __init__(self):
        self.aborted = 0

    def start(self, leg, stream):
        stream.token(leg, TokenEvent(7))

    def abort(self, ticket):
        self.aborted += 1

    def meet(self, endpoints):
        pass

    def disconnected(self, stream):
        pass


@asynccontextmanager
async def gateway_port():
    async with running(FakeRouter()) as (_, info):
        yield info.grpc_address


@asynccontextmanager
async def worker_port():
    server = WorkerServer(Handler(), Load, "secret")
    address = await server.start("127.0.0.1")
    try:
        yield address
    finally:
        await server.stop()


async def gateway_serves(address):
    async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        request = pb.GenerateRequest(text="hi")
        answers = inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=10)
        return [r async for r in answers][-1].done.finish_reason == "stop"


LEG = Leg(Ticket("r", 0, 1), "aggregated", (1, 2), 2, SamplingParams(), 10.0)


@asynccontextmanager
async def linked(address):
    """The gateway's own link; `told` is what comes over it."""
    up, told = asyncio.Event(), asyncio.Queue()
    info = WorkerInfo("aggregated-0", Role.AGGREGATED, 1, address, "", "")
    link = WorkerLink(
        info, "secret", lambda said: [*map(told.put_nowait, said)], id, lambda fault: fault is None and up.set()
    )
    link.told = told
    try:
        async with asyncio.timeout(10):
            await up.wait()
        yield link
    finally:
        await link.close()


async def gets_a_token(link):
    async with asyncio.timeout(10):
        link.start(LEG)
        key, outcome = await link.told.get()
        return (key, outcome.token_id) == (LEG.ticket, 7)


async def worker_serves(address):
    """A new connection."""
    async with linked(address) as link:
        return await gets_a_token(link)


PORTS = {
    "gateway": (gateway_port, gateway_serves, http2.GENERATE),
    "worker": (worker_port, worker_serves, CONNECT),
}


@pytest.fixture(params=PORTS)
async def port(request):
    opened, serves, path = PORTS[request.param]
    async with opened() as address:
        yield address, serves, path


def quiet(caplog):
    """No traceback, and nothing that asyncio had to catch."""
    told = [r for r in caplog.records if r.exc_info or r.name == "asyncio" or r.levelno >= logging.ERROR]
    return [r for r in told if not of_a_closed_loop(r)]


def of_a_closed_loop(record):
    """gRPC has one poller for all loops of a process: the last event of an earlier test's loop may arrive here."""
    error = record.exc_info and record.exc_info[1]
    closed = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
    return closed and "PollerCompletionQueue" in record.getMessage()


async def test_a_malformed_head_ends_its_call_at_most(port, caplog):
    address, serves, path = port
    for name, headers in heads(path).items():
        await http2.said_to(address, http2.opened(call(headers, flags=WHOLE)), 0.05)
        assert await serves(address), name
    assert not quiet(caplog)


async def test_a_malformed_frame_ends_its_connection_at_most(port, caplog):
    address, serves, path = port
    for name, data in frames(path).items():
        await http2.said_to(address, http2.opened(data), 0.05)
        assert await serves(address), name
    assert not quiet(caplog)


async def test_random_bytes_and_frames_end_their_connection_at_most(port, caplog):
    address, serves, path = port
    chance = random.Random(7)
    parts = [*frames(path).values(), *(call(h) for h in heads(path).values())]
    parts = [part for part in parts if len(part) < 5000]
    for _ in range(60):
        data = b"".join(_mangled(chance.choice(parts), chance) for _ in range(chance.randrange(1, 6)))
        whole = chance.random() < 0.9
        await http2.said_to(address, http2.opened(data) if whole else chance.randbytes(200) + data, 0.01)
    assert await serves(address)
    assert not quiet(caplog)


def _mangled(data, chance):
    """The same with a byte changed, cut, or sent as random frame."""
    match chance.randrange(4):
        case 0 if data:
            at = chance.randrange(len(data))
            return data[:at] + chance.randbytes(1) + data[at + 1 :]
        case 1:
            return data[: chance.randrange(len(data) + 1)]
        case 2:
            return frame(chance.randrange(12), chance.randrange(256), chance.randrange(8), chance.randbytes(12))
    return data


@pytest.mark.parametrize("crumb", CRUMBS.values(), ids=CRUMBS)
async def test_every_frame_that_asks_for_nothing_counts(crumb):
    begun = call(head()) + frame(DATA, 0, 1, b"\0\0\1\0\0")
    async with running(FakeRouter()) as (gateway, info), asyncio.TaskGroup() as tasks, asyncio.timeout(10):
        tasks.create_task(http2.said_to(info.grpc_address, http2.opened(begun, crumb * 2000), 10))
        while not gateway._connections.closed["flood"]:
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("method", [{"_method": b"GET"}, {"path": b"/no/such"}], ids=["no gRPC", "unknown"])
async def test_calls_that_are_turned_away_count(method):
    """Each is a task, headers and a reset: dear for us, and cheap for who sends them."""
    calls = [call(head(**method), i, WHOLE) for i in range(1, 2001, 2)]
    async with running(FakeRouter()) as (gateway, info), asyncio.TaskGroup() as tasks, asyncio.timeout(10):
        tasks.create_task(http2.said_to(info.grpc_address, http2.opened(*calls), 10))
        while not gateway._connections.closed["flood"]:
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("kind", ["pings", "calls"])
async def test_who_takes_too_long_is_read_in_small_pieces(kind, monkeypatch):
    """However much it sends at once. Here everything takes too long."""
    monkeypatch.setattr(connections, "TURN_S", 0.0)
    calls = [call(head(_method=b"GET"), i, WHOLE) for i in range(1, 161, 2)]
    data = http2.opened(*(calls if kind == "calls" else [frame(PING, 0, 0, b"12345678")] * 380))
    turns = Counter()
    async with running(FakeRouter()) as (gateway, info):
        client = asyncio.create_task(http2.said_to(info.grpc_address, data, 1))
        while not client.done():
            for guard in gateway._connections._all:
                if guard._inner._h2 is not None:
                    turns[guard._inner._h2.frames] += 1
            await asyncio.sleep(0)
    steps = sorted(turns)
    assert steps[-1] >= 80
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 26


async def test_frames_for_a_stream_that_is_over_count():
    """h2 tells of none of them."""
    late = (call(head()) + RESET, frame(DATA, 0, 1, b"x" * 8) * 2000)
    async with running(FakeRouter()) as (gateway, info):
        await http2.said_to(info.grpc_address, http2.opened(*late), 10)
        assert gateway._connections.closed["flood"] == 1


async def test_what_asks_for_something_is_no_flood():
    """Calls in one piece, and commands to a worker that come faster than they are read."""
    check = head(b"/grpc.health.v1.Health/Check")
    calls = b"".join(
        call(check, i) + frame(DATA, 0, i, message(b"")) + frame(DATA, END_STREAM, i) for i in range(1, 99, 2)
    )
    async with gateway_port() as address:
        answer = await http2.said_to(
            address, http2.opened(calls), 10, lambda answer: len(trailers_of(answer)) == len(range(1, 99, 2))
        )
        assert {fields[b"grpc-status"] for fields in trailers_of(answer)} == {b"0"}
    handler = Handler()
    server = WorkerServer(handler, Load, "secret")
    async with linked(await server.start("127.0.0.1")) as link:
        for _ in range(3000):
            link.abort(LEG)
        async with asyncio.timeout(20):
            while handler.aborted < 3000:
                await asyncio.sleep(0.01)
    assert not server._connections.closed["flood"]
    await server.stop()


async def test_calls_that_are_reset_at_once_leave_nothing_behind():
    """Not even those whose task has not begun."""
    pairs = [call(head(), i) + frame(http2.RST_STREAM, 0, i, b"\0\0\0\x08") for i in range(1, 400, 2)]
    async with running(FakeRouter()) as (gateway, info):
        client = asyncio.create_task(http2.said_to(info.grpc_address, http2.opened(*pairs), 30))
        while not gateway._connections:
            await asyncio.sleep(0.005)
        (guard,) = gateway._connections._all
        async with asyncio.timeout(10):
            while not guard._inner._h2 or guard._inner._h2.highest_inbound_stream_id < 399:
                await asyncio.sleep(0.005)
            while guard._inner._events.streams or guard._inner._handler.tasks:
                await asyncio.sleep(0.005)
        client.cancel()


async def test_a_connection_that_is_refused_leaves_nothing_behind():
    router = FakeRouter()
    router.gate = asyncio.Event()
    async with (
        running(router, max_connections=1) as (gateway, info),
        grpc.aio.insecure_channel(info.grpc_address) as channel,
    ):
        held = inference_pb2_grpc.InferenceStub(channel).Generate(pb.GenerateRequest(text="hi"))
        while not router.running:
            await asyncio.sleep(0.005)
        (guard,) = gateway._connections._all
        server = guard._inner._handler._server
        asked = http2.opened(call(head()), frame(DATA, END_STREAM, 1, message(HI)))
        for _ in range(5):
            answer = await http2.said_to(info.grpc_address, asked, 10, lambda answer: status_of(answer)[1])
            assert status_of(answer)[1] == EXHAUSTED
        while len(server.open) > 1:
            await asyncio.sleep(0.005)
        held.cancel()


async def test_an_open_call_goes_on_beside_malformed_ones():
    router = FakeRouter()
    router.gate = asyncio.Event()
    async with running(router) as (_, info), grpc.aio.insecure_channel(info.grpc_address) as channel:
        running_call = inference_pb2_grpc.InferenceStub(channel).Generate(pb.GenerateRequest(text="hi"))
        while not router.running:
            await asyncio.sleep(0.005)
        for headers in heads(http2.GENERATE).values():
            await http2.said_to(info.grpc_address, http2.opened(call(headers, flags=WHOLE)), 0.02)
        router.gate.set()
        assert [r async for r in running_call][-1].done.finish_reason == "stop"


# ---- what is told


def trailers_of(answer):
    """Of every stream."""
    decoder = Decoder()
    heads = [dict(decoder.decode(p, raw=True)) for kind, _, _, p in http2.frames_of(answer) if kind == http2.HEADERS]
    return [fields for fields in heads if b"grpc-status" in fields]


def status_of(answer):
    """(HTTP status, gRPC status, its message) of the first stream's trailers."""
    decoder, found = Decoder(), {}
    for kind, _, stream, payload in http2.frames_of(answer):
        if kind == http2.HEADERS:
            fields = dict(decoder.decode(payload, raw=True))
            found |= fields if stream == 1 else {}
    return tuple(found.get(name, b"").decode() for name in (b":status", b"grpc-status", b"grpc-message"))


GZIP, DEFLATE = head(grpc_encoding=b"gzip"), head(grpc_encoding=b"deflate")
HI = pb.GenerateRequest(text="hi").SerializeToString()
OK, INVALID, EXHAUSTED, UNIMPLEMENTED = "0", "3", "8", "12"


def compressed(data):
    return b"\1" + len(data).to_bytes(4, "big") + data


@pytest.mark.parametrize(
    ("headers", "data", "status", "says"),
    [
        (head(), message(HI), OK, ""),
        (head(), message(b"\xff\xff\xff"), INVALID, "invalid_request: the message cannot be read"),
        (head(), b"", INVALID, "invalid_request: the call has no message"),
        (head(), message(HI)[:-1], INVALID, "invalid_request: the call ended within a message"),
        (head(), b"\0\0", INVALID, "invalid_request: the call ended within a message"),
        (head(), b"\7" + message(HI)[1:], INVALID, "invalid_request: the message begins with 7"),
        (head(), b"\0\xff\xff\xff\xff", EXHAUSTED, "body_too_large: the body is larger than 4194304 bytes"),
        (GZIP, compressed(gzip.compress(HI)), OK, ""),
        (DEFLATE, compressed(zlib.compress(HI)), OK, ""),
        (GZIP, compressed(b"garbage"), INVALID, "invalid_request: the body is not gzip"),
        (GZIP, compressed(gzip.compress(bytes(10_000_000))), EXHAUSTED, "body_too_large"),
        (head(grpc_encoding=b"br"), compressed(HI), UNIMPLEMENTED, "unsupported_media: the body's encoding 'br'"),
        (head(grpc_encoding=b"\xff"), compressed(HI), UNIMPLEMENTED, "unsupported_media"),
        (head(), compressed(HI), UNIMPLEMENTED, "unsupported_media"),
        (head(b"/x.Y/Z"), message(HI), UNIMPLEMENTED, "unknown_url: there is no such method"),
        (head(b"/\xff\xfe"), message(HI), UNIMPLEMENTED, "unknown_url: there is no such method"),
        (head(grpc_timeout=b"zzz"), message(HI), INVALID, "invalid_request: grpc-timeout"),
    ],
)
async def test_every_fault_of_a_call_has_its_status(headers, data, status, says):
    async with running(FakeRouter()) as (gateway, info):
        answer = await http2.said_to(
            info.grpc_address,
            http2.opened(call(headers), frame(DATA, END_STREAM, 1, data)),
            10,
            lambda answer: status_of(answer)[1],
        )
        http, told, text = status_of(answer)
        assert (http, told) == ("200", status)
        assert text.startswith(says)
        if status != OK:
            counted = gateway._metrics._failure.labels(says.partition(":")[0])._value.get()
            assert counted == 1


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (head(**{":method": b"GET"}), "405"),
        (head(content_type=None), "415"),
        (head(content_type=b"application/grpc+json"), "415"),
        (head(content_type=b"application/grpc-web"), "415"),
    ],
)
async def test_what_is_no_grpc_has_an_http_status(headers, status):
    async with gateway_port() as address:
        asked = http2.opened(call(headers, flags=WHOLE))
        answer = await http2.said_to(address, asked, 10, lambda answer: status_of(answer)[0])
        assert status_of(answer)[0] == status


@pytest.mark.parametrize(
    ("chat", "says"),
    [
        ([pb.Message(role="king", content="x")], r"messages\[0\].role must be one of .*'king'"),
        ([pb.Message(content="x")], r"messages\[0\].role"),
        ([pb.Message(role="user", content="x")] * 4097, "messages takes at most 4096 items"),
    ],
)
async def test_grpc_refuses_the_messages_that_http_refuses(chat, says):
    async with gateway_port() as address, grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError, match=says) as caught:
            await anext(aiter(stub.Generate(pb.GenerateRequest(chat=pb.Chat(messages=chat)))))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_fault_of_ours_is_named_counted_and_logged_once(caplog):
    router = FakeRouter()
    router.script = lambda request: 1 / 0
    async with running(router) as (gateway, info), grpc.aio.insecure_channel(info.grpc_address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(inference_pb2_grpc.InferenceStub(channel).Generate(pb.GenerateRequest(text="hi"))))
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert caught.value.details().startswith("internal_error: unexpected ZeroDivisionError")
        assert gateway._metrics._failure.labels("internal_error")._value.get() == 1
    logged = [r for r in caplog.records if r.exc_info]
    assert len(logged) == 1
    assert logged[0].about["request_id"] == caught.value.details().split()[-1]


async def test_a_watcher_that_does_not_read_keeps_nobody_waiting():
    router = FakeRouter()
    watch = head(b"/grpc.health.v1.Health/Watch")
    no_window = frame(http2.SETTINGS, 0, 0, b"\0\4\0\0\0\0")
    deaf = http2.PREFACE + no_window + call(watch) + frame(DATA, END_STREAM, 1, message(b""))
    async with running(router) as (_, info), grpc.aio.insecure_channel(info.grpc_address) as channel:
        watcher = asyncio.create_task(http2.said_to(info.grpc_address, deaf, 30))
        health = health_pb2_grpc.HealthStub(channel)
        watched = health.Watch(health_pb2.HealthCheckRequest())
        states = [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]
        async with asyncio.timeout(10):
            for wanted in (*states, *states):
                router.missing = [] if wanted == states[0] else ["decode"]
                while (await watched.read()).status != wanted:
                    pass
        watched.cancel()
        watcher.cancel()


async def test_watchers_are_bounded_and_the_oldest_ends(monkeypatch):
    monkeypatch.setattr("tercet.wire.grpc_server.MOST_WATCHERS", 4)
    async with gateway_port() as address, grpc.aio.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watches = []
        for _ in range(6):
            watches.append(health.Watch(health_pb2.HealthCheckRequest()))
            await watches[-1].read()
        for watch in watches[:2]:
            assert await watch.code() is grpc.StatusCode.CANCELLED
        assert (await health.Check(health_pb2.HealthCheckRequest())).status
        for watch in watches[2:]:
            watch.cancel()


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_in_both_versions(version):
    async with gateway_port() as address, grpc.aio.insecure_channel(address) as channel:
        ask = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        questions = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="tercet.v1.Inference"),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="no.such.Thing"),
            reflection_pb2.ServerReflectionRequest(),
        ]
        listed, described, unknown, empty = [r async for r in ask(iter(questions))]
        names = {s.name for s in listed.list_services_response.service}
        assert {"tercet.v1.Inference", "grpc.health.v1.Health", f"grpc.reflection.{version}.ServerReflection"} <= names
        assert described.file_descriptor_response.file_descriptor_proto
        assert unknown.HasField("error_response")
        assert empty.HasField("error_response")


async def test_health_by_every_method():
    async with gateway_port() as address, grpc.aio.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        while (await health.Check(health_pb2.HealthCheckRequest())).status != health_pb2.HealthCheckResponse.SERVING:
            await asyncio.sleep(0.05)
        assert set((await health.List(health_pb2.HealthListRequest())).statuses) == {"", "tercet.v1.Inference"}
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="x"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        unknown = health.Watch(health_pb2.HealthCheckRequest(service="x"), timeout=0.3)
        assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await unknown.read()
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_client_that_does_not_read_holds_no_tokens_beyond_its_request():
    """With a window of nothing the first token waits; the deadline frees the workers, and the port goes on."""
    router = FakeRouter("x" * 100)
    no_window = frame(http2.SETTINGS, 0, 0, b"\0\4\0\0\0\0")
    deaf = http2.PREFACE + no_window + call(head()) + frame(DATA, END_STREAM, 1, message(HI))
    async with running(router, request_timeout_s=0.5) as (_, info):
        answer = await http2.said_to(info.grpc_address, deaf, 3)
        assert status_of(answer)[1] == "4"  # DEADLINE_EXCEEDED, which needs no window
        assert router.running == 0
        assert await gateway_serves(info.grpc_address)


def proof_of(token, nonce):
    """A first command that proves the token, in answer to a worker's first word."""

    def answer(reports):
        given = secret.proof(token, codec.GATEWAY, reports.challenge.nonce, nonce.encode())
        return worker_pb2.Command(prove=worker_pb2.Prove(proof=given))

    return answer


STRANGERS = {
    "wrong token": proof_of("wrong", "00"),
    "other nonce": proof_of("secret", "11"),
    "no proof": lambda _: worker_pb2.Command(),
    "another command": lambda _: leg_to_proto(Leg(Ticket("r", 0, 1), "aggregated", (1,), 1, SamplingParams(), 10.0)),
}


@pytest.mark.parametrize("answer", STRANGERS.values(), ids=STRANGERS)
async def test_who_does_not_prove_the_token_is_told_and_its_stream_ends(answer):
    async with worker_port() as address, grpc.aio.insecure_channel(address) as channel:
        call_ = worker_pb2_grpc.WorkerStub(channel).Connect(metadata=((codec.NONCE_METADATA, "00"),))
        first = await call_.read()
        assert secret.proves(first.challenge.proof, "secret", codec.WORKER, b"00", first.challenge.nonce)
        assert not first.HasField("load")
        await call_.write(answer(first))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call_.read()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


DEAF = http2.PREFACE + frame(http2.SETTINGS, 0, 0, b"\0\4\0\0\0\0") + call(head(CONNECT))  # with a window of nothing


async def test_who_does_not_take_our_proof_in_time_is_told_and_its_call_ends(monkeypatch):
    monkeypatch.setattr("tercet.wire.worker_server.PROVE_S", 0.1)
    async with worker_port() as address:
        answer = await http2.said_to(address, DEAF, 10, lambda answer: status_of(answer)[1])
        assert status_of(answer)[1] == "16"  # UNAUTHENTICATED


async def test_strangers_make_room_and_who_has_proven_itself_does_not(monkeypatch, caplog):
    """They hold as many calls as they like, within the time for proofs."""
    monkeypatch.setattr("tercet.wire.worker_server.PROVE_S", 60.0)
    monkeypatch.setattr("tercet.wire.worker_server.CONNECTIONS", ConnectionLimits(most=4, head_s=60.0, idle_s=60.0))
    server = WorkerServer(Handler(), Load, "secret")
    address = await server.start("127.0.0.1")
    connections = server._connections

    async def crowd(tasks):
        """More than there is room for, all of whom have begun their calls."""
        enough = connections.closed["evicted"] + SPARE
        held = [tasks.create_task(http2.said_to(address, DEAF, 60)) for _ in range(4 + 2 * SPARE)]
        while connections.closed["evicted"] < enough or connections._waiting[ConnectionPhase.HEAD]:
            await asyncio.sleep(0.005)
        return held

    async with asyncio.TaskGroup() as tasks:
        strangers = await crowd(tasks)
        async with linked(address) as link:
            strangers += await crowd(tasks)
            assert link.up
            assert await gets_a_token(link)
        for stranger in strangers:
            stranger.cancel()
    await server.stop()
    assert not quiet(caplog)


async def test_a_stream_that_ends_leaves_nothing_behind(caplog):
    """Neither the link's commands, where the port refuses the call, nor the worker's, where the link goes."""
    async with gateway_port() as address:
        info = WorkerInfo("aggregated-0", Role.AGGREGATED, 1, address, "", "")
        link = WorkerLink(info, "secret", lambda *_: None, id, id)
        async with asyncio.timeout(10):
            while not link.fault:
                await asyncio.sleep(0.005)
        await link.close()
    async with worker_port() as address:
        assert await worker_serves(address)
        await asyncio.sleep(0.1)
    gc.collect()
    await asyncio.sleep(0)
    assert not quiet(caplog)


class Impostor(worker_pb2_grpc.WorkerServicer):
    """Has taken over a worker's port, and begins with any word but the right proof."""

    def __init__(self, first):
        self.first, self.told = first, []

    async def Connect(self, request_iterator, context):
        yield self.first
        async for command in request_iterator:
            self.told.append(command)
            yield worker_pb2.Reports(load=worker_pb2.Load())


@pytest.mark.parametrize(
    "first",
    [
        worker_pb2.Reports(load=worker_pb2.Load(blocks_free=9)),
        worker_pb2.Reports(challenge=worker_pb2.Challenge(nonce=b"n" * 16, proof=b"p" * 32)),
        worker_pb2.Reports(
            challenge=worker_pb2.Challenge(nonce=b"n" * 16, proof=secret.proof("wrong", codec.WORKER, b"", b"n" * 16))
        ),
    ],
)
async def test_a_worker_that_does_not_prove_the_token_gets_no_request(first):
    server, impostor = grpc.aio.server(), Impostor(first)
    worker_pb2_grpc.add_WorkerServicer_to_server(impostor, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    changes = []
    info = WorkerInfo("aggregated-0", Role.AGGREGATED, 1, f"127.0.0.1:{port}", "", "")
    link = WorkerLink(info, "secret", lambda *_: None, id, changes.append)
    try:
        async with asyncio.timeout(10):
            while not link.fault:
                link.start(Leg(Ticket("r", 0, 1), "aggregated", (1,), 1, SamplingParams(), 10.0))
                await asyncio.sleep(0.01)
        assert "does not know this cluster's token" in link.fault
        assert not impostor.told
        assert not changes
    finally:
        await link.close()
        await server.stop(None)


async def test_what_cannot_be_read_ends_one_stream_and_the_next_is_a_new_try(caplog):
    async with worker_port() as address:
        taken = []
        info = WorkerInfo("aggregated-0", Role.AGGREGATED, 1, address, "", "")
        link = WorkerLink(
            info, "secret", lambda *_: None, id, lambda fault: taken.append(fault is None) or 1 / (len(taken) - 1)
        )
        try:
            async with asyncio.timeout(10):
                while taken != [True, False, True]:
                    await asyncio.sleep(0.01)
            assert link.fault == "unexpected ZeroDivisionError: division by zero"
        finally:
            await link.close()
    assert len([r for r in caplog.records if r.exc_info]) == 1


async def _read_on(call_):
    while True:
        await call_.read()


async def test_a_fault_in_the_workers_loop_ends_the_stream_with_its_name(caplog):
    handler = Handler()
    handler.start = lambda leg, stream: 1 / 0
    server = WorkerServer(handler, Load, "secret")
    address = await server.start("127.0.0.1")
    async with grpc.aio.insecure_channel(address) as channel:
        call_ = worker_pb2_grpc.WorkerStub(channel).Connect(metadata=((codec.NONCE_METADATA, "00"),))
        await call_.write(proof_of("secret", "00")(await call_.read()))
        await call_.write(leg_to_proto(Leg(Ticket("r", 0, 1), "aggregated", (1,), 1, SamplingParams(), 10.0)))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _read_on(call_)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "ZeroDivisionError" in caught.value.details()
    assert len([r for r in caplog.records if r.exc_info]) == 1
    await server.stop()
