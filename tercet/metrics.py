"""What a gateway counts, under the names that users of vLLM know with the prefix `tercet_`.

    gateway --observe--> Metrics --exposition()--> GET /metrics
    router  --loads()--> WorkerGauges (read at each scrape, so that a dead worker's series ends with it)

A success and a failure are counted where the answer leaves; a 4xx has its own code and is never a worker's fault.
"""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from tercet.core import STAGES, Done, ExpertRows, FinishReason, Load, Moves, Progress
from tercet.errors import TercetError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_REQUEST_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_GATEWAY_S = (1e-5, 2e-5, 4e-5, 6e-5, 8e-5, 1e-4, 1.25e-4, 1.5e-4, 2e-4, 5e-4, 1e-3, 1.5e-3, 3e-3, 1e-2, 1e-1)
Placing = Mapping[str, Mapping[str, Any]]
_LAST_SOLVE = (  # name, key of what the controller tells, help
    ("solve_seconds", "seconds", "Time that the last placement took to solve"),
    ("placement_gap", "gap", "Of the last placement, to the bound of all placements, as a share; worst layer"),
    (
        "placement_gain",
        "gain",
        "Share of the busiest ranks' rows that the last placement would save, on held-out counts",
    ),
)
_WORKER_COUNTERS = {  # field of Load -> help
    "preemptions": "Sequences sent back to be recomputed",
    "transfer_dropped": "Transfer messages that named no live ticket",
    "transfer_refused": "Transfer connections turned away or cut off",
    "transfer_corrupt": "Units of KV that arrived with a wrong digest and were fetched again",
    "encoder_cache_queries": "Images that embeddings were wanted of",
    "encoder_cache_hits": "Images whose embeddings were there, or on their way",
    "encoder_patches": "Patches of images that went through the vision tower",
    "rank_losses": "Ranks that a worker went on without",
    "embedding_bytes": "Bytes of embeddings that came from encode workers",
}


class WorkerGauges(Collector):
    """One series per live worker, from the freshest load that each has reported."""

    def __init__(self, loads: Callable[[], Mapping[str, Load]], roles: Callable[[], Mapping[str, str]]) -> None:
        self._loads = loads
        self._roles = roles

    def collect(self) -> Iterator[Metric]:
        info = GaugeMetricFamily("tercet_worker_info", "1 for each live worker", labels=["worker", "role"])
        for worker, role in self._roles().items():
            if worker in self._loads():
                info.add_metric([worker, role], 1)
        running = GaugeMetricFamily("tercet_num_requests_running", "Requests in the running batch", labels=["worker"])
        waiting = GaugeMetricFamily("tercet_num_requests_waiting", "Requests admitted, not running", labels=["worker"])
        usage = GaugeMetricFamily("tercet_kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1", labels=["worker"])
        blocks = GaugeMetricFamily("tercet_kv_blocks", "KV blocks by owner", labels=["worker", "state"])
        images = GaugeMetricFamily("tercet_encoder_waiting", "Images that are or wait to be encoded", labels=["worker"])
        embeddings = GaugeMetricFamily(
            "tercet_embedding_blocks", "Blocks that embeddings cross by, by owner", labels=["worker", "state"]
        )
        lost = GaugeMetricFamily("tercet_ranks_lost", "Ranks that a worker goes on without", labels=["worker"])
        for worker, load in self._loads().items():
            lost.add_metric([worker], load.ranks_lost)
            images.add_metric([worker], load.encoder_waiting)
            if load.embedding_blocks_total:
                free, quarantined = load.embedding_blocks_free, load.embedding_blocks_quarantined
                used = load.embedding_blocks_total - free - quarantined
                for state, count in (("free", free), ("used", used), ("quarantined", quarantined)):
                    embeddings.add_metric([worker, state], count)
            running.add_metric([worker], load.running)
            waiting.add_metric([worker], load.waiting)
            usage.add_metric([worker], 1 - load.blocks_free / load.blocks_total if load.blocks_total else 0.0)
            for state in ("free", "owned", "leased", "in_flight", "quarantined"):
                blocks.add_metric([worker, state], getattr(load, f"blocks_{state}"))
        yield from (info, running, waiting, usage, blocks, images, embeddings, lost, self._pairs(), *self._counters())

    def _pairs(self) -> GaugeMetricFamily:
        labels = ["worker", "peer", "transport"]
        text = "Bytes per second of a pair, measured when it connected"
        family = GaugeMetricFamily("tercet_kv_pair_bandwidth", text, labels=labels)
        for worker, load in self._loads().items():
            for pair in load.pairs:
                family.add_metric([worker, pair.worker_id, pair.transport], pair.bandwidth)
        return family

    def _counters(self) -> Iterator[CounterMetricFamily]:
        for name, text in _WORKER_COUNTERS.items():
            family = CounterMetricFamily(f"tercet_{name}", text, labels=["worker"])
            for worker, load in self._loads().items():
                family.add_metric([worker], getattr(load, name))
            yield family


