"""Deltas to the OpenAI shapes, with vLLM's `token_ids` and our `timings` beside `usage`.

stream:  chunk(delta) ... chunk(last delta of all) = finish, usage if asked for, timings, [DONE]
else:    body(all deltas)
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from tercet.core import TopLogprobs
from tercet.errors import TercetError, UserError
from tercet.metrics import CHAT, TEXT_COMPLETION
from tercet.roles.gateway.ask import Delta, GatewayTokenizer, Usage
from tercet.roles.gateway.choice import Choice
from tercet.roles.gateway.openai_request import Options
from tercet.roles.gateway.session import Session

DONE = b"data: [DONE]\n\n"
SLOT = "\0"  # placeholder for the text; no model name contains it
LOWEST_LOGPROB = -9999.0  # JSON has no minus infinity; OpenAI and vLLM write this too

_Entry = tuple[int, float | None, TopLogprobs, int]  # token id, its logprob, the likeliest in its place, text offset

_json = json.JSONEncoder(separators=(",", ":")).encode  # ASCII only, so a half character cannot break it


class Reply(ABC):
    """The answer to one request."""

    object_name: str
    chunk_name: str
    operation: str  # as OpenTelemetry calls it

    def __init__(self, session: Session, model: str, tokenizer: GatewayTokenizer, options: Options) -> None:
        self._session = session
        self._tokenizer = tokenizer
        self._options = options
        self._head = {"id": session.ask.request_id, "created": int(time.time()), "model": model}
        self._frames: dict[int, tuple[str, str]] = {}  # choice that has sent a chunk -> JSON around its next text
        self._varied = options.logprobs or options.return_token_ids  # chunks differ in more than their text
        self._unfinished = len(session.choices)

    @property
    def repeats_prompt(self) -> bool:
        """Whether the first chunk of a choice, or its body, tells something of the prompt."""
        return self._options.return_token_ids or self._session.ask.echo

    def weight(self, index: int) -> int:
        """Tokens and logprobs of the prompt that the choice's next chunk, or its body, begins with."""
        if index in self._frames or not self.repeats_prompt:
            return 0
        return len(self._prompt_ids(index)) * (2 if self._session.choices[index].prompt is not None else 1)

    def chunk(self, delta: Delta) -> bytes:
        """The server-sent events of one delta."""
        frame = self._frames.get(delta.index)
        if frame and delta.finish_reason is None and not self._varied:
            return f"{frame[0]}{_json(delta.text)}{frame[1]}".encode()
        chunk = self._chunk(delta)
        if frame is None:
            self._add_prompt_ids(chunk)
            self._frames[delta.index] = self._frame(delta.index)
        self._unfinished -= delta.finish_reason is not None
        return _event(chunk) if self._unfinished else self._last(chunk)

    def _chunk(self, delta: Delta) -> dict[str, Any]:
        choice = self._chunk_choice(delta) | self._ending(delta.index, [delta])
        return {**self._head, "object": self.chunk_name, "choices": [choice]}

    def _frame(self, index: int) -> tuple[str, str]:
        """The JSON before and after the text in an ordinary chunk, which is the same for every token."""
        self._frames[index] = ("", "")  # the choice has begun: what only a first chunk has stays out
        before, _, after = _event(self._chunk(Delta(index, SLOT, (), 0.0))).decode().partition(_json(SLOT))
        return before, after

    def _last(self, chunk: dict[str, Any]) -> bytes:
        """The final chunks; timings are in the last one."""
        timings = {"timings": self._session.timings.flat()}
        if not self._options.include_usage:
            return _event(chunk | timings) + DONE
        last = {**self._head, "object": self.chunk_name, "choices": [], "usage": _usage(self._session.usage)}
        return _event(chunk) + _event(last | timings) + DONE

    def body(self, deltas: Sequence[Delta]) -> bytes:
        """The whole answer, from all deltas of all choices."""
        by_choice: list[list[Delta]] = [[] for _ in self._session.choices]
        for delta in deltas:
            by_choice[delta.index].append(delta)
        body: dict[str, Any] = {
            **self._head,
            "object": self.object_name,
            "choices": [self._body_choice(i, ds) | self._ending(i, ds) for i, ds in enumerate(by_choice)],
            "usage": _usage(self._session.usage),
            "timings": self._session.timings.flat(),
        }
        self._add_prompt_ids(body)
        # Choice by choice, so that the interpreter lets others run between them.
        choices = ",".join([_json(choice) for choice in body.pop("choices")])
        return f'{_json(body)[:-1]},"choices":[{choices}]}}'.encode()

    def _ending(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        """Fields that a choice has in both endpoints, in chunks and bodies."""
        tokens = [token for delta in deltas for token in delta.tokens]
        fields: dict[str, Any] = {
            "logprobs": self._logprobs(index, deltas) if self._options.logprobs else None,
            "finish_reason": deltas[-1].finish_reason,
        }
        if self._options.return_token_ids:
            fields["token_ids"] = [token.token_id for token in tokens]
        return fields

    def _prompt_ids(self, index: int) -> tuple[int, ...]:
        return self._session.choices[index].request.token_ids

    @abstractmethod
    def _chunk_choice(self, delta: Delta) -> dict[str, Any]: ...

    @abstractmethod
    def _body_choice(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]: ...

    @abstractmethod
    def _logprobs(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]: ...

    @abstractmethod
    def _add_prompt_ids(self, answer: dict[str, Any]) -> None:
        """Put `prompt_token_ids` where vLLM has it, if asked for."""


class ChatReply(Reply):
    operation = CHAT
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def _chunk_choice(self, delta: Delta) -> dict[str, Any]:
        content = {"content": delta.text}
        if delta.index not in self._frames:
            content = {"role": "assistant", **content}
        return {"index": delta.index, "delta": content}

    def _body_choice(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        text = "".join(delta.text for delta in deltas)
        return {"index": index, "message": {"role": "assistant", "content": text, "refusal": None}}

    def _logprobs(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        content = [
            self._logprob(token.token_id, token.logprob)
            | {"top_logprobs": [self._logprob(*top) for top in token.top_logprobs]}
            for delta in deltas
            for token in delta.tokens
        ]
        return {"content": content, "refusal": None}

    def _logprob(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        text, raw = self._tokenizer.token_text(token_id), self._tokenizer.token_bytes(token_id)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(raw)}

    def _add_prompt_ids(self, answer: dict[str, Any]) -> None:
        if self._options.return_token_ids:
            answer["prompt_token_ids"] = self._prompt_ids(0)


class CompletionReply(Reply):
    operation = TEXT_COMPLETION
    object_name = chunk_name = "text_completion"

    def _chunk_choice(self, delta: Delta) -> dict[str, Any]:
        echo = self._session.choices[delta.index].echo if delta.index not in self._frames else ""
        return {"index": delta.index, "text": echo + delta.text}

    def _body_choice(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        return {"index": index, "text": self._session.choices[index].echo + "".join(delta.text for delta in deltas)}

    def _logprobs(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        """With those of the prompt before the first, if the answer begins with the prompt."""
        choice = self._session.choices[index]
        entries = self._prompt_entries(choice) if index not in self._frames and choice.prompt is not None else []
        for delta in deltas:
            at = len(choice.echo) + delta.offset
            entries += [(t.token_id, t.logprob, t.top_logprobs, at) for t in delta.tokens]
        return {
            "tokens": [self._tokenizer.token_text(token_id) for token_id, *_ in entries],
            "token_logprobs": [_finite(logprob) for _, logprob, *_ in entries],
            "top_logprobs": [self._top(*entry[:3]) for entry in entries],
            "text_offset": [at for *_, at in entries],
        }

    def _prompt_entries(self, choice: Choice) -> list[_Entry]:
        """The first token has no logprob, since nothing stands before it."""
        assert choice.prompt is not None
        detokenizer, at, entries = self._tokenizer.detokenizer(), 0, []
        logprobs: list[tuple[float | None, TopLogprobs]] = [(None, ()), *choice.prompt.entries]
        for token_id, (logprob, top) in zip(choice.request.token_ids, logprobs, strict=True):
            piece, own = detokenizer.push(token_id), self._tokenizer.token_text(token_id)
            if not piece and choice.echo.startswith(own, at):  # a special token that stands in the prompt's text
                piece = own
            held = len(piece) - len(own) if piece.endswith(own) else 0  # characters of earlier tokens
            entries.append((token_id, logprob, top, at + held))
            at += len(piece)
        return entries

    def _top(self, token_id: int, logprob: float | None, top: TopLogprobs) -> dict[str, float | None] | None:
        """The most likely tokens and the one that stands there. Of several with the same text the likeliest counts."""
        if logprob is None:
            return None
        found: dict[str, float | None] = {}
        for likely_id, likely in (*top, (token_id, logprob)):
            found.setdefault(self._tokenizer.token_text(likely_id), _finite(likely))
        return found

    def _add_prompt_ids(self, answer: dict[str, Any]) -> None:
        if self._options.return_token_ids:
            for choice in answer["choices"]:
                choice["prompt_token_ids"] = self._prompt_ids(choice["index"])


def error_body(error: TercetError, parameters: frozenset[str]) -> dict[str, Any]:
    """The OpenAI shape. `param` is read off the message, which begins with the parameter's name if it has one."""
    word = str(error).split(maxsplit=1)[0] if str(error) else ""
    param = word.rstrip(":").partition("[")[0].partition(".")[0]
    return {
        "error": {
            "message": str(error),
            "type": "invalid_request_error" if isinstance(error, UserError) else "server_error",
            "code": error.code(),
            "param": param if param in parameters else None,
        }
    }


def error_event(error: TercetError, parameters: frozenset[str]) -> bytes:
    """A failure after the stream has begun; no [DONE] follows it."""
    return _event(error_body(error, parameters))


def _event(chunk: dict[str, Any]) -> bytes:
    return f"data: {_json(chunk)}\n\n".encode()


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LOWEST_LOGPROB)


def _usage(usage: Usage) -> dict[str, Any]:
    cached = None if usage.cached_tokens is None else {"cached_tokens": usage.cached_tokens}
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": cached,
    }
