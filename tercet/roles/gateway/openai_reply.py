"""Deltas to the OpenAI shapes, with vLLM's `token_ids` and our `timings` beside `usage`.

A chunk is glued from a prefix made once per choice and the JSON of its text, since it is written for every token.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tercet.core import FinishReason, TokenEvent
from tercet.errors import TercetError, UserError
from tercet.roles.gateway.ask import Delta, Tokenizer, Usage
from tercet.roles.gateway.openai_request import NEUTRAL, Options
from tercet.roles.gateway.session import Session

DONE = b"data: [DONE]\n\n"
LOWEST_LOGPROB = -9999.0  # JSON has no minus infinity; OpenAI and vLLM write this
_PARAMS = frozenset(NEUTRAL) | {
    *("model", "prompt", "messages", "max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "seed", "n", "stop", "stop_token_ids", "logprobs", "top_logprobs"),
    *("timeout", "stream", "stream_options"),
}


class Reply:
    """The answer to one request. Subclasses say what differs between chat and completion."""

    object_name: str
    chunk_name: str

    def __init__(self, session: Session, model: str, tokenizer: Tokenizer, options: Options) -> None:
        self._session = session
        self._model = model
        self._tokenizer = tokenizer
        self._options = options
        self._id = session.ask.request_id
        self._created = int(time.time())
        self._unfinished = len(session.choices)
        self._opened: set[int] = set()
        self._top = (
            f'data: {{"id":"{self._id}","object":"{self.chunk_name}","created":{self._created},'
            f'"model":{json.dumps(model)},'
        )

    def chunk(self, delta: Delta) -> bytes:
        """One server-sent event; after the last delta of all choices also the closing ones."""
        first = delta.index not in self._opened
        if first:
            self._opened.add(delta.index)
        if delta.finish_reason is None and not first and not self._options.logprobs:
            ids = f',"token_ids":[{delta.tokens[0].token_id}]' if self._options.return_token_ids else ""
            text = self._text_field(json.dumps(delta.text))
            return f'{self._top}"choices":[{{"index":{delta.index},{text},"logprobs":null,"finish_reason":null{ids}}}]}}\n\n'.encode()
        return self._full_chunk(delta, first)

    def _full_chunk(self, delta: Delta, first: bool) -> bytes:
        choice = self._choice(delta.index, [delta], first)
        top = self._prompt_ids_field(delta.index) if first else ""
        self._unfinished -= delta.finish_reason is not None
        if self._unfinished:
            return f'{self._top}{top}"choices":[{json.dumps(choice)}]}}\n\n'.encode()
        timings = f'"timings":{json.dumps(self._timings())}'
        if not self._options.include_usage:
            return f'{self._top}{top}"choices":[{json.dumps(choice)}],{timings}}}\n\n'.encode() + DONE
        last = f'{self._top}"choices":[],"usage":{json.dumps(usage(self._session.usage))},{timings}}}\n\n'
        return f'{self._top}{top}"choices":[{json.dumps(choice)}]}}\n\n{last}'.encode() + DONE

    def body(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """The whole answer, from all deltas of all choices."""
        by_choice: list[list[Delta]] = [[] for _ in self._session.choices]
        for delta in deltas:
            by_choice[delta.index].append(delta)
        return {
            "id": self._id,
            "object": self.object_name,
            "created": self._created,
            "model": self._model,
            "choices": [self._whole_choice(i, d) for i, d in enumerate(by_choice)],
            "usage": usage(self._session.usage),
            "timings": self._timings(),
        } | self._prompt_ids_of_body()

    def _timings(self) -> dict[str, Any]:
        return dataclasses.asdict(self._session.timings)

    def _prompt_ids(self, index: int) -> tuple[int, ...]:
        return self._session.choices[index].request.token_ids

    def _common(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """Fields that every choice has, in a chunk and in a body."""
        last = deltas[-1]
        tokens = [t for d in deltas for t in d.tokens]
        fields: dict[str, Any] = {"logprobs": self._logprobs(last.index, tokens) if self._options.logprobs else None}
        fields["finish_reason"] = last.finish_reason and FinishReason(last.finish_reason).value
        if self._options.return_token_ids:
            stop = [] if last.stop_token_id is None else [last.stop_token_id]
            fields["token_ids"] = [t.token_id for t in tokens] + stop
        return fields

    def _top_tokens(self, event: TokenEvent) -> list[tuple[str, float]]:
        return [(self._tokenizer.token_text(i), max(p, LOWEST_LOGPROB)) for i, p in event.top_logprobs]

    # What differs between the two endpoints:

    def _text_field(self, text_json: str) -> str:
        raise NotImplementedError

    def _choice(self, index: int, deltas: Sequence[Delta], first: bool) -> dict[str, Any]:
        raise NotImplementedError

    def _whole_choice(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, index: int, tokens: Sequence[TokenEvent]) -> dict[str, Any]:
        raise NotImplementedError

    def _prompt_ids_field(self, index: int) -> str:  # noqa: ARG002
        return ""

    def _prompt_ids_of_body(self) -> dict[str, Any]:
        return {}
