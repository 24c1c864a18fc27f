"""OpenAI bodies to Ask. Parameters that would change the result and are not implemented are refused by name; an
unknown one is ignored, as in vLLM, and reported to the client.

Messages of errors begin with the parameter's name, so that the answer's `param` can be read off them.
"""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from tercet.core import MOST_LOGPROBS, SamplingParams, TraceContext
from tercet.errors import InvalidRequest
from tercet.roles.gateway.ask import Ask, Chat, Prompt
from tercet.roles.gateway.bounds import KWARGS_CHARS, NAME_CHARS, bound, bound_depth, bound_fields
from tercet.roles.gateway.clients import Caller
from tercet.roles.gateway.json_body import json_object
from tercet.roles.gateway.openai_messages import messages_of, shown, text_of

_Neutral = Mapping[str, tuple[Any, ...]]  # parameter -> values that ask for nothing
NEUTRAL: _Neutral = {  # not built; these values, and null, ask for nothing
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": ([],),
    "guided_grammar": ("",),
    "guided_json": (),
    "guided_regex": ("",),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "web_search_options": (),
}
HARMLESS = frozenset(  # have no effect on the tokens
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
    | {"parallel_tool_calls"}
)
NEUTRAL_IN: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {  # likewise, but told from the whole body
    "best_of": lambda body: body["best_of"] == body.get("n", 1),
    "logit_bias": lambda body: isinstance(body["logit_bias"], dict) and not any(body["logit_bias"].values()),
    "tools": lambda body: not body["tools"] or body.get("tool_choice") == "none",
}
TEMPLATE_OWN = ("messages", "add_generation_prompt", "tools", "documents")  # not for chat_template_kwargs


@dataclass(frozen=True)
class Origin:
    """Who asks, when, and the id of the answer."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    caller: Caller = field(default_factory=partial(Caller, ""))
    trace: TraceContext | None = None
    arrived: float = field(default_factory=time.monotonic)  # when the request's bytes were read


@dataclass(frozen=True)
class Options:
    """How the answer is to look."""

    stream: bool
    include_usage: bool
    logprobs: bool
    return_token_ids: bool


class _StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)
    include_usage: bool | None = None


# Some clients write every number as a float.
_Int = Annotated[int, BeforeValidator(lambda n: int(n) if isinstance(n, float) and n.is_integer() else n)]


class _Common(BaseModel):
    """What both endpoints take. Ranges are SamplingParams' to check, null means not given."""

    model_config = ConfigDict(strict=True)
    model: str | None = None
    max_tokens: _Int | None = None
    temperature: float = 1.0
    top_k: _Int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: _Int | None = None
    n: _Int = 1
    stop: str | list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    return_token_ids: bool = False
    timeout: float | None = None


class _ChatBody(_Common):
    messages: list[Any]
    max_completion_tokens: _Int | None = None
    logprobs: bool = False
    top_logprobs: _Int = 0
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = {}


class _CompletionBody(_Common):
    prompt: Any
    max_tokens: _Int | None = 16  # as in the OpenAI API
    logprobs: _Int | None = None
    echo: bool = False
    add_special_tokens: bool = True  # vLLM's: a client may have put them into the text itself


@dataclass(frozen=True)
class Parsed:
    ask: Ask
    options: Options
    model: str | None  # as the client named it
    ignored: tuple[str, ...] = ()  # unknown parameters


def parse_chat(body: bytes, timeout_header: str | None, limit_s: float, origin: Origin | None = None) -> Parsed:
    """Raises InvalidRequest naming what is wrong."""
    b, ignored = _validated(_ChatBody, body, {"echo": (False,), "add_special_tokens": (False,)})
    if b.top_logprobs and not b.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true")
    if not 0 <= b.top_logprobs <= MOST_LOGPROBS:
        raise InvalidRequest(f"top_logprobs must be from 0 to {MOST_LOGPROBS}, got {b.top_logprobs}")
    messages, images = messages_of(b.messages)
    chat = Chat(messages, b.add_generation_prompt, _template_kwargs(b.chat_template_kwargs), images)
    max_tokens = b.max_tokens if b.max_completion_tokens is None else b.max_completion_tokens
    params = _params(b, max_tokens, b.top_logprobs if b.logprobs else None)
    ask = _ask(b, "chatcmpl", (chat,), params, _timeout(b, timeout_header, limit_s), origin or Origin())
    return Parsed(replace(ask, max_tokens_given=max_tokens is not None), _options(b, b.logprobs), b.model, ignored)


def parse_completion(body: bytes, timeout_header: str | None, limit_s: float, origin: Origin | None = None) -> Parsed:
    """Raises InvalidRequest naming what is wrong."""
    b, ignored = _validated(_CompletionBody, body, {})
    prompt_only = b.max_tokens == 0
    params = _params(b, 1 if prompt_only else b.max_tokens, b.logprobs)
    params = replace(params, prompt_logprobs=b.logprobs if b.echo else None)
    prompts = _prompts(b.prompt)
    ask = _ask(b, "cmpl", prompts, params, _timeout(b, timeout_header, limit_s), origin or Origin())
    ask = replace(ask, add_special=b.add_special_tokens, echo=b.echo, prompt_only=prompt_only)
    return Parsed(ask, _options(b, b.logprobs is not None), b.model, ignored)


