"""What a gateway has counted is what its clients saw: requests of every outcome, over both ports at once."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from contextlib import aclosing
from dataclasses import dataclass, field

import aiohttp
import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tercet.core import FinishReason, SamplingParams
from tercet.errors import Overloaded, WorkerLost
from tercet.roles.gateway.ask import Ask
from tercet.roles.gateway.keys import Key
from tercet.wire.gen import inference_pb2 as pb
from tercet.wire.gen import inference_pb2_grpc
from tests.fakes.gateway import running
from tests.fakes.router import FakeRouter

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TIMES = 6  # that each kind of request is sent
BREAKS, REFUSED, HANGS = "breaks", "refused", "hangs"  # prompts
BREAKS_AFTER = 5  # tokens


class Router(FakeRouter):
    """Fails, or hangs behind some tokens, for prompts that say so."""

    async def generate(self, request):
        prompt, count = bytes(t for t in request.token_ids if t < 256).decode(), 0
        if REFUSED in prompt:
            raise Overloaded("every worker refuses")
        async for event in super().generate(request):
            if count == BREAKS_AFTER and BREAKS in prompt:
                raise WorkerLost("gone")
            if count == BREAKS_AFTER and HANGS in prompt:
                await asyncio.Event().wait()
            count += 1
            yield event


@dataclass
class Seen:
    """What clients saw."""

    outcomes: Counter[str] = field(default_factory=Counter)  # ok, or an error's code -> requests
    finishes: Counter[str] = field(default_factory=Counter)  # finish reason -> choices
    operations: Counter[str] = field(default_factory=Counter)  # chat, text_completion -> requests
    tokens: int = 0  # generated
    prompt_tokens: int = 0
    cached_tokens: int = 0
    firsts: int = 0  # choices of which a first token came
    gaps: int = 0  # between tokens

    def answered(self, operation: str, outcome: str = "ok") -> None:
        self.outcomes[outcome] += 1
        self.operations[operation] += 1

    def choice(self, tokens: int) -> None:
        self.tokens += tokens
        self.firsts += tokens > 0
        self.gaps += max(0, tokens - 1)


async def http_whole(http, seen, path, body):
    operation = "chat" if path == CHAT else "text_completion"
    async with http.post(path, json=body | {"return_token_ids": True}) as answer:
        told = await answer.json()
    if answer.status != 200:
        seen.answered(operation, told["error"]["code"])
        return
    seen.answered(operation)
    for choice in told["choices"]:
        seen.finishes[choice["finish_reason"]] += 1
        seen.choice(len(choice["token_ids"]))
    samples = body.get("n", 1)
    seen.prompt_tokens += told["usage"]["prompt_tokens"] * samples
    seen.cached_tokens += told["usage"]["prompt_tokens_details"]["cached_tokens"] * samples


async def http_stream(http, seen, path, body, prompt_tokens, reads=None):
    """reads: tokens after which the client goes away."""
    operation, tokens = ("chat" if path == CHAT else "text_completion"), 0
    async with http.post(path, json=body | {"stream": True, "return_token_ids": True}) as answer:
        if answer.status != 200:  # its time was over before the first token
            seen.answered(operation, (await answer.json())["error"]["code"])
            return
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                seen.answered(operation, event["error"]["code"])
                break
            for choice in event["choices"]:
                tokens += len(choice["token_ids"])
                if choice["finish_reason"]:
                    seen.finishes[choice["finish_reason"]] += 1
                    seen.answered(operation)
                    seen.cached_tokens += 16
            if reads is not None and tokens == reads:
                seen.answered(operation, "cancelled")
                answer.close()
                break
    seen.choice(tokens)
    seen.prompt_tokens += prompt_tokens if tokens else 0


async def by_grpc(inference, seen, request, reads=None, **call):
    operation, tokens = ("chat" if request.HasField("chat") else "text_completion"), 0
    prompt_tokens = len(request.text)
    stream = inference.Generate(request, **call)
    try:
        async for response in stream:
            tokens += len(response.delta.token_ids)
            if response.HasField("done"):
                seen.answered(operation)
                seen.finishes[response.done.finish_reason] += 1
                seen.cached_tokens += response.done.cached_tokens
            if reads is not None and tokens == reads:
                seen.answered(operation, "cancelled")
                stream.cancel()
                break
    except grpc.aio.AioRpcError as error:
        seen.answered(operation, error.details().partition(":")[0])
    seen.choice(tokens)
    seen.prompt_tokens += prompt_tokens if tokens else 0


def everything(http, inference, seen):
    """One request of each kind."""
    chat = {"messages": [{"role": "user", "content": "hello"}]}
    text, broken, hangs = {"prompt": "hello"}, {"prompt": BREAKS}, {"prompt": HANGS}
    yield http_whole(http, seen, CHAT, chat)
    yield http_whole(http, seen, COMPLETIONS, text | {"max_tokens": 7})
    yield http_whole(http, seen, COMPLETIONS, text | {"n": 3, "max_tokens": 1})
    yield http_whole(http, seen, COMPLETIONS, text | {"temperature": -1})
    yield http_whole(http, seen, COMPLETIONS, text | {"model": "another"})
    yield http_whole(http, seen, COMPLETIONS, {"prompt": "x" * 200})
    yield http_whole(http, seen, COMPLETIONS, {"prompt": REFUSED})
    yield http_stream(http, seen, COMPLETIONS, text, 5)
    yield http_stream(http, seen, COMPLETIONS, broken, len(BREAKS))
    yield http_stream(http, seen, COMPLETIONS, hangs, len(HANGS), reads=BREAKS_AFTER)
    yield http_stream(http, seen, COMPLETIONS, hangs | {"timeout": 2.0}, len(HANGS))
    yield by_grpc(inference, seen, pb.GenerateRequest(text="hello"))
    yield by_grpc(inference, seen, pb.GenerateRequest(text="hello", sampling=pb.Sampling(max_tokens=3)))
    yield by_grpc(inference, seen, pb.GenerateRequest(text="hello", model="another"))
    yield by_grpc(inference, seen, pb.GenerateRequest(text=REFUSED))
    yield by_grpc(inference, seen, pb.GenerateRequest(text=BREAKS))
    yield by_grpc(inference, seen, pb.GenerateRequest(text=HANGS), reads=BREAKS_AFTER)


async def counted(http):
    """Name and labels -> value."""
    async with http.get("/metrics") as answer:
        families = text_string_to_metric_families(await answer.text())
    return {(s.name, *sorted(s.labels.items())): s.value for family in families for s in family.samples}


def grown(before, after, name, label=""):
    """The values of a label, or "" -> by how much the series has grown."""
    found = Counter()
    for key, value in after.items():
        if key[0] == name:
            found[dict(key[1:]).get(label, "")] += value - before.get(key, 0)
    return {which: growth for which, growth in found.items() if growth}


@pytest.mark.timeout(120)
async def test_counters_agree_with_what_clients_saw():
    seen = Seen()
    async with (
        running(Router()) as (gateway, info),
        aiohttp.ClientSession(info.http_url, connector=aiohttp.TCPConnector(limit=0)) as http,
        grpc.aio.insecure_channel(info.grpc_address) as channel,
    ):
        inference = inference_pb2_grpc.InferenceStub(channel)
        before = await counted(http)
        await asyncio.gather(*(each for _ in range(TIMES) for each in everything(http, inference, seen)))
        async with http.get("/nowhere") as answer:
            assert answer.status == 404
        while gateway.status()["inflight"]:  # of clients that went away
            await asyncio.sleep(0.01)
        after = await counted(http)
    check(seen, lambda name, label="": grown(before, after, name, label))


def check(seen, growth):
    total = seen.outcomes.total()
    assert total == 17 * TIMES
    assert set(seen.finishes) == {reason.value for reason in FinishReason}
    failures = {code: count for code, count in seen.outcomes.items() if code != "ok"}
    assert growth("tercet_request_failure_total", "code") == failures | {"unknown_url": 1}
    assert growth("tercet_request_success_total", "finished_reason") == seen.finishes
    assert growth("tercet_client_requests_total", "client") == {"anonymous": total}
    outcomes = growth("tercet_client_requests_total", "outcome")
    assert outcomes["ok"] == seen.outcomes["ok"]
    assert outcomes["cancelled"] == seen.outcomes["cancelled"] == 2 * TIMES
    assert outcomes["refused"] == sum(
        seen.outcomes[c] for c in ("invalid_request", "model_not_found", "context_too_long")
    )
    for name in ("tercet_generation_tokens_total", "tercet_client_generation_tokens_total"):
        assert growth(name) == {"": seen.tokens}
    for name in ("tercet_prompt_tokens_total", "tercet_client_prompt_tokens_total"):
        assert growth(name) == {"": seen.prompt_tokens}
    assert growth("tercet_prompt_tokens_cached_total") == {"": seen.cached_tokens}
    assert growth("tercet_time_to_first_token_seconds_count") == {"": seen.firsts}
    assert growth("tercet_inter_token_latency_seconds_count") == {"": seen.gaps}
    assert growth("tercet_e2e_request_latency_seconds_count") == {"": seen.finishes.total()}
    assert growth("gen_ai_server_time_to_first_token_seconds_count") == {"": seen.outcomes["ok"]}
    duration = "gen_ai_server_request_duration_seconds_count"
    assert growth(duration, "error_type") == failures | {"": seen.outcomes["ok"]}
    assert growth(duration, "gen_ai_operation_name") == seen.operations


async def test_what_clients_send_makes_no_series_of_its_own():
    """Keys, models, addresses of URLs, methods, headers: none is a label."""
    async with running(Router()) as (_, info), aiohttp.ClientSession(info.http_url) as http:

        async def use(name):
            headers = {"Authorization": f"Bearer {name}", "X-Request-Id": name, "User-Agent": name}
            for body in ({"prompt": "hello"}, {"prompt": "hello", "model": name}, {"prompt": name * 50}, {name: name}):
                async with http.post(COMPLETIONS, json=body | {"user": name}, headers=headers) as answer:
                    await answer.read()
            for method in ("GET", "POST", "DELETE"):
                async with http.request(method, f"/{name}", headers=headers) as answer:
                    await answer.read()

        await use("first")
        before = (await counted(http)).keys()
        for number in range(10):
            await use(f"other-{number}")
        assert (await counted(http)).keys() == before


async def test_tokens_are_booked_under_the_name_of_the_client():
    async with running(Router()) as (gateway, info), aiohttp.ClientSession(info.http_url) as http:
        for label, most in (("one", 3), ("two", 5), ("one", 4)):
            params = SamplingParams(max_tokens=most)
            key = Key(name=label, sha256="0" * 64)
            ask = Ask(f"{label}-{most}", ("hello",), params, 30.0, time.monotonic(), key=key)
            async with gateway._frontend.session(ask) as session, aclosing(session.deltas()) as deltas:
                async for _ in deltas:
                    pass
        after = await counted(http)
    assert grown({}, after, "tercet_client_generation_tokens_total", "client") == {"one": 7, "two": 5}
    assert grown({}, after, "tercet_client_prompt_tokens_total", "client") == {"one": 10, "two": 5}


async def test_openmetrics_for_who_asks_for_it():
    async with running(Router()) as (_, info), aiohttp.ClientSession(info.http_url) as http:
        for accept, media in (("application/openmetrics-text; version=1.0.0", "openmetrics-text"), ("", "plain")):
            async with http.get("/metrics", headers={"Accept": accept}) as answer:
                assert answer.content_type.endswith(media)
                assert (await answer.text()).endswith("# EOF\n") == (media == "openmetrics-text")
