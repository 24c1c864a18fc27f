"""Series of mixtures of experts, from what the controller tells the gateway."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from tercet.core import ExpertRows, Moves

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
