"""Whatever comes to the HTTP port is answered in the OpenAI shape with a fitting status, and the port goes on."""

import asyncio
import gzip
import json
import logging
import random
import re
import zlib

import aiohttp
import pytest

from tests.fakes.gateway import running
from tests.fakes.router import FakeRouter

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ASK = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
BODY = json.dumps(ASK).encode()
JSON = b"Content-Type: application/json"
TYPES = {"invalid_request_error", "server_error"}


def request(method=b"POST", path=b"/v1/chat/completions", headers=(JSON,), body=b"", length=True, host=True):
    lines = [b"Host: x"] if host else []
    lines += [*headers, *([b"Content-Length: %d" % len(body)] if length else [])]
    return method + b" " + path + b" HTTP/1.1\r\n" + b"\r\n".join(lines) + b"\r\nConnection: close\r\n\r\n" + body


def ask(**fields):
    return request(body=json.dumps(ASK | fields).encode())


async def answers_to(info, data, seconds=5.0):
    """(status, headers, body) of each answer, until the gateway closes the connection."""
    host, _, port = info.http_url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(data)
        async with asyncio.timeout(seconds):
            raw = await reader.read()
    finally:
        writer.close()
    return list(_answers(raw))


def _answers(raw):
    while raw:
        head, _, raw = raw.partition(b"\r\n\r\n")
        status, *lines = head.split(b"\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.decode("latin-1").partition(":") for line in lines)}
        length = int(headers.get("content-length", 0))
        yield int(status.split()[1]), headers, raw[:length]
        raw = raw[length:]


def assert_shaped(status, headers, body):
    assert headers["content-type"].startswith("application/json"), (status, headers, body)
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "code", "param"}
    assert error["message"]
    assert error["type"] in TYPES
    assert re.fullmatch(r"[a-z_]+", error["code"])
    assert 400 <= status < 600
    return error


HTTP = {  # what is wrong with the request -> (its bytes, status, code)
    "no declared body from a page": (request(headers=[b"Origin: http://evil"], body=BODY), 415, "unsupported_media"),
    "text": (request(headers=[b"Content-Type: text/plain"], body=BODY), 415, "unsupported_media"),
    "form": (
        request(headers=[b"Content-Type: application/x-www-form-urlencoded"], body=BODY),
        415,
        "unsupported_media",
    ),
    "parts": (request(headers=[b"Content-Type: multipart/form-data; boundary=x"], body=BODY), 415, "unsupported_media"),
    "no media type": (request(headers=[b"Content-Type: \xff\xfe"], body=BODY), 415, "unsupported_media"),
    "gzip garbage": (request(headers=[JSON, b"Content-Encoding: gzip"], body=b"garbage"), 400, "invalid_request"),
    "deflate garbage": (request(headers=[JSON, b"Content-Encoding: deflate"], body=b"garbage"), 400, "invalid_request"),
    "gzip that is cut": (
        request(headers=[JSON, b"Content-Encoding: gzip"], body=gzip.compress(BODY)[:-4]),
        400,
        "invalid_request",
    ),
    "gzip bomb": (
        request(headers=[JSON, b"Content-Encoding: gzip"], body=gzip.compress(b'{"a":"' + b"a" * 50_000_000)),
        413,
        "body_too_large",
    ),
    "brotli": (request(headers=[JSON, b"Content-Encoding: br"], body=b"x"), 415, "unsupported_media"),
    "zstd": (request(headers=[JSON, b"Content-Encoding: zstd"], body=b"x"), 415, "unsupported_media"),
    "two encodings": (request(headers=[JSON, b"Content-Encoding: gzip, gzip"], body=b"x"), 415, "unsupported_media"),
    "unknown URL": (request(path=b"/nope", body=BODY), 404, "unknown_url"),
    "URL that is not UTF-8": (request(b"GET", b"/%ff%fe"), 404, "unknown_url"),
    "unknown model": (request(b"GET", b"/v1/models/a/b"), 404, "model_not_found"),
    "GET": (request(b"GET"), 405, "method_not_allowed"),
    "DELETE": (request(b"DELETE"), 405, "method_not_allowed"),
    "OPTIONS without CORS": (request(b"OPTIONS"), 405, "method_not_allowed"),
    "PATCH": (request(b"PATCH", b"/health"), 405, "method_not_allowed"),
    "unknown method": (request(b"BREW"), 400, "invalid_request"),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00", 400, "invalid_request"),
    "no HTTP": (b"hello world\r\n\r\n", 400, "invalid_request"),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "invalid_request"),
    "unknown version": (b"GET /health HTTP/3.0\r\nHost: x\r\n\r\n", 400, "invalid_request"),
    "no host": (request(host=False, body=BODY), 400, "invalid_request"),
    "long URL": (request(b"GET", b"/" + b"a" * 20_000), 414, "uri_too_long"),
    "long header": (request(headers=[JSON, b"X: " + b"a" * 20_000], body=BODY), 431, "head_too_large"),
    "many headers": (request(headers=[JSON, *[b"X%d: a" % i for i in range(500)]], body=BODY), 431, "head_too_large"),
    "broken header": (request(headers=[JSON, b"X\x00: a"], body=BODY), 400, "invalid_request"),
    "length of letters": (request(headers=[JSON, b"Content-Length: abc"], length=False), 400, "invalid_request"),
    "negative length": (request(headers=[JSON, b"Content-Length: -5"], length=False), 400, "invalid_request"),
    "two lengths": (request(headers=[JSON, b"Content-Length: 5"], body=b"x"), 400, "invalid_request"),
    "length and chunks": (request(headers=[JSON, b"Transfer-Encoding: chunked"], body=b"x"), 400, "invalid_request"),
    "broken chunk": (
        request(headers=[JSON, b"Transfer-Encoding: chunked"], body=b"zz\r\nx\r\n", length=False),
        400,
        "invalid_request",
    ),
    "length beyond the bound": (
        request(headers=[JSON, b"Content-Length: 99999999"], length=False),
        413,
        "body_too_large",
    ),
    "the same, not yet sent": (
        request(headers=[JSON, b"Expect: 100-continue", b"Content-Length: 99999999"], length=False),
        413,
        "body_too_large",
    ),
    "unknown expectation": (request(headers=[JSON, b"Expect: tea"], body=BODY), 400, "invalid_request"),
    "the same, unknown URL": (request(path=b"/x", headers=[JSON, b"Expect: tea"], body=BODY), 400, "invalid_request"),
    "timeout that is not UTF-8": (
        request(headers=[JSON, b"X-Request-Timeout: \xff"], body=BODY),
        400,
        "invalid_request",
    ),
}


