"""Traces: OpenTelemetry spans of one process, which it sends to a collector itself. Off unless the spec names one.

    gateway  chat MODEL ──> attempt 0 ──> prefill ──> prefill.compute, kv.transfer      (the prefill worker's)
                       │             └──> decode                                       (the decode worker's)
                       └──> attempt 1 ...

Only the gateway begins a trace, or goes on with a client's. All others make spans below one that they were given
(`core.TraceContext`, in a leg), and none if they were given none: so one decision, at the gateway, holds everywhere.
While it is off, spans are OpenTelemetry's own that record nothing, and neither its SDK nor an exporter is imported.
No span has what a client asked or what it was answered.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from opentelemetry.trace import (
    INVALID_SPAN,
    NoOpTracer,
    Span,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from tercet.core import TraceContext
from tercet.errors import Cancelled, TercetError
from tercet.spec import ClusterSpec

if TYPE_CHECKING:
    from tercet.tracing_export import Export

CLOSE_S = 2.0  # for the last spans to reach the collector
UNTRACED: Span = INVALID_SPAN  # records nothing
Told = Mapping[str, AttributeValue]  # attributes
NOTHING: Told = MappingProxyType({})

_W3C = TraceContextTextMapPropagator()
logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # tracing_export tells what its export logs, less often


class Tracing:
    """Any thread."""

    def __init__(self, spec: ClusterSpec | None = None, service: str = "", instance: str = "") -> None:
        """service: what this process is, such as gateway; instance: which one. Without a spec it is off."""
        self._tracer: Tracer = NoOpTracer()
        self._export: Export | None = None
        if spec is not None and spec.tracing.otlp_endpoint is not None:
            from tercet.tracing_export import Export  # only now: the SDK

            self._export = Export(spec.tracing, spec.name, service, instance)
            self._tracer = self._export.tracer

    @property
    def on(self) -> bool:
        return self._export is not None

    @property
    def dropped(self) -> int:
        """Spans that did not reach the collector."""
        return 0 if self._export is None else self._export.dropped

    def request(self, name: str, headers: Mapping[str, str], began: float, told: Told = NOTHING) -> Span:
        """Of a request that a client sent, in the trace that its headers name (W3C Trace Context), else in a new one;
        headers that are malformed count as none. began: time.monotonic()."""
        if not self.on:
            return UNTRACED
        kind, start = SpanKind.SERVER, wall_ns(began)
        return self._tracer.start_span(name, _W3C.extract(headers), kind, told, start_time=start)

    def below(
        self, parent: TraceContext | None, name: str, told: Told = NOTHING, kind: SpanKind = SpanKind.INTERNAL
    ) -> Span:
        """A span below one of another process, or one that was passed on as data."""
        if parent is None or not self.on:
            return UNTRACED
        return self._tracer.start_span(name, _W3C.extract(parent.headers), kind, told)

    def child(self, parent: Span, name: str, told: Told = NOTHING, began: float | None = None) -> Span:
        """began: time.monotonic(); None: now."""
        if not parent.get_span_context().trace_flags.sampled:  # it may have ended
            return UNTRACED
        start = None if began is None else wall_ns(began)
        return self._tracer.start_span(name, set_span_in_context(parent), attributes=told, start_time=start)

    def close(self) -> None:
        """Send the last spans; returns within CLOSE_S even if the collector is silent."""
        if self._export is not None:
            closing = threading.Thread(target=self._export.close, name="tracing-close", daemon=True)
            closing.start()
            closing.join(CLOSE_S)


OFF = Tracing()


def context_of(span: Span) -> TraceContext | None:
    """What others make spans below it by; None if it is not recorded."""
    if not span.is_recording():
        return None
    headers: dict[str, str] = {}
    _W3C.inject(headers, set_span_in_context(span))
    return TraceContext(headers["traceparent"], headers.get("tracestate", ""))


def end(span: Span, error: TercetError | None = None, told: Told = NOTHING, at: float | None = None) -> None:
    """error: why what it stands for did not succeed. at: time.monotonic(); None: now. Ending twice does nothing."""
    if not span.is_recording():
        return
    span.set_attributes(told)
    if error is not None:
        span.set_attribute("error.type", error.code())
        if error.http_status >= 500 and not isinstance(error, Cancelled):  # else what the client did is no error here
            span.set_status(Status(StatusCode.ERROR, error.code()))
    span.end(None if at is None else wall_ns(at))


def wall_ns(moment: float) -> int:
    """A time.monotonic() as nanoseconds since 1970."""
    return time.time_ns() - round((time.monotonic() - moment) * 1e9)