class ExpertGauges(Collector):
    """Of each live worker with a mixture, how its ranks share the rows of experts; a row is one token at one expert."""

    def __init__(self, experts: Callable[[], Mapping[str, Sequence[ExpertRows]]]) -> None:
        self._experts = experts

    def collect(self) -> Iterator[Metric]:
        of_expert = CounterMetricFamily("tercet_expert_rows", "Rows of an expert", labels=["worker", "expert"])
        of_rank = CounterMetricFamily("tercet_expert_rank_rows", "Rows of a rank's experts", labels=["worker", "rank"])
        text = "Bytes that a rank sent to others: rows to experts, and what these made of them"
        sent = CounterMetricFamily("tercet_expert_sent_bytes", text, labels=["worker", "rank"])
        text = "Of them, bytes to ranks on other nodes"
        crossing = CounterMetricFamily("tercet_expert_crossing_bytes", text, labels=["worker", "rank"])
        text = "Mean rows of a worker's ranks over those of the busiest one, since they started; 1 is even"
        balance = GaugeMetricFamily("tercet_expert_balancedness", text, labels=["worker"])
        for worker, ranks in self._experts().items():
            rows = [sum(rank.rows) for rank in ranks]
            for rank, count in zip(ranks, rows, strict=True):
                of_rank.add_metric([worker, str(rank.rank)], count)
                sent.add_metric([worker, str(rank.rank)], rank.sent_bytes)
                crossing.add_metric([worker, str(rank.rank)], rank.crossing_bytes)
            total = Counts[int]()
            for rank in ranks:
                for expert, count in zip(rank.experts, rank.rows, strict=True):
                    total[expert] += count
            for expert, count in sorted(total.items()):
                of_expert.add_metric([worker, str(expert)], count)
            if any(rows):
                balance.add_metric([worker], sum(rows) / len(rows) / max(rows))
        yield from (of_expert, of_rank, sent, crossing, balance)


class PlacementGauges(Collector):
    """Of each live worker whose experts lie on several ranks: how they were placed anew while it serves."""

    def __init__(self, moves: Callable[[], Mapping[str, Moves]], placing: Callable[[], Placing]) -> None:
        self._moves, self._placing = moves, placing

    def collect(self) -> Iterator[Metric]:
        text = "Layers whose experts were placed anew since the worker started"
        epoch = GaugeMetricFamily("tercet_expert_placement_epoch", text, labels=["worker"])
        text = "Longest time for which no step could begin, since layers were switched"
        pause = GaugeMetricFamily("tercet_expert_move_pause_seconds", text, labels=["worker"])
        moved = CounterMetricFamily(
            "tercet_expert_moved_bytes", "Bytes of experts that changed ranks", labels=["worker"]
        )
        text = "Moves of experts, by how they ended"
        ended = CounterMetricFamily("tercet_expert_moves", text, labels=["worker", "outcome"])
        for worker, moves in self._moves().items():
            epoch.add_metric([worker], moves.epoch)
            pause.add_metric([worker], moves.longest_pause_s)
            moved.add_metric([worker], moves.moved_bytes)
            ended.add_metric([worker, "done"], moves.done)
            ended.add_metric([worker, "failed"], moves.failed)
        yield from (epoch, pause, moved, ended, *self._solved())

    def _solved(self) -> Iterator[Metric]:
        text = "Placements that were looked for, by how that ended"
        solves = CounterMetricFamily("tercet_expert_solves", text, labels=["worker", "outcome"])
        for worker, told in self._placing().items():
            solves.add_metric([worker, "solved"], told["solves"])
            solves.add_metric([worker, "failed"], told["failures"])
        yield solves
        for name, key, text in _LAST_SOLVE:
            family = GaugeMetricFamily(f"tercet_expert_{name}", text, labels=["worker"])
            for worker, told in self._placing().items():
                if told.get(key) is not None:
                    family.add_metric([worker], told[key])
            yield family


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


