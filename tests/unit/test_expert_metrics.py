"""How a mixture's load lies on its ranks, in /metrics."""

from __future__ import annotations

from tercet.core import ExpertRows
from tercet.metrics import Metrics


def exposed(experts: dict[str, list[ExpertRows]]) -> dict[str, float]:
    metrics = Metrics()
    metrics.experts_told(experts)
    lines = [line for line in metrics.exposition().decode().splitlines() if line.startswith("tercet_expert")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_rows_by_expert_and_by_rank_and_how_even_they_are():
    ranks = [ExpertRows(0, (0, 1, 2), (5, 10, 15), ()), ExpertRows(1, (2, 3, 3), (3, 4, 3), ())]
    assert exposed({"w": ranks, "idle": [ExpertRows(0, (0, 1), (0, 0), ())]}) == {
        'tercet_expert_rows_total{expert="0",worker="w"}': 5,
        'tercet_expert_rows_total{expert="1",worker="w"}': 10,
        'tercet_expert_rows_total{expert="2",worker="w"}': 18,
        'tercet_expert_rows_total{expert="3",worker="w"}': 7,
        'tercet_expert_rows_total{expert="0",worker="idle"}': 0,
        'tercet_expert_rows_total{expert="1",worker="idle"}': 0,
        'tercet_expert_rank_rows_total{rank="0",worker="w"}': 30,
        'tercet_expert_rank_rows_total{rank="1",worker="w"}': 10,
        'tercet_expert_rank_rows_total{rank="0",worker="idle"}': 0,
        'tercet_expert_balancedness{worker="w"}': 20 / 30,
    }


def test_without_a_mixture_there_is_no_series():
    assert exposed({}) == {}
