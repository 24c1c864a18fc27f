"""What clients ordinarily send is taken: replayed history, editors' limits, harnesses' probes, browsers' preflights."""

import json
import socket

import aiohttp
import openai
import pytest

from tercet.cluster.spec_file import load_spec
from tercet.core import PromptLogprobs
from tercet.errors import ClusterError
from tercet.roles.gateway.gateway import Gateway
from tercet.roles.gateway.openai_request import parse_chat
from tests.fakes.gateway import running, spec
from tests.fakes.router import FakeRouter
from tests.fakes.tokenizer import CONTEXT, EOS, MODEL, ByteTokenizer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "hi"}


@pytest.fixture
async def router():
    return FakeRouter()


@pytest.fixture
async def gateway(router):
    async with running(router) as (_, info):
        yield info


@pytest.fixture
async def http(gateway):
    async with aiohttp.ClientSession(gateway.http_url) as http:
        yield http


@pytest.fixture
async def client(gateway):
    async with openai.AsyncOpenAI(base_url=f"{gateway.http_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def messages_of(*messages):
    return parse_chat(json.dumps({"messages": list(messages)}).encode(), None, 300).ask.prompts[0].messages


CALL = {"id": "call_1", "type": "function", "index": 0, "function": {"name": "f", "arguments": '{"a": [1]}'}}


@pytest.mark.parametrize(
    ("message", "kept"),
    [
        ({"content": None}, {"content": ""}),
        ({}, {"content": ""}),
        ({"content": []}, {"content": ""}),
        ({"content": "x", "refusal": None, "audio": None, "function_call": None, "annotations": []}, {"content": "x"}),
        ({"content": "x", "foo": {"bar": [1]}, "tool_calls": None, "name": None}, {"content": "x"}),
        ({"content": "x", "reasoning_content": "hm"}, {"content": "x", "reasoning_content": "hm"}),
        ({"content": "x", "reasoning_content": None}, {"content": "x"}),
        ({"content": "x", "reasoning_content": [{"type": "text"}]}, {"content": "x"}),
        ({"content": ["a", {"type": "text", "text": "b", "cache_control": {}}]}, {"content": "a\nb"}),
        ({"content": [{"type": "refusal", "refusal": "no"}]}, {"content": "no"}),
        ({"content": [{"type": "output_text", "text": "a"}]}, {"content": "a"}),
        ({"content": "x", "tool_calls": []}, {"content": "x"}),
        ({"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}]}, {"content": "a"}),
        ({"content": [{"type": "reasoning", "text": "hm"}]}, {"content": ""}),
        (
            {"function_call": {"name": "f", "arguments": "{}"}},
            {"content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]},
        ),
        (
            {"tool_calls": [{"id": "x" * 5000, "type": "custom", "custom": {"name": "f", "input": "text"}}]},
            {
                "content": "",
                "tool_calls": [
                    {"type": "function", "id": "x" * 5000, "function": {"name": "f", "arguments": "text"}},
                ],
            },
        ),
        (
            {"tool_calls": [{"index": 0, "function": {"arguments": '{"a": 1}'}}]},  # a piece of a stream, replayed
            {"content": "", "tool_calls": [{"type": "function", "function": {"name": "", "arguments": {"a": 1}}}]},
        ),
        ({"name": "bot", "content": "x"}, {"name": "bot", "content": "x"}),
        (
            {"tool_calls": [CALL]},
            {
                "content": "",
                "tool_calls": [
                    {"type": "function", "id": "call_1", "function": {"name": "f", "arguments": {"a": [1]}}}
                ],
            },
        ),
    ],
)
async def test_replayed_turns_of_the_assistant(message, kept):
    assert messages_of(USER, {"role": "assistant"} | message, USER)[1] == {"role": "assistant"} | kept


@pytest.mark.parametrize(
    ("arguments", "read"),
    [
        ("", {}),
        (None, {}),
        ("{}", {}),
        ({"a": 1}, {"a": 1}),
        ("no JSON", "no JSON"),
        ("[1]", "[1]"),
        ("[" * 90, "[" * 90),
    ],
)
async def test_arguments_of_a_tool_call_are_read_if_they_can_be(arguments, read):
    call = {"function": {"name": "f", "arguments": arguments}}
    (message,) = messages_of({"role": "assistant", "tool_calls": [call]})
    assert message["tool_calls"][0]["function"]["arguments"] == read


async def test_what_a_tool_has_said():
    message = {"role": "tool", "tool_call_id": "call_1", "name": "f", "content": None}
    assert messages_of(message) == ({"role": "tool", "tool_call_id": "call_1", "name": "f", "content": ""},)


async def test_what_a_function_has_said():
    """As tools were once called."""
    message = {"role": "function", "name": "f", "content": "42"}
    assert messages_of(message) == ({"role": "tool", "name": "f", "content": "42"},)


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": ""},
        {"stop": None},
        {"stop": []},
        {"stop": ["", ""]},
        {"stop": [str(i) * 3 for i in range(16)]},
        {"top_logprobs": 0},
        {"logprobs": False, "top_logprobs": None},
        {"max_tokens": 65535},
        {"max_completion_tokens": 10**9},
        {"max_tokens": None},
        {"stream_options": None},
        {"stream_options": {"include_usage": None, "continuous_usage_stats": False}},
        {"tool_choice": "auto", "tools": [], "parallel_tool_calls": True},
        {"response_format": {"type": "text"}, "modalities": ["text"], "store": False, "user": "me"},
        {"metadata": {"a": "b"}, "service_tier": "auto", "safety_identifier": "x", "logit_bias": {}},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"top_k": 10**9},
        {"echo": False},
        {"max_tokens": 16.0, "n": 1.0, "top_k": 5.0, "seed": 7.0},
        {"n": 2, "best_of": 2},
        {"logit_bias": {"5": 0}},
        {"tool_choice": "none", "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"add_special_tokens": False, "return_tokens_as_token_ids": False},
    ],
    ids=str,
)
async def test_what_asks_for_nothing_unusual_is_taken(http, fields):
    answer = await http.post(CHAT, json={"messages": [USER]} | fields)
    assert answer.status == 200, await answer.text()
    assert "X-Ignored-Parameters" not in answer.headers


@pytest.mark.parametrize(
    "fields",
    [
        {"best_of": 2},
        {"logit_bias": {"5": 1}},
        {"logit_bias": [1]},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tool_choice": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"add_special_tokens": True},
        {"max_tokens": 16.5},
        {"n": "2"},
        {"seed": 2**63},
    ],
    ids=str,
)
async def test_what_would_change_the_answer_is_refused_by_name(http, fields):
    answer = await http.post(CHAT, json={"messages": [USER]} | fields)
    error = (await answer.json())["error"]
    assert (answer.status, error["param"]) == (400, [*fields][-1])


@pytest.mark.parametrize("encoding", ["", "identity", " Identity "])
async def test_an_encoding_that_is_none(http, encoding):
    async with http.post(CHAT, json={"messages": [USER]}, headers={"Content-Encoding": encoding}) as answer:
        assert answer.status == 200


async def test_special_tokens_of_a_plain_prompt_are_the_clients_to_leave_out(http, monkeypatch):
    """A client that renders templates itself has written them already."""
    asked = []
    monkeypatch.setattr(ByteTokenizer, "encode", lambda _, text, add_special=True: asked.append(add_special) or [104])
    for fields in ({}, {"add_special_tokens": True}, {"add_special_tokens": False}):
        assert (await http.post(COMPLETIONS, json={"prompt": "h"} | fields)).status == 200
    assert asked == [True, True, False]


async def test_an_empty_prompt_is_what_the_tokenizer_makes_of_it(http, router, monkeypatch):
    answer = await http.post(COMPLETIONS, json={"prompt": ""})
    assert (answer.status, (await answer.json())["error"]["param"]) == (400, "prompt")
    monkeypatch.setattr(ByteTokenizer, "encode", lambda *_: [1])  # a beginning-of-sequence token
    assert (await http.post(COMPLETIONS, json={"prompt": ""})).status == 200
    assert router.requests[-1].token_ids == (1,)


async def test_what_nobody_knows_is_ignored_and_told(http):
    answer = await http.post(CHAT, json={"messages": [USER], "temprature": 0, "thinking": {}, "é\n": 1})
    assert answer.status == 200
    assert answer.headers["X-Ignored-Parameters"] == "temprature, thinking, %C3%A9%0A"


async def test_template_kwargs_reach_the_template(client, router):
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    await client.chat.completions.create(model="fake-model", messages=[USER], extra_body=extra)
    assert bytes(router.requests[0].token_ids) == b"<enable_thinking=False><u>hi<a>"


async def test_a_chat_gets_what_is_left_of_the_context_and_ends_by_length(client, router):
    answer = await client.chat.completions.create(
        model="fake-model", messages=[USER], max_tokens=65535, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == CONTEXT
    assert router.requests[0].params.max_tokens == CONTEXT - len("<u>hi<a>")


async def test_a_completion_that_asks_for_more_than_is_left_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="max_tokens 65535 and a prompt of 2 tokens exceed"):
        await client.completions.create(model="fake-model", prompt="hi", max_tokens=65535)


# ---- models, browsers, ports


async def test_one_model(client, http):
    assert (await client.models.retrieve("fake-model")).id == "fake-model"
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        await client.models.retrieve("meta/llama")
    assert (await http.get("/v1/models/meta%2Fllama")).status == 404


async def test_a_model_with_slashes_in_its_name(router):
    wanted = spec()
    model = MODEL.__class__("meta/llama 3", MODEL.tokenizer, MODEL.vocab_size, MODEL.max_context)
    gateway = Gateway(wanted, "token", router, model)
    info = await gateway.start()
    try:
        async with aiohttp.ClientSession(info.http_url) as http:
            for path in ("/v1/models/meta/llama%203", "/v1/models/meta%2Fllama%203"):
                assert (await (await http.get(path)).json())["id"] == "meta/llama 3"
    finally:
        await gateway.stop()


PREFLIGHT = {
    "Origin": "https://app.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


@pytest.mark.parametrize(
    ("origins", "allowed"), [([], False), (["https://app.example"], True), (["*"], True), (["https://b"], False)]
)
async def test_cors(router, origins, allowed):
    gateway = Gateway(spec().model_copy(update={"gateway": _with_origins(origins)}), "token", router, MODEL)
    info = await gateway.start()
    origin = {"Origin": PREFLIGHT["Origin"]}
    try:
        async with aiohttp.ClientSession(info.http_url, headers=origin) as http:
            preflight = await http.options(CHAT, headers=PREFLIGHT)
            answers = [
                await http.post(CHAT, json={"messages": [USER]}),
                await http.post(CHAT, json={"messages": [USER], "stream": True}),
                await http.post(CHAT, json={}),
                await http.get("/nope"),
                await http.get("/v1/models"),
            ]
            for answer in answers:
                await answer.read()
                assert (answer.headers.get("Access-Control-Allow-Origin") == origin["Origin"]) == allowed
                assert ("X-Request-Id" in answer.headers.get("Access-Control-Expose-Headers", "")) == allowed
                assert ("Origin" in answer.headers.get("Vary", "")) == bool(origins)
            if allowed:
                assert preflight.status == 204
                assert preflight.headers["Access-Control-Allow-Origin"] == origin["Origin"]
                assert preflight.headers["Access-Control-Allow-Headers"] == "authorization,content-type"
                assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
            else:
                assert "Access-Control-Allow-Origin" not in preflight.headers
            strange = await http.options(CHAT, headers=PREFLIGHT | {"Access-Control-Request-Headers": "\udcff"})
            assert strange.status in (204, 405)
    finally:
        await gateway.stop()


def _with_origins(origins):
    return spec().gateway.model_copy(update={"cors_origins": origins})


def has_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
@pytest.mark.parametrize("name", ["http", "grpc"])
@pytest.mark.parametrize("host", ["::1", "::"])
async def test_ipv6_hosts(router, name, host):
    listen = {which: {"host": host, "port": 0} for which in ("http", "grpc")}
    wanted = spec().model_copy(update={"gateway": spec().gateway.model_validate(listen)})
    gateway = Gateway(wanted, "token", router, MODEL)
    info = await gateway.start()
    try:
        async with aiohttp.ClientSession(info.http_url) as http:
            assert (await http.get("/health")).status == 200
        assert info.grpc_address.startswith(f"[{host}]:")
        taken = int((info.http_url if name == "http" else info.grpc_address).rpartition(":")[2])
        listen[name]["port"] = taken
        other = spec().model_copy(update={"gateway": spec().gateway.model_validate(listen)})
        with pytest.raises(ClusterError, match=f"port {taken} on {host} is in use; free it or set gateway.{name}.port"):
            await Gateway(other, "token", FakeRouter(), MODEL).start()
    finally:
        await gateway.stop()


@pytest.mark.parametrize("name", ["http", "grpc"])
async def test_a_host_that_is_none_is_named(router, name):
    wanted = spec().model_copy(
        update={
            "gateway": spec().gateway.model_validate(
                {"http": {"port": 0}, "grpc": {"port": 0}, name: {"host": "no.such.host.invalid", "port": 0}}
            )
        }
    )
    with pytest.raises(ClusterError, match=rf"no\.such\.host\.invalid is no address .+; set gateway\.{name}\.host"):
        await Gateway(wanted, "token", router, MODEL).start()


@pytest.mark.parametrize(
    ("setting", "where"),
    [("gateway.http.host=0.0.0.0", ("0.0.0.0", 8000, 50051)), ("gateway.grpc.host=::1", ("127.0.0.1", 8000, 50051))],
)
def test_a_host_may_be_set_alone(tmp_path, setting, where):
    path = tmp_path / "spec.yaml"
    path.write_text("roles: {prefill: {}, decode: {}}\n")
    gateway = load_spec(path, [setting]).gateway
    assert (gateway.http.host, gateway.http.port, gateway.grpc.port) == where


async def test_bodies_may_be_bounded_beyond_2_gib(router):
    """What counts bytes has no 32 bits."""
    async with running(router, max_body_bytes=3 << 30) as (gateway, info), aiohttp.ClientSession(info.http_url) as http:
        assert (await http.post(CHAT, json={"messages": [USER]})).status == 200
        assert gateway._bodies.limits.max_held_bytes == 3 << 30


# ---- completions that tell of the prompt


def harness(prompt, **fields):
    """What lm-evaluation-harness asks of a completions endpoint for a log-likelihood."""
    return (
        {"model": "fake-model", "prompt": prompt, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234}
        | {"echo": True}
        | fields
    )


def score(choice, length):
    """Its reading of the answer: (log-likelihood, whether greedy), the context having `length` tokens."""
    logprobs = choice["logprobs"]
    ours, tops = logprobs["token_logprobs"][length:-1], logprobs["top_logprobs"][length:-1]
    return sum(ours), all(one == max(top.values()) for one, top in zip(ours, tops, strict=True))


async def test_what_the_evaluation_harness_asks(http, router):
    prompts = [list(b"abcd"), list(b"xy")]
    answer = await (await http.post(COMPLETIONS, json=harness(prompts))).json()
    for choice, prompt in zip(answer["choices"], prompts, strict=True):
        logprobs = choice["logprobs"]
        assert choice["text"] == bytes(prompt).decode() + "T"
        assert logprobs["tokens"] == [*bytes(prompt).decode(), "T"]
        assert logprobs["token_logprobs"] == [None, *[-0.5] * len(prompt)]
        assert logprobs["top_logprobs"][0] is None
        assert logprobs["text_offset"] == list(range(len(prompt) + 1))
        assert score(choice, 1) == (-0.5 * (len(prompt) - 1), True)
    assert {r.params.prompt_logprobs for r in router.requests} == {1}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["Zürich", list("Zürich".encode())])
async def test_the_prompt_alone(client, prompt, stream):
    asked = {"model": "fake-model", "prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 2, "stream": stream}
    if stream:
        asked["stream_options"] = {"include_usage": True}
    answer = await client.completions.create(**asked)
    chunks = [chunk async for chunk in answer] if stream else [answer]
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.text for choice in choices) == "Zürich"
    assert choices[-1].finish_reason == "length"
    logprobs = choices[0].logprobs
    assert logprobs.token_logprobs == [None, *[-0.5] * 6]
    assert logprobs.text_offset == [0, 1, 1, 2, 3, 4, 5]
    assert all(len(top) >= 1 for top in logprobs.top_logprobs[1:])
    assert sum(len(choice.logprobs.tokens) for choice in choices) == 7
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (7, 0)


async def test_offsets_are_of_the_text_that_is_told(client, monkeypatch):
    """A special token counts where it stands in the prompt's text, and not where the tokenizer has put it before."""
    monkeypatch.setattr(ByteTokenizer, "encode", lambda *_: [257, EOS, *b"hi"])
    monkeypatch.setattr(
        ByteTokenizer, "token_bytes", lambda _, i: b"<eos>" if i == EOS else b"<bos>" if i > EOS else bytes([i])
    )
    asked = {"model": "fake-model", "prompt": "<eos>hi", "max_tokens": 1, "echo": True, "logprobs": 1}
    answer = await client.completions.create(**asked)
    assert answer.choices[0].text == "<eos>hiT"
    assert answer.choices[0].logprobs.text_offset == [0, 0, 5, 6, 7]


async def test_no_tokens_and_no_prompt_is_an_empty_answer(client):
    answer = await client.completions.create(model="fake-model", prompt="hi", max_tokens=0)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "length")
    assert answer.usage.completion_tokens == 0


async def test_echo_without_logprobs_asks_the_workers_nothing_more(client, router):
    answer = await client.completions.create(model="fake-model", prompt=["ab", "cd"], n=2, echo=True, max_tokens=3)
    assert [choice.text for choice in answer.choices] == ["abThe", "abThe", "cdThe", "cdThe"]
    assert {r.params.prompt_logprobs for r in router.requests} == {None}
    stream = await client.completions.create(
        model="fake-model", prompt=["ab", "cd"], echo=True, max_tokens=3, stream=True
    )
    texts = ["", ""]
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == ["abThe", "cdThe"]


async def test_of_tokens_with_the_same_text_the_likeliest_counts(client, router):
    """Two halves of a character have the same text alone."""
    likely = ((200, -0.1), (201, -3.0))

    async def generate(request):
        yield PromptLogprobs(((-0.1, likely),))
        async for event in original(request):
            if not isinstance(event, PromptLogprobs):
                yield event

    original, router.generate = router.generate, generate
    asked = {"model": "fake-model", "prompt": [200, 200], "max_tokens": 0, "echo": True, "logprobs": 2}
    answer = await client.completions.create(**asked)
    assert answer.choices[0].logprobs.top_logprobs[1] == {"\ufffd": -0.1}


async def test_logprobs_of_the_prompt_that_never_come_are_a_named_failure(http, router):
    async def generate(request):
        async for event in original(request):
            if not isinstance(event, PromptLogprobs):
                yield event

    original, router.generate = router.generate, generate
    answer = await http.post(COMPLETIONS, json=harness("abc"))
    assert answer.status == 502
    assert "the prompt's logprobs are missing" in (await answer.json())["error"]["message"]


async def test_an_answer_too_large_to_be_held_is_refused_by_name(http, monkeypatch):
    monkeypatch.setattr("tercet.roles.gateway.http_generation.MOST_HELD", 100)
    body = {"prompt": "x", "ignore_eos": True, "logprobs": 5, "max_tokens": 50}
    answer = await http.post(COMPLETIONS, json=body)
    assert answer.status == 400
    assert "use stream: true" in (await answer.json())["error"]["message"]
    async with http.post(COMPLETIONS, json=body | {"stream": True}) as answer:
        assert (await answer.text()).endswith("[DONE]\n\n")