@pytest.mark.parametrize("name", HTTP)
async def test_http_that_is_wrong(name, caplog):
    data, status, code = HTTP[name]
    async with running(FakeRouter()) as (gateway, info):
        ((told, headers, body),) = await answers_to(info, data)
        assert (told, assert_shaped(told, headers, body)["code"]) == (status, code)
        assert gateway._metrics._failure.labels(code)._value.get() == 1
        assert (await answers_to(info, request(body=BODY)))[0][0] == 200
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


BODIES = {  # body -> what its message must say
    b"": "not valid JSON",
    b"\x00": "not valid JSON",
    b"5": "must be a JSON object, got int",
    b"null": "must be a JSON object",
    b"\xff\xfe{\x00}\x00": "not valid UTF-8",
    b"\xef\xbb\xbf" + BODY: "not valid JSON",
    b'{"messages":[{"role":"user","content":"\\ud800"}]}': "lone surrogate",
    b'{"messages":[{"role":"user","content":"x"}],"temperature":NaN}': "temperature must be",
    b'{"messages":[{"role":"user","content":"x"}],"temperature":1e999}': "temperature must be",
    b'{"messages":[{"role":"user","content":"x"}],"temperature":' + b"9" * 10_000 + b"}": "not valid JSON",
    b'{"a":' * 60_000: "not valid JSON",
    b"[" * 60_000: "not valid JSON",
    b"[" * 70_000: "more than 65536 JSON lists",
    b'{"messages":[' + b"{}," * 150_000 + b"{}]}": "more than 65536 JSON lists",
    b'{"messages":[' + b'{"role":"user"},' * 5000 + b"{}]}": "messages takes at most 4096 items",
    b'{"messages":[{"role":"user","content":"x"}],"stop_token_ids":['
    + b"1," * 1_300_000
    + b"1]}": "stop_token_ids takes",
    b"{" + b",".join(b'"%d":0' % i for i in range(70_000)) + b"}": "as many keys",
}


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
async def test_bodies_that_are_wrong(body):
    async with running(FakeRouter()) as (_, info):
        ((status, headers, told),) = await answers_to(info, request(body=body))
        assert status == 400
        assert BODIES[body] in assert_shaped(status, headers, told)["message"]


