"""Series of the gateway's own state, read at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector


class ConnectionGauges(Collector):
    """What the gateway's ports have open, and what they closed by themselves."""

    def __init__(self, opened: Callable[[], int], closed: Callable[[], Mapping[str, int]]) -> None:
        self._opened = opened
        self._closed = closed

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("tercet_gateway_connections", "Connections of clients, HTTP and gRPC", self._opened())
        text = "Connections that the gateway has closed, by reason"
        closed = CounterMetricFamily("tercet_gateway_connections_closed", text, labels=["reason"])
        for reason, count in self._closed().items():
            closed.add_metric([reason], count)
        yield closed


class SpanGauges(Collector):
    def __init__(self, dropped: Callable[[], int]) -> None:
        self._dropped = dropped

    def collect(self) -> Iterator[Metric]:
        text = "Spans of the gateway that its collector did not take"
        yield CounterMetricFamily("tercet_gateway_spans_dropped", text, value=self._dropped())


class StateGauges(Collector):
    """Whether the gateway is ready, and who waits in it."""

    def __init__(self, ready: Callable[[], bool], queued: Callable[[], int]) -> None:
        self._ready, self._queued = ready, queued

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("tercet_ready", "1 while /ready says 200", int(self._ready()))
        text = "Choices in the gateway's line: no worker has room for them yet"
        yield GaugeMetricFamily("tercet_gateway_queued_requests", text, self._queued())
