"""What is told of each request once it is over: a span, if it is traced, and a line of the log. Both have the numbers
and names of what was done, and nothing of what was asked or answered; the line has the prompt if `logging.prompts`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from opentelemetry.trace import Span

from tercet import logs, tracing
from tercet.core import TraceContext
from tercet.errors import Cancelled, InternalError, TercetError
from tercet.roles.gateway.ask import Chat, Prompt
from tercet.roles.gateway.session import Session

MOST_PROMPT = 4096  # characters of a prompt in a line
BRIEF = frozenset({"GET /health", "GET /ready", "GET /metrics"})  # asked for again and again; told at level debug
PROVIDER = "tercet"

access = logging.getLogger(logs.ACCESS)


@dataclass(eq=False)
class Observed:
    """A request until it is over."""

    route: str
    request_id: str  # known only here until its body is read; then the id that the client is told
    client: str
    began: float  # time.monotonic()
    span: Span
    status: int | str = ""  # HTTP's number or gRPC's name; empty: there was no answer
    error: TercetError | None = None
    session: Session | None = None

    @property
    def trace(self) -> TraceContext | None:
        return tracing.context_of(self.span)

    def begun(self, session: Session) -> None:
        self.session, self.request_id, self.client = session, session.ask.request_id, session.ask.client


class Observer:
    def __init__(self, spans: tracing.Tracing, model: str, *, prompts: bool = False) -> None:
        self._spans, self._model, self._prompts = spans, model, prompts

    @contextmanager
    def open(
        self, route: str, request_id: str, client: str, operation: str, headers: Mapping[str, str]
    ) -> Iterator[Observed]:
        """operation: chat or text_completion, which are traced; empty: another one."""
        began, span = time.monotonic(), tracing.UNTRACED
        if operation:
            told = {"gen_ai.operation.name": operation, "gen_ai.provider.name": PROVIDER}
            span = self._spans.request(f"{operation} {self._model}", headers, began, told)
        observed = Observed(route, request_id, client, began, span)
        try:
            with logs.within(request_id, span):
                yield observed
        except asyncio.CancelledError:
            observed.error = Cancelled("the client has gone")
            raise
        except Exception as error:
            observed.error = error if isinstance(error, TercetError) else InternalError(type(error).__name__)
            observed.status = observed.error.grpc_status  # HTTP's failures do not come as far as this
            raise
        finally:
            self._close(observed)

    def _close(self, observed: Observed) -> None:
        if observed.span.is_recording():
            tracing.end(observed.span, observed.error, self._attributes(observed))
        level = logging.DEBUG if observed.route in BRIEF and observed.error is None else logging.INFO
        if access.isEnabledFor(level):
            about = logs.about(observed.request_id, observed.span, **self._fields(observed))
            access.log(level, "%s", observed.route, extra=about)
        observed.error = observed.session = None  # an error holds what was alive where it was raised

    def _fields(self, observed: Observed) -> dict[str, Any]:
        told: dict[str, Any] = {
            "client": observed.client,
            "status": observed.status or None,
            "duration_s": round(time.monotonic() - observed.began, 6),
        }
        if observed.error is not None:
            told["error"] = logs.reason(observed.error)
        if (session := observed.session) is not None:
            usage, timings = session.usage, session.timings
            told |= {
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "cached_tokens": usage.cached_tokens,
                "ttft_s": round(timings.ttft_s, 6) if usage.completion_tokens else None,
                "workers": ",".join(f"{role}:{worker}" for role, worker in timings.workers.items()) or None,
                "attempts": timings.attempts,
            }
            if self._prompts:
                told["prompts"] = [_shown(prompt) for prompt in session.ask.prompts]
        return told

    def _attributes(self, observed: Observed) -> dict[str, Any]:
        method, _, path = observed.route.rpartition(" ")
        door = {"http.request.method": method, "url.path": path} if method else {"rpc.method": path}
        status = {"http.response.status_code" if method else "rpc.response.status_code": observed.status}
        told = {
            "tercet.request_id": observed.request_id,
            "gen_ai.request.model": self._model,
            **door,
            **(status if observed.status else {}),
        }
        if (session := observed.session) is None:
            return told
        usage, timings, params = session.usage, session.timings, session.ask.params
        known = {
            "gen_ai.response.id": observed.request_id,
            "gen_ai.response.model": self._model,
            "gen_ai.request.choice.count": session.ask.num_choices,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.max_tokens": params.max_tokens if session.ask.max_tokens_given else None,
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.output_tokens": usage.completion_tokens,
            "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
            "gen_ai.response.finish_reasons": [c.finish_reason.value for c in session.choices if c.finish_reason],
            "gen_ai.response.time_to_first_chunk": timings.ttft_s if usage.completion_tokens else None,
            "tercet.attempts": timings.attempts,
            "tercet.kv.bytes": timings.kv_bytes,
        }
        return told | {name: value for name, value in known.items() if value is not None}


def _shown(prompt: Prompt) -> str:
    """Its beginning."""
    if isinstance(prompt, tuple):
        return str(prompt[:MOST_PROMPT])[:MOST_PROMPT]
    return "\n".join(prompt.texts)[:MOST_PROMPT] if isinstance(prompt, Chat) else prompt[:MOST_PROMPT]