FIELDS = [
    {"messages": [{"role": ["user"], "content": "x"}]},
    {"messages": [{"role": {}, "content": "x"}]},
    {"messages": [{"role": 5, "content": "x"}]},
    {"messages": [{"content": "x"}]},
    {"messages": [None]},
    {"messages": ["x"]},
    {"messages": "x"},
    {"messages": {"role": "user"}},
    {"messages": [{"role": "user", "content": None}]},
    {"messages": [{"role": "user", "content": {"type": "text"}}]},
    {"messages": [{"role": "user", "content": [{"type": ["text"], "text": "x"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
    {"messages": [{"role": "user", "content": [[]]}]},
    {"messages": [{"role": "user", "content": ["x"] * 1025}]},
    {"messages": [{"role": "user", "content": ["x"] * 1000}] * 20},
    {"messages": [{"role": "user", "content": "x", "name": "y" * 300}]},
    {"messages": [{"role": "assistant", "tool_calls": "x"}]},
    {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": 5}}]}]},
    {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}] * 129}]},
    {"temperature": "1"},
    {"temperature": [1]},
    {"seed": 10**30},
    {"seed": 1.5},
    {"n": 10**30},
    {"max_tokens": -(10**30)},
    {"top_p": 0},
    {"stop": 5},
    {"stop": [[]]},
    {"stop": ["x"] * 17},
    {"stop": "x" * 257},
    {"stop": ["x" * 200] * 16},
    {"stop_token_ids": [10**30]},
    {"stop_token_ids": [-1]},
    {"stop_token_ids": [True]},
    {"stop_token_ids": {"1": 1}},
    {"logprobs": True, "top_logprobs": 10**30},
    {"logprobs": True, "top_logprobs": -1},
    {"timeout": 1e308},
    {"timeout": -1},
    {"model": 5},
    {"model": "x" * 1000},
    {"stream": "yes"},
    {"stream_options": [1]},
    {"chat_template_kwargs": [1]},
    {"chat_template_kwargs": {"messages": []}},
    {"chat_template_kwargs": {str(i): i for i in range(65)}},
    {"chat_template_kwargs": {"x": "y" * 70_000}},
    {"tools": [{"type": "function"}] * 500},
    {"tools": [{"type": "function", "function": {"name": "f"}}]},
    {"tool_choice": "required"},
    {"response_format": {"type": "json_object"}},
    {"logit_bias": {str(i): 1 for i in range(2000)}},
    {"metadata": {str(i): "x" for i in range(100)}},
    {"best_of": 3},
    {"echo": True},
]


@pytest.mark.parametrize("fields", FIELDS, ids=range(len(FIELDS)))
async def test_fields_that_are_wrong(fields):
    async with running(FakeRouter()) as (_, info):
        ((status, headers, body),) = await answers_to(info, ask(**fields))
        error = assert_shaped(status, headers, body)
        assert (status, error["type"]) == (400, "invalid_request_error")
        assert error["param"] in fields or error["message"].startswith(tuple(fields))


async def test_what_is_well_declared_is_served():
    good = [
        request(body=BODY),
        request(headers=[], body=BODY),  # undeclared, and by no page of a browser
        request(headers=[b"Content-Type: Application/JSON; charset=utf-8"], body=BODY),
        request(headers=[b"Content-Type: application/vnd.x+json", b"Origin: http://x"], body=BODY),
        request(headers=[JSON, b"Content-Encoding: gzip"], body=gzip.compress(BODY)),
        request(headers=[JSON, b"Content-Encoding: deflate"], body=zlib.compress(BODY)),
        request(headers=[JSON, b"Content-Encoding: identity"], body=BODY),
        request(headers=[JSON, b"Authorization: Bearer \xff\xfe"], body=BODY),
        request(
            headers=[JSON, b"Transfer-Encoding: chunked"],
            body=b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY),
            length=False,
        ),
        request(b"GET", b"http://x/health"),
        request(b"HEAD", b"/health"),
    ]
    async with running(FakeRouter()) as (_, info):
        for data in good:
            assert (await answers_to(info, data))[0][0] == 200, data


async def test_head_of_a_failure_has_no_body():
    async with running(FakeRouter()) as (_, info):
        host, _, port = info.http_url.removeprefix("http://").rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request(b"HEAD", b"/nope"))
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        assert head.startswith(b"HTTP/1.1 404")
        assert body == b""


