"""OpenAI bodies to Ask. What would change the result and is not built is refused by name, never ignored.

Messages of errors begin with the parameter's name, so that the answer's `param` can be read off them.
"""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tercet.core import SamplingParams
from tercet.errors import InvalidRequest
from tercet.roles.gateway.ask import Ask, Chat, Prompt

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
HARMLESS = frozenset(  # say nothing about the tokens
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
    | {"parallel_tool_calls"}
)
NEUTRAL: Mapping[str, Any] = {  # not built; these values ask for nothing
    "tools": [],
    "tool_choice": "none",
    "functions": [],
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "logit_bias": {},
    "best_of": 1,
    "suffix": "",
    "echo": False,
    "min_tokens": 0,
    "use_beam_search": False,
    "skip_special_tokens": True,
    "include_stop_str_in_output": False,
    "continue_final_message": False,
    "chat_template_kwargs": {},
}


@dataclass(frozen=True)
class Options:
    """How the answer is to look."""

    stream: bool
    include_usage: bool
    logprobs: bool
    return_token_ids: bool


class _StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)
    include_usage: bool = False


class _Common(BaseModel):
    """What both endpoints take. Ranges are SamplingParams' to check, null means not given."""

    model_config = ConfigDict(strict=True)
    model: str | None = None
    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: str | list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    return_token_ids: bool = False
    timeout: float | None = None


class _ChatBody(_Common):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    add_generation_prompt: bool = True


class _CompletionBody(_Common):
    prompt: Any
    max_tokens: int | None = 16  # as in the OpenAI API
    logprobs: int | None = None


@dataclass(frozen=True)
class Parsed:
    ask: Ask
    options: Options
    model: str | None  # as the client named it


def parse_chat(body: bytes, timeout_header: str | None, limit_s: float) -> Parsed:
    """Raises InvalidRequest naming what is wrong."""
    arrived = time.monotonic()
    b = _validated(_ChatBody, body)
    if b.top_logprobs is not None and not b.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true")
    if not b.messages:
        raise InvalidRequest("messages must not be empty")
    chat = Chat(tuple(_message(i, m) for i, m in enumerate(b.messages)), b.add_generation_prompt)
    max_tokens = b.max_tokens if b.max_completion_tokens is None else b.max_completion_tokens
    logprobs = (b.top_logprobs or 0) if b.logprobs else None
    return _parsed(b, (chat,), max_tokens, logprobs, ("chatcmpl", arrived, _timeout(b, timeout_header, limit_s)))


def parse_completion(body: bytes, timeout_header: str | None, limit_s: float) -> Parsed:
    """Raises InvalidRequest naming what is wrong."""
    arrived = time.monotonic()
    b = _validated(_CompletionBody, body)
    timeout_s = _timeout(b, timeout_header, limit_s)
    return _parsed(b, _prompts(b.prompt), b.max_tokens, b.logprobs, ("cmpl", arrived, timeout_s))


def _parsed(
    b: _Common,
    prompts: tuple[Prompt, ...],
    max_tokens: int | None,
    logprobs: int | None,
    origin: tuple[str, float, float],
) -> Parsed:
    prefix, arrived, timeout_s = origin
    params = SamplingParams(
        max_tokens=1 if max_tokens is None else max_tokens,
        temperature=b.temperature,
        top_k=0 if b.top_k == -1 else b.top_k,  # vLLM's other way to say off
        top_p=b.top_p,
        min_p=b.min_p,
        repetition_penalty=b.repetition_penalty,
        presence_penalty=b.presence_penalty,
        frequency_penalty=b.frequency_penalty,
        seed=b.seed,
        stop_token_ids=tuple(b.stop_token_ids),
        ignore_eos=b.ignore_eos,
        logprobs=logprobs,
    )
    ask = Ask(
        request_id=f"{prefix}-{uuid.uuid4().hex}",
        prompts=prompts,
        params=params,
        timeout_s=timeout_s,
        arrived=arrived,
        max_tokens_given=max_tokens is not None,
        n=b.n,
        stop=(b.stop,) if isinstance(b.stop, str) else tuple(b.stop),
    )
    options = Options(b.stream, b.stream_options.include_usage, logprobs is not None, b.return_token_ids)
    return Parsed(ask, options, b.model)


_Body = TypeVar("_Body", bound=_Common)


def _validated(kind: type[_Body], body: bytes) -> _Body:
    given = {name: value for name, value in _json_object(body).items() if value is not None}
    for name in sorted(given.keys() - kind.model_fields.keys() - HARMLESS):
        if name not in NEUTRAL or given[name] != NEUTRAL[name]:
            raise InvalidRequest(f"{name} is not supported here; leave it out")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        got = "" if first["type"] == "missing" else f", got {first['input']!r:.60}"
        raise InvalidRequest(f"{where}: {first['msg']}{got}") from error


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not valid UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, got {type(value).__name__}")
    return value


def _timeout(b: _Common, header: str | None, limit_s: float) -> float:
    """Seconds from the body's `timeout`, else from the header X-Request-Timeout, else the limit."""
    if b.timeout is None and header is None:
        return limit_s
    try:
        seconds = b.timeout if b.timeout is not None else float(header or "")
    except ValueError as error:
        raise InvalidRequest(f"X-Request-Timeout must be a number of seconds, got {header!r:.60}") from error
    if not math.isfinite(seconds) or not 0 < seconds <= limit_s:
        raise InvalidRequest(f"timeout must be above 0 and at most {limit_s:g} seconds, got {seconds:g}")
    return seconds


def _prompts(prompt: Any) -> tuple[Prompt, ...]:
    """A text, a list of texts, a list of token ids, or a list of such lists."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        return tuple(_prompt(p, f"prompt[{i}]") for i, p in enumerate(prompt))
    return (_prompt(prompt, "prompt"),)


def _prompt(prompt: Any, where: str) -> Prompt:
    if isinstance(prompt, str):
        return _text(prompt, where)
    if isinstance(prompt, list):
        for i, token_id in enumerate(prompt):
            if type(token_id) is not int:
                raise InvalidRequest(f"{where}[{i}] must be a token id, got {token_id!r:.60}")
        return tuple(prompt)
    raise InvalidRequest(f"{where} must be a text or a list of token ids, got {type(prompt).__name__}")


def _text(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise InvalidRequest(f"{where} is not valid Unicode (lone surrogate at {error.start})") from error
    return text


def _message(i: int, message: dict[str, Any]) -> Mapping[str, Any]:
    where = f"messages[{i}]"
    if message.get("role") not in ROLES:
        raise InvalidRequest(f"{where}.role must be one of {', '.join(sorted(ROLES))}, got {message.get('role')!r:.60}")
    for name in message.keys() - {"role", "content", "name", "refusal"}:
        if message[name]:
            raise InvalidRequest(f"{where}.{name} is not supported here; leave it out")
    return {"role": message["role"], "content": _content(message.get("content"), f"{where}.content")}


def _content(content: Any, where: str) -> str:
    """A text, or a list of text parts, which are joined by newlines as in vLLM."""
    if isinstance(content, str):
        return _text(content, where)
    if not isinstance(content, list):
        raise InvalidRequest(f"{where} must be a text or a list of text parts, got {type(content).__name__}")
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise InvalidRequest(f"{where}[{i}] must be a text part, got {kind!r:.60}")
        texts.append(_text(part["text"], f"{where}[{i}].text"))
    return "\n".join(texts)


PARAMETERS = frozenset(_ChatBody.model_fields) | frozenset(_CompletionBody.model_fields) | frozenset(NEUTRAL)
