"""Series of workers, read at each scrape, so that those of a dead worker end with it."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from tercet.core import Load, WorkerInfo

_COUNTERS = {  # name -> field of Load, help
    "num_preemptions": ("preemptions", "Sequences sent back to be recomputed"),
    "transfer_dropped": ("transfer_dropped", "Transfer messages that named no live ticket"),
    "transfer_refused": ("transfer_refused", "Transfer connections turned away or cut off"),
    "transfer_corrupt": ("transfer_corrupt", "Units of KV that arrived with a wrong digest and were fetched again"),
    "encoder_cache_queries": ("encoder_cache_queries", "Images that embeddings were wanted of"),
    "encoder_cache_hits": ("encoder_cache_hits", "Images whose embeddings were there, or on their way"),
    "encoder_patches": ("encoder_patches", "Patches of images that went through the vision tower"),
    "rank_losses": ("rank_losses", "Ranks that a worker went on without"),
    "embedding_bytes": ("embedding_bytes", "Bytes of embeddings that came from encode workers"),
    "spans_dropped": ("spans_dropped", "Spans of a worker that its collector did not take"),
}
_LIVE = "live"  # a member's state
Members = Mapping[str, Mapping[str, Any]]  # worker id -> role, state, ...: what the controller tells of it


class WorkerGauges(Collector):
    """One series per live worker, from the freshest load that each has reported."""

    def __init__(self, loads: Callable[[], Mapping[str, Load]], infos: Callable[[], Sequence[WorkerInfo]]) -> None:
        self._loads = loads
        self._infos = infos

    def collect(self) -> Iterator[Metric]:
        yield from (*self._lives(), *self._states(), self._pairs(), *self._counters())

    def _lives(self) -> Iterator[Metric]:
        info = GaugeMetricFamily("tercet_worker_info", "1 for each live worker", labels=["worker", "role"])
        text = "How many times the worker was started or given another role; it grows with each"
        epoch = GaugeMetricFamily("tercet_worker_epoch", text, labels=["worker"])
        for worker in self._infos():
            if worker.worker_id in self._loads():
                info.add_metric([worker.worker_id, worker.role.value], 1)
                epoch.add_metric([worker.worker_id], worker.epoch)
        yield from (info, epoch)

    def _states(self) -> Iterator[Metric]:
        running = GaugeMetricFamily(
            "tercet_num_requests_running", "Requests in the running batch of a worker", labels=["worker"]
        )
        waiting = GaugeMetricFamily(
            "tercet_num_requests_waiting", "Requests that a worker has admitted and does not run yet", labels=["worker"]
        )
        usage = GaugeMetricFamily(
            "tercet_kv_cache_usage_perc", "Share of KV blocks that are not free, 0 to 1", labels=["worker"]
        )
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
        yield from (running, waiting, usage, blocks, images, embeddings, lost)

    def _pairs(self) -> GaugeMetricFamily:
        labels = ["worker", "peer", "transport"]
        text = "Bandwidth of a pair of workers, measured when it connected"
        family = GaugeMetricFamily("tercet_kv_pair_bandwidth_bytes_per_second", text, labels=labels)
        for worker, load in self._loads().items():
            for pair in load.pairs:
                family.add_metric([worker, pair.worker_id, pair.transport], pair.bandwidth)
        return family

    def _counters(self) -> Iterator[CounterMetricFamily]:
        for name, (field, text) in _COUNTERS.items():
            family = CounterMetricFamily(f"tercet_{name}", text, labels=["worker"])
            for worker, load in self._loads().items():
                family.add_metric([worker], getattr(load, field))
            yield family


class MemberGauges(Collector):
    """Workers as the controller sees them, those included that do not serve."""

    def __init__(self, target: Callable[[], Mapping[str, int]], members: Callable[[], Members]) -> None:
        """target: role -> workers that are wanted."""
        self._target, self._members = target, members

    def collect(self) -> Iterator[Metric]:
        wanted = GaugeMetricFamily("tercet_workers_wanted", "Workers that a role should have", labels=["role"])
        text = "Workers of a role, by state: starting, live, lost, draining, drained, switching, stopping"
        present = GaugeMetricFamily("tercet_workers", text, labels=["role", "state"])
        counts = Counts((told["role"], told["state"]) for told in self._members().values())
        for role, replicas in self._target().items():
            wanted.add_metric([role], replicas)
            counts[role, _LIVE] += 0  # so that a role without any has a series
        for (role, state), count in sorted(counts.items()):
            present.add_metric([role, state], count)
        yield from (wanted, present)