@pytest.mark.parametrize("stream", [False, True])
async def test_a_fault_of_ours_is_named_counted_and_logged_once(stream, caplog):
    router = FakeRouter()
    router.script = lambda request: 1 / 0
    async with running(router) as (gateway, info):
        ((status, headers, body),) = await answers_to(info, ask(stream=stream))
        error = assert_shaped(status, headers, body)
        assert (status, error["code"], error["type"]) == (500, "internal_error", "server_error")
        assert gateway._metrics._failure.labels("internal_error")._value.get() == 1
        logged = [r for r in caplog.records if r.exc_info]
        assert len(logged) == 1
        assert headers["x-request-id"] in error["message"]
        assert logged[0].about["request_id"] == headers["x-request-id"]


async def test_a_fault_of_ours_in_mid_stream_is_an_error_event(caplog):
    router = FakeRouter()
    generate = router.generate

    async def breaks(request):
        async for event in generate(request):
            yield event
            raise ZeroDivisionError

    router.generate = breaks
    async with running(router) as (_, info):
        async with aiohttp.ClientSession(info.http_url) as http, http.post(CHAT, json=ASK | {"stream": True}) as answer:
            events = (await answer.text()).strip().split("\n\n")
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "internal_error"
        assert len([r for r in caplog.records if r.exc_info]) == 1


# ---- at random

VALUES = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**20, 0.0, -0.0, 0.5, 1e308, float("inf"), float("nan")),
    *("", "x", "user", "text", "\x00", "\ud800", "é", "🗼", "a" * 3000, "[" * 500, "\\u", "fake-model", "none", "auto"),
    *([], {}, [[]], [{}], {"a": 1}, [1, 2, 3], [None], ["x"] * 20, {"type": "text", "text": "x"}, {"role": "user"}),
]
NAMES = [
    *("model", "max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "seed", "n", "stop", "stop_token_ids", "ignore_eos", "stream", "stream_options"),
    *("return_token_ids", "timeout", "messages", "max_completion_tokens", "logprobs", "top_logprobs", "prompt", "echo"),
    *("add_generation_prompt", "chat_template_kwargs", "tools", "tool_choice", "response_format", "logit_bias", "user"),
    *("metadata", "suffix", "best_of", "role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"),
    *("function", "arguments", "id", "type", "text", "include_usage", "foo", "", "\x00", "é"),
]


def tree(chance, depth):
    kind = chance.random()
    if depth == 0 or kind < 0.5:
        return chance.choice(VALUES)
    if kind < 0.75:
        return [tree(chance, depth - 1) for _ in range(chance.randrange(4))]
    return {chance.choice(NAMES): tree(chance, depth - 1) for _ in range(chance.randrange(5))}


def body_of(chance):
    """A body that is mostly right."""
    body = {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}],
        "prompt": "hi",
        "max_tokens": 2,
    }
    for _ in range(chance.randrange(1, 4)):
        body[chance.choice(NAMES)] = tree(chance, 3)
    if chance.random() < 0.5:
        message = {"role": "user", "content": "x"} | {chance.choice(NAMES): tree(chance, 3) for _ in range(2)}
        body["messages"] = [message]
    return body


@pytest.mark.parametrize("seed", range(4))
async def test_random_bodies_are_answered_or_refused_by_name(seed, caplog):
    chance = random.Random(seed)
    async with running(FakeRouter()) as (_, info), aiohttp.ClientSession(info.http_url) as http:
        for _ in range(150):
            path, body = chance.choice((CHAT, COMPLETIONS)), body_of(chance)
            async with http.post(path, data=json.dumps(body), headers={"Content-Type": "application/json"}) as answer:
                content = await answer.read()
                assert answer.status in (200, 400, 404), (body, content)
                if answer.status != 200:
                    assert_shaped(answer.status, {k.lower(): v for k, v in answer.headers.items()}, content)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


async def test_random_http_is_answered_in_the_shape(caplog):
    chance = random.Random(11)
    whole = [data for data, *_ in HTTP.values() if len(data) < 2000] + [request(body=BODY), request(b"GET", b"/health")]
    async with running(FakeRouter(), head_timeout_s=0.3, idle_timeout_s=0.3, body_grace_s=0.3) as (_, info):

        async def one():
            data = bytearray(chance.choice(whole))
            for _ in range(chance.randrange(1, 5)):
                at = chance.randrange(len(data))
                data[at : at + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
            if data.startswith(b"HEAD"):
                return
            for status, headers, body in await answers_to(info, bytes(data)):
                if status >= 400:
                    assert_shaped(status, headers, body)

        for _ in range(8):
            await asyncio.gather(*(one() for _ in range(40)))
        assert (await answers_to(info, request(body=BODY)))[0][0] == 200
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
