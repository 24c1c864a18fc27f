"""A collector for tests: an OTLP receiver on a real port, built from OpenTelemetry's own protocol package."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc


@dataclass(frozen=True)
class Seen:
    """A span as the collector got it."""

    name: str
    trace: str
    id: str
    parent: str  # empty: it has none
    state: str
    kind: int
    start: int  # nanoseconds since 1970
    end: int
    failed: bool
    told: dict[str, Any]
    events: tuple[str, ...]
    service: str
    instance: str


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.endpoint = ""
        self._spans: list[Seen] = []
        self._came = threading.Condition()

    def Export(self, request, context):
        with self._came:
            for part in request.resource_spans:
                who = {item.key: _value(item.value) for item in part.resource.attributes}
                for scope in part.scope_spans:
                    self._spans += [_seen(span, who) for span in scope.spans]
            self._came.notify_all()
        return pb.ExportTraceServiceResponse()

    @property
    def spans(self) -> list[Seen]:
        with self._came:
            return list(self._spans)

    def of(self, trace: str) -> list[Seen]:
        return [span for span in self.spans if span.trace == trace]

    def wait(self, names: set[str], trace: str = "", timeout_s: float = 20.0) -> list[Seen]:
        """-> the spans once those of all names have come, of one trace if it is given."""
        deadline = time.monotonic() + timeout_s
        with self._came:
            while True:
                found = [span for span in self._spans if trace in ("", span.trace)]
                if names <= {span.name for span in found}:
                    return found
                left = deadline - time.monotonic()
                assert left > 0, f"of {sorted(names)} only {sorted(span.name for span in found)} came"
                self._came.wait(left)


def _seen(span: Any, who: dict[str, Any]) -> Seen:
    return Seen(
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.trace_state,
        span.kind,
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        span.status.code == 2,
        {item.key: _value(item.value) for item in span.attributes},
        tuple(event.name for event in span.events),
        who["service.name"],
        who["service.instance.id"],
    )


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_value(item) for item in value.array_value.values] if kind == "array_value" else getattr(value, kind)


@contextmanager
def collector(port: int = 0) -> Iterator[Collector]:
    made, server = Collector(), grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(made, server)
    made.endpoint = f"http://127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
    server.start()
    try:
        yield made
    finally:
        server.stop(0).wait()