class Metrics:
    """All series of one gateway in a registry of its own, so that two gateways can live in one process."""

    def __init__(
        self, loads: Callable[[], Mapping[str, Load]] = dict, roles: Callable[[], Mapping[str, str]] = dict
    ) -> None:
        """loads: worker id -> what each live worker last said. roles: worker id -> its role."""
        self._experts: Mapping[str, Sequence[ExpertRows]] = {}
        self._registry = r = CollectorRegistry()
        r.register(WorkerGauges(loads, roles))
        r.register(ExpertGauges(lambda: self._experts))
        self._moves: Mapping[str, Moves] = {}
        self._placing: Placing = {}
        r.register(PlacementGauges(lambda: self._moves, lambda: self._placing))
        self.ttft = Histogram("tercet_time_to_first_token_seconds", "TTFT", buckets=_REQUEST_S, registry=r)
        self.tpot = Histogram("tercet_time_per_output_token_seconds", "TPOT", buckets=_TOKEN_S, registry=r)
        self.itl = Histogram("tercet_inter_token_latency_seconds", "ITL", buckets=_TOKEN_S, registry=r)
        self.e2e = Histogram("tercet_e2e_request_latency_seconds", "E2E", buckets=_REQUEST_S, registry=r)
        self.prompt_tokens = Counter("tercet_prompt_tokens", "Prompt tokens of finished requests", registry=r)
        self.cached_tokens = Counter("tercet_prompt_tokens_cached", "Prompt tokens from a prefix cache", registry=r)
        self.generation_tokens = Counter("tercet_generation_tokens", "Tokens generated", registry=r)
        self.kv_bytes = Counter("tercet_kv_transfer_bytes", "KV bytes moved, by transport", ["transport"], registry=r)
        self.attempts = Counter("tercet_request_retries", "New plans for requests whose worker died", registry=r)
        self.inflight = Gauge("tercet_gateway_inflight_requests", "Requests in the gateway", registry=r)
        self.gateway_request = Histogram(
            "tercet_gateway_request_seconds", "Request read until the router call", buckets=_GATEWAY_S, registry=r
        )
        self.gateway_token = Histogram(
            "tercet_gateway_token_seconds",
            "Token off the worker's stream until its bytes are written",
            buckets=_GATEWAY_S,
            registry=r,
        )
        self.image_fetches = Counter("tercet_image_fetches", "Images fetched, by result", ["result"], registry=r)
        self.image_fetches_running = Gauge("tercet_image_fetches_running", "Images being fetched", registry=r)
        self.image_uuids = Counter(
            "tercet_image_uuids", "Images named by a uuid alone: hit, miss", ["result"], registry=r
        )
        self.image_cache_bytes = Gauge("tercet_image_cache_bytes", "Images kept for their uuids", registry=r)
        self._success = Counter("tercet_request_success", "Finished requests", ["finished_reason"], registry=r)
        self._failure = Counter("tercet_request_failure", "Failed requests, by error code", ["code"], registry=r)
        self._switches = Counter("tercet_role_switches", "Workers asked for another role, by how", ["how"], registry=r)
        self._switch_s = Histogram(
            "tercet_role_switch_seconds", "Asked for until it serves in its new role", buckets=_REQUEST_S, registry=r
        )
        self._stages = {
            s: Histogram(f"tercet_request_{s}_time_seconds", f"Seconds in {s}", buckets=_REQUEST_S, registry=r)
            for s in STAGES
        }

    def watch_connections(self, opened: Callable[[], int], closed: Callable[[], Mapping[str, int]]) -> None:
        self._registry.register(ConnectionGauges(opened, closed))

    def finished(self, reason: FinishReason) -> None:
        self._success.labels(reason.value).inc()

    def failed(self, error: type[TercetError]) -> None:
        self._failure.labels(error.code()).inc()

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

    def stages(self, done: Progress | Done) -> None:
        """Book what the workers measured of one finished generation."""
        for stage, seconds in done.times.seconds:
            self._stages[stage].observe(seconds)
        self.cached_tokens.inc(done.cached_tokens)
        self.attempts.inc(done.attempts - 1)
        if done.times.kv_bytes:
            self.kv_bytes.labels(done.times.transport).inc(done.times.kv_bytes)

    def exposition(self) -> bytes:
        """The Prometheus text format, version 0.0.4."""
        return generate_latest(self._registry)
