"""Bodies that are wrong, each with the answer that names what is wrong."""

import json

import pytest

from tercet.errors import InvalidRequest
from tercet.roles.gateway.openai_request import parse_chat, parse_completion

HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def chat(**fields):
    return parse_chat(json.dumps(HELLO | fields).encode(), None, 300)


def completion(**fields):
    return parse_completion(json.dumps({"prompt": "hello"} | fields).encode(), None, 300)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"temperature": "hot"}, "temperature: .*'hot'"),
        ({"max_tokens": 1.5}, "max_tokens: .*1.5"),
        ({"n": True}, "n: .*True"),
        ({"stop": [1]}, "stop"),
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias is not supported"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs"),
        ({"messages": []}, "messages must not be empty"),
        ({"messages": [{"role": "king", "content": "x"}]}, r"messages\[0\].role .*'king'"),
        ({"messages": [{"role": "user", "content": 5}]}, r"messages\[0\].content must be a text"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "lone .*surrogate"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "x"}}]}]},
            "must be a text or an image part, got 'input_audio'",
        ),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}, r"tool_calls\[0\] must be an object"),
        ({"timeout": 0}, "timeout must be above 0"),
        ({"timeout": 301}, "at most 300 seconds, got 301"),
    ],
)
def test_wrong_chat_bodies_are_refused_by_name(fields, says):
    with pytest.raises(InvalidRequest, match=says):
        chat(**fields)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"suffix": "x"}, "suffix is not supported"),
        ({"best_of": 2}, "best_of is not supported"),
        ({"prompt": 5}, "prompt must be a text or a list of token ids, got int"),
        ({"prompt": [1, "a"]}, r"prompt\[1\] must be a token id, got 'a'"),
        ({"prompt": [1, True]}, r"prompt\[1\] must be a token id, got True"),
        ({"prompt": [[1], [2.5]]}, r"prompt\[1\]\[0\] must be a token id, got 2.5"),
    ],
)
def test_wrong_completion_bodies_are_refused_by_name(fields, says):
    with pytest.raises(InvalidRequest, match=says):
        completion(**fields)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "not valid JSON"),
        (b"[" * 60_000, "not valid JSON"),
        (b"[" * 100_000, "more than 65536 JSON lists"),
        (b"[]", "must be a JSON object, got list"),
        (b'{"prompt": "\xff"}', r"not valid UTF-8 \(byte 12\)"),
        (b"{}", "prompt: Field required"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_bodies_that_are_no_json_object(body, says):
    with pytest.raises(InvalidRequest, match=says):
        parse_completion(body, None, 300)


def test_neutral_harmless_and_null_parameters_are_accepted():
    parsed = chat(
        tools=[], response_format={"type": "text"}, user="me", metadata={}, seed=None, stop=None, logit_bias={}
    )
    assert parsed.ask.stop == ()
    assert parsed.ask.params.seed is None


def test_prompts_come_in_four_forms():
    forms = ("a", ["a", "b"], [1, 2], [[1], [2]])
    assert [completion(prompt=p).ask.prompts for p in forms] == [("a",), ("a", "b"), ((1, 2),), ((1,), (2,))]


def test_the_timeout_is_the_bodys_then_the_headers_then_the_limit():
    body = json.dumps({"prompt": "x"}).encode()
    assert parse_completion(json.dumps({"prompt": "x", "timeout": 2}).encode(), "7", 300).ask.timeout_s == 2
    assert parse_completion(body, "7", 300).ask.timeout_s == 7
    assert parse_completion(body, None, 300).ask.timeout_s == 300
    for wrong in ("soon", "nan", "-1"):
        with pytest.raises(InvalidRequest, match=r"[Tt]imeout"):
            parse_completion(body, wrong, 300)


def test_text_parts_are_joined_and_max_completion_tokens_wins():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    parsed = chat(messages=[{"role": "user", "content": parts}], max_tokens=3, max_completion_tokens=4, top_k=-1)
    assert parsed.ask.prompts[0].messages[0]["content"] == "a\nb"
    assert parsed.ask.params.max_tokens == 4
    assert parsed.ask.params.top_k == 0
