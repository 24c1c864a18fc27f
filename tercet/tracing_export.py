"""Sends spans to a collector by OTLP over gRPC. Imported only where traces are on.

A span that has ended waits in a bounded queue for a thread that sends batches. Requests never wait for the collector:
what it does not take in time is dropped, counted, and logged once until it takes spans again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Tracer

from tercet.spec import TracingSpec

MOST_QUEUED = 2048  # spans
BATCH = 512
EVERY_MS = 1000
TIMEOUT_S = 5.0  # of one batch, tries included

log = logging.getLogger(__name__)


class Export:
    def __init__(self, spec: TracingSpec, cluster: str, service: str, instance: str) -> None:
        """A provider of its own: the process's global one may be Ray's or another library's."""
        self._exporter = _Counting(OTLPSpanExporter(endpoint=spec.otlp_endpoint, timeout=TIMEOUT_S), spec.otlp_endpoint)
        self._processor = _Bounded(self._exporter)
        who = {"service.name": f"tercet-{service}", "service.namespace": cluster, "service.instance.id": instance}
        sampler = ParentBased(TraceIdRatioBased(spec.sample_ratio))
        self._provider = TracerProvider(sampler, Resource.create(who), shutdown_on_exit=False)
        self._provider.add_span_processor(self._processor)
        self.tracer: Tracer = self._provider.get_tracer("tercet")

    @property
    def dropped(self) -> int:
        return self._exporter.dropped

    def close(self) -> None:
        """May wait for the collector."""
        self._provider.shutdown()


class _Counting(SpanExporter):
    """Counts what is on its way and what is lost."""

    def __init__(self, inner: SpanExporter, endpoint: str | None) -> None:
        self._inner, self._endpoint = inner, endpoint
        self._lock = threading.Lock()
        self._failing = False  # and it was logged
        self.waiting = 0  # spans that have ended and are not sent yet
        self.dropped = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            result = self._inner.export(spans)
        finally:
            with self._lock:
                self.waiting -= len(spans)
        if result is not SpanExportResult.SUCCESS:
            self.lose(len(spans))
        elif self._failing:
            self._failing = False
            log.warning("the collector at %s takes spans again; %d were dropped so far", self._endpoint, self.dropped)
        return result

    def take(self) -> bool:
        """Whether there is room for one more."""
        with self._lock:
            if self.waiting < MOST_QUEUED:
                self.waiting += 1
                return True
        self.lose(1)
        return False

    def lose(self, count: int) -> None:
        with self._lock:
            self.dropped += count
            told, self._failing = self._failing, True
        if not told:
            log.warning("the collector at %s does not take spans, which are dropped meanwhile", self._endpoint)

    def shutdown(self) -> None:
        self._inner.shutdown()


class _Bounded(BatchSpanProcessor):
    """Drops a span for which there is no room, and counts it, which the SDK's own queue does not."""

    def __init__(self, exporter: _Counting) -> None:
        super().__init__(exporter, MOST_QUEUED, EVERY_MS, BATCH)
        self._exporter = exporter

    def on_end(self, span: ReadableSpan) -> None:
        if span.context is not None and span.context.trace_flags.sampled and self._exporter.take():
            super().on_end(span)
