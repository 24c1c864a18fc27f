"""All series of one gateway."""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from types import MappingProxyType

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from tercet.core import STAGES, Done, ExpertRows, FinishReason, Load, Moves, Progress, WorkerInfo
from tercet.errors import Cancelled, InternalError, TercetError
from tercet.metrics.clients import ANONYMOUS, ClientCounters
from tercet.metrics.experts import ExpertGauges, PlacementGauges, Placing
from tercet.metrics.gen_ai import GenAi
from tercet.metrics.ports import ConnectionGauges, SpanGauges, StateGauges
from tercet.metrics.workers import MemberGauges, Members, WorkerGauges

_REQUEST_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_GATEWAY_S = (1e-5, 2e-5, 4e-5, 6e-5, 8e-5, 1e-4, 1.25e-4, 1.5e-4, 2e-4, 5e-4, 1e-3, 1.5e-3, 3e-3, 1e-2, 1e-1)
_TRANSFER_S = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1, 2.5, 10)
_TRANSFER_BYTES = tuple(float(4**n) for n in range(7, 18))  # 16 KiB to 16 GiB
_TOKENS = tuple(float(2**n) for n in range(18))  # 1 to 131,072
_OPENMETRICS = "application/openmetrics-text"
_Encode = Callable[[Collector], bytes]

# It would be a second series beside each counter and histogram, which no query here needs.
disable_created_metrics()  # type: ignore[no-untyped-call]


def encoder_for(accept: str) -> tuple[_Encode, str]:
    """-> what writes `Metrics.collected`, and its content type. OpenMetrics 1.0 if the header Accept names it, else the
    Prometheus text format 0.0.4."""
    return choose_encoder(_OPENMETRICS if _OPENMETRICS in accept.lower() else "")


@dataclass
class Asked:
    """A request to a generating endpoint, while it runs."""

    error: type[TercetError] | None = None  # why it failed; set by who answers, where nothing is raised