def _params(b: _Common, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
    given = {name: getattr(b, name) for name in SamplingParams.__dataclass_fields__ if hasattr(b, name)}
    return SamplingParams(
        **given
        | {
            "max_tokens": 1 if max_tokens is None else max_tokens,
            "top_k": 0 if b.top_k == -1 else b.top_k,  # vLLM's other way to say off
            "stop_token_ids": tuple(b.stop_token_ids),
            "logprobs": logprobs,
        }
    )


def _ask(
    b: _Common, kind: str, prompts: tuple[Prompt, ...], params: SamplingParams, timeout_s: float, origin: Origin
) -> Ask:
    return Ask(
        request_id=f"{kind}-{origin.id}",
        prompts=prompts,
        params=params,
        timeout_s=timeout_s,
        arrived=origin.arrived,
        client=origin.caller.client,
        key=origin.caller.key,
        trace=origin.trace,
        n=b.n,
        stop=(b.stop,) if isinstance(b.stop, str) else tuple(b.stop),
    )


def _options(b: _Common, logprobs: bool) -> Options:
    return Options(b.stream, bool(b.stream_options.include_usage), logprobs, b.return_token_ids)


_Body = TypeVar("_Body", bound=_Common)


def _validated(kind: type[_Body], body: bytes, elsewhere: _Neutral) -> tuple[_Body, tuple[str, ...]]:
    """-> the body, and the unknown names in it. `elsewhere`: what only the other endpoint has built."""
    given = {name: value for name, value in json_object(body).items() if value is not None}
    bound_fields(given)
    unbuilt = {**NEUTRAL, **elsewhere}
    for name in sorted(given.keys() & (unbuilt.keys() | NEUTRAL_IN.keys())):
        if not (NEUTRAL_IN[name](given) if name in NEUTRAL_IN else given[name] in unbuilt[name]):
            raise InvalidRequest(f"{name} is not supported here; leave it out")
    try:
        known = kind.model_validate(given)
    except ValidationError as error:
        raise InvalidRequest(_explain(error)) from error
    if known.model and len(known.model) > NAME_CHARS:
        raise InvalidRequest(f"model must have at most {NAME_CHARS} characters, got {len(known.model)}")
    known_names = unbuilt.keys() | NEUTRAL_IN.keys() | kind.model_fields.keys() | HARMLESS
    return known, tuple(sorted(given.keys() - known_names))


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    got = "" if first["type"] == "missing" else f", got {shown(first['input'])}"
    return f"{where}: {first['msg']}{got}"


def _timeout(b: _Common, header: str | None, limit_s: float) -> float:
    """Seconds from the body's `timeout`, else from the header X-Request-Timeout, else the limit."""
    if b.timeout is None and header is None:
        return limit_s
    try:
        seconds = b.timeout if b.timeout is not None else float(header or "")
    except ValueError as error:
        raise InvalidRequest(f"X-Request-Timeout must be a number of seconds, got {shown(header)}") from error
    if not math.isfinite(seconds) or not 0 < seconds <= limit_s:
        raise InvalidRequest(f"timeout must be above 0 and at most {limit_s:g} seconds, got {seconds:g}")
    return seconds


def _template_kwargs(kwargs: dict[str, Any]) -> Mapping[str, Any]:
    """Raises InvalidRequest if they are too large, or if one would replace a field of the request."""
    bound_depth(kwargs, "chat_template_kwargs")
    if taken := kwargs.keys() & TEMPLATE_OWN:
        raise InvalidRequest(f"chat_template_kwargs.{min(taken)} cannot be given here")
    size = len(text_of(json.dumps(kwargs, ensure_ascii=False), "chat_template_kwargs"))
    if size > KWARGS_CHARS:
        raise InvalidRequest(f"chat_template_kwargs take at most {KWARGS_CHARS} characters, got {size}")
    return kwargs


def _prompts(prompt: Any) -> tuple[Prompt, ...]:
    """A text, a list of texts, a list of token ids, or a list of such lists."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        return tuple(_prompt(p, f"prompt[{i}]") for i, p in enumerate(prompt))
    return (_prompt(prompt, "prompt"),)


def _prompt(prompt: Any, where: str) -> Prompt:
    if isinstance(prompt, str):
        return text_of(prompt, where)
    if not isinstance(prompt, list):
        raise InvalidRequest(f"{where} must be a text or a list of token ids, got {type(prompt).__name__}")
    bound("prompt[]", prompt, where)
    if not set(map(type, prompt)) <= {int}:
        i = next(i for i, token_id in enumerate(prompt) if type(token_id) is not int)
        raise InvalidRequest(f"{where}[{i}] must be a token id, got {shown(prompt[i])}")
    return tuple(prompt)


PARAMETERS = HARMLESS.union(_ChatBody.model_fields, _CompletionBody.model_fields, NEUTRAL, NEUTRAL_IN)