class Metrics:
    """In a registry of its own, so that two gateways can live in one process."""

    def __init__(
        self,
        loads: Callable[[], Mapping[str, Load]] = dict,
        workers: Callable[[], Sequence[WorkerInfo]] = tuple,
        cluster: Mapping[str, str] = MappingProxyType({"name": "", "topology": "", "model": ""}),
    ) -> None:
        """loads: worker id -> what each live worker last said. cluster: its name, its topology, the served model."""
        self._registry = r = CollectorRegistry()
        self._target: Mapping[str, int] = {}
        self._members: Members = {}
        self._experts: Mapping[str, Sequence[ExpertRows]] = {}
        self._moves: Mapping[str, Moves] = {}
        self._placing: Placing = {}
        r.register(WorkerGauges(loads, workers))
        r.register(MemberGauges(lambda: self._target, lambda: self._members))
        r.register(ExpertGauges(lambda: self._experts))
        r.register(PlacementGauges(lambda: self._moves, lambda: self._placing))
        ProcessCollector(registry=r)
        self._clients = ClientCounters(r)
        self._gen_ai = GenAi(r, cluster["model"])
        self._describe(r, cluster)
        self._time(r)
        self._count(r)

    def _describe(self, r: CollectorRegistry, cluster: Mapping[str, str]) -> None:
        build = Info("tercet_build", "1; the version that the gateway runs", registry=r)
        build.info({"version": version("tercet"), "python": platform.python_version()})
        Info("tercet_cluster", "1; what the gateway serves", registry=r).info(dict(cluster))

    def _time(self, r: CollectorRegistry) -> None:
        def seconds(name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(f"tercet_{name}_seconds", text, labels, buckets=buckets, registry=r)

        self.ttft = seconds("time_to_first_token", "Request read until its first token, per choice", _REQUEST_S)
        text = "Mean time per token of a finished choice after its first one"
        self.tpot = seconds("time_per_output_token", text, _TOKEN_S)
        self.itl = seconds("inter_token_latency", "Time between two tokens of a choice", _TOKEN_S)
        self.e2e = seconds("e2e_request_latency", "Request read until the end of a finished choice", _REQUEST_S)
        text = "First token until the last one of a finished choice"
        self.decode = seconds("request_decode_time", text, _REQUEST_S)
        self._stages = {
            s: seconds(f"request_{s}_time", text[0].upper() + text[1:], _REQUEST_S) for s, text in STAGES.items()
        }
        self.gateway_request = seconds("gateway_request", "Request read until the router call", _GATEWAY_S)
        text = "Token off the worker's stream until its bytes are written"
        self.gateway_token = seconds("gateway_token", text, _GATEWAY_S)
        text = "Of a finished choice: first token sampled until all its KV has landed, by transport"
        self._kv_wait = seconds("kv_transfer_wait", text, _TRANSFER_S, "transport")
        text = "Of a worker's role: asked for until it serves in it"
        self._switch_s = seconds("role_switch", text, _REQUEST_S)

    def _count(self, r: CollectorRegistry) -> None:
        def count(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"tercet_{name}", text, labels, registry=r)

        def sizes(name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(f"tercet_{name}", text, labels, buckets=buckets, registry=r)

        self._prompt_tokens = count("prompt_tokens", "Prompt tokens of choices that got a first token")
        self._cached_tokens = count("prompt_tokens_cached", "Prompt tokens of finished choices that a prefix cache had")
        self._generation_tokens = count("generation_tokens", "Tokens generated, those of unfinished choices included")
        text = "Prompt tokens of a finished choice"
        self.prompt_sizes = sizes("request_prompt_tokens", text, _TOKENS)
        self.generation_sizes = sizes("request_generation_tokens", "Tokens of a finished choice", _TOKENS)
        self._kv_bytes = count("kv_transfer_bytes", "KV bytes moved for finished choices, by transport", "transport")
        text = "KV bytes moved for a finished choice, by transport"
        self._kv_sizes = sizes("kv_transfer_request_bytes", text, _TRANSFER_BYTES, "transport")
        self._retries = count("request_retries", "New plans for choices whose worker died or was drained")
        self._success = count("request_success", "Finished choices", "finished_reason")
        self._failure = count("request_failure", "Failed requests of any kind, by error code", "code")
        self.inflight = Gauge(
            "tercet_gateway_inflight_requests", "Choices that have a place in the gateway", registry=r
        )
        self.image_fetches = count("image_fetches", "Images fetched, by result", "result")
        self.image_fetches_running = Gauge("tercet_image_fetches_running", "Images being fetched", registry=r)
        self.image_uuids = count("image_uuids", "Images named by a uuid alone: hit, miss", "result")
        self.image_cache_bytes = Gauge("tercet_image_cache_bytes", "Images kept for their uuids", registry=r)
        self._switches = count("role_switches", "Workers asked for another role, by how", "how")

    def watch_connections(self, opened: Callable[[], int], closed: Callable[[], Mapping[str, int]]) -> None:
        self._registry.register(ConnectionGauges(opened, closed))

    def watch_spans(self, dropped: Callable[[], int]) -> None:
        self._registry.register(SpanGauges(dropped))

    def watch_state(self, ready: Callable[[], bool], queued: Callable[[], int]) -> None:
        self._registry.register(StateGauges(ready, queued))

    # ---- requests

    @contextmanager
    def request(self, operation: str, client: str = ANONYMOUS) -> Iterator[Asked]:
        """Count a request to a generating endpoint, once, when it ends. operation: CHAT or TEXT_COMPLETION. client: its
        name in labels."""
        began, asked = time.monotonic(), Asked()
        try:
            yield asked
        except BaseException as error:
            asked.error = _named(error)
            raise
        finally:
            self._clients.ended(client, asked.error)
            self._gen_ai.ended(operation, asked.error, time.monotonic() - began)

    def answered(self, operation: str, ttft_s: float, tpot_s: float | None) -> None:
        """A request has all its tokens. Times are of its first choice; tpot_s: None if that has one token alone."""
        self._gen_ai.answered(operation, ttft_s, tpot_s)

    def spent(self, client: str, prompt_tokens: int, generated: int) -> None:
        """On a choice, however it has ended."""
        self._prompt_tokens.inc(prompt_tokens)
        self._generation_tokens.inc(generated)
        self._clients.spent(client, prompt_tokens, generated)

    def finished(self, reason: FinishReason) -> None:
        self._success.labels(reason.value).inc()

    def failed(self, error: type[TercetError]) -> None:
        self._failure.labels(error.code()).inc()

    def stages(self, done: Progress | Done) -> None:
        """Book what the workers measured of one finished generation."""
        for stage, seconds in done.times.seconds:
            self._stages[stage].observe(seconds)
        self._cached_tokens.inc(done.cached_tokens)
        self._retries.inc(done.attempts - 1)
        if done.times.kv_bytes:
            self._kv_bytes.labels(done.times.transport).inc(done.times.kv_bytes)
            self._kv_sizes.labels(done.times.transport).observe(done.times.kv_bytes)
            self._kv_wait.labels(done.times.transport).observe(done.times.of("transfer"))

    # ---- what the controller tells

    def members_told(self, target: Mapping[str, int], members: Members) -> None:
        """target: role -> workers that are wanted. members: what the controller last saw of each."""
        self._target, self._members = target, members

    def experts_told(self, experts: Mapping[str, Sequence[ExpertRows]]) -> None:
        """What the controller last heard of each worker that has any."""
        self._experts = experts

    def placement_told(self, moves: Mapping[str, Moves], placing: Placing) -> None:
        """Likewise; placing: what the controller did last for each (`Slot.placing`)."""
        self._moves, self._placing = moves, placing

    def role_switched(self, how: str, seconds: float) -> None:
        """how: in_place, restarted (in another process), failed, or superseded by another request."""
        self._switches.labels(how).inc()
        if how in ("in_place", "restarted"):
            self._switch_s.observe(seconds)

    def collected(self) -> Collector:
        """All series as they are now. With 1,000 clients it takes longer to write them than to read them, so an encoder
        may run in a thread."""
        return _Collected(tuple(self._registry.collect()))

    def exposition(self) -> bytes:
        """All series, in the Prometheus text format 0.0.4."""
        return generate_latest(self.collected())


class _Collected(Collector):
    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)


def _named(error: BaseException) -> type[TercetError]:
    """The class under which the request's end is told or counted."""
    if isinstance(error, TercetError):
        return type(error)
    gone = isinstance(error, (asyncio.CancelledError, ConnectionError))
    return Cancelled if gone else InternalError
