"""How a mixture's load lies on its ranks, and how its experts were placed anew, in /metrics."""

from __future__ import annotations

from typing import Any

import pytest

from tercet.core import ExpertRows, Moves
from tercet.metrics import Metrics


def exposed(experts: dict[str, list[ExpertRows]]) -> dict[str, float]:
    metrics = Metrics()
    metrics.experts_told(experts)
    return series_of(metrics)


def series_of(metrics: Metrics) -> dict[str, float]:
    lines = [line for line in metrics.exposition().decode().splitlines() if line.startswith("tercet_expert")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_rows_by_expert_and_by_rank_and_how_even_they_are():
    ranks = [ExpertRows(0, (0, 1, 2), (5, 10, 15), (), (0, 640), 640), ExpertRows(1, (2, 3, 3), (3, 4, 3), (), (32, 0))]
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
        'tercet_expert_sent_bytes_total{rank="0",worker="w"}': 640,
        'tercet_expert_sent_bytes_total{rank="1",worker="w"}': 32,
        'tercet_expert_sent_bytes_total{rank="0",worker="idle"}': 0,
        'tercet_expert_crossing_bytes_total{rank="0",worker="w"}': 640,
        'tercet_expert_crossing_bytes_total{rank="1",worker="w"}': 0,
        'tercet_expert_crossing_bytes_total{rank="0",worker="idle"}': 0,
        'tercet_expert_balancedness{worker="w"}': 20 / 30,
    }


def test_without_a_mixture_there_is_no_series():
    assert exposed({}) == {}


# ---- placed anew


def placed(moves: dict[str, Moves], placing: dict[str, dict[str, Any]]) -> dict[str, float]:
    metrics = Metrics()
    metrics.placement_told(moves, placing)
    return series_of(metrics)


def test_what_a_worker_has_moved():
    moves = Moves(
        epoch=7, layers_left=2, moved_bytes=4096, done=3, failed=1, alarm="a", seconds=9.0, longest_pause_s=0.25
    )
    assert placed({"w": moves, "idle": Moves()}, {}) == {
        'tercet_expert_placement_epoch{worker="w"}': 7,
        'tercet_expert_placement_epoch{worker="idle"}': 0,
        'tercet_expert_move_pause_seconds{worker="w"}': 0.25,
        'tercet_expert_move_pause_seconds{worker="idle"}': 0,
        'tercet_expert_moved_bytes_total{worker="w"}': 4096,
        'tercet_expert_moved_bytes_total{worker="idle"}': 0,
        'tercet_expert_moves_total{outcome="done",worker="w"}': 3,
        'tercet_expert_moves_total{outcome="failed",worker="w"}': 1,
        'tercet_expert_moves_total{outcome="done",worker="idle"}': 0,
        'tercet_expert_moves_total{outcome="failed",worker="idle"}': 0,
    }


SOLVED = {
    'tercet_expert_solves_total{outcome="solved",worker="w"}': 5,
    'tercet_expert_solves_total{outcome="failed",worker="w"}': 2,
}
LAST = {
    "seconds": ('tercet_expert_solve_seconds{worker="w"}', 1.5),
    "gap": ('tercet_expert_placement_gap{worker="w"}', 0.0),
    "gain": ('tercet_expert_placement_gain{worker="w"}', -0.125),
}


def test_what_was_solved_for_a_worker():
    told = {"outcome": "kept", "solves": 5, "failures": 2, "bytes": 10, "seconds": 1.5, "gap": 0.0, "gain": -0.125}
    assert placed({}, {"w": told}) == SOLVED | dict(LAST.values())


@pytest.mark.parametrize("missing", [{}, {"gap": None}, {"gap": 0.0, "gain": None, "seconds": 1.5}])
def test_what_is_not_known_of_the_last_placement_has_no_series(missing):
    told = {"outcome": "ranks are even", "solves": 5, "failures": 2} | missing
    there = dict(LAST[key] for key, value in missing.items() if value is not None)
    assert placed({}, {"w": told}) == SOLVED | there


def test_what_one_worker_does_not_tell_another_one_does():
    told = {"solves": 5, "failures": 2, "gap": 0.0}
    found = placed({"v": Moves(epoch=1)}, {"w": told, "v": {"solves": 0, "failures": 1}})
    assert found['tercet_expert_solves_total{outcome="failed",worker="v"}'] == 1
    assert found['tercet_expert_placement_epoch{worker="v"}'] == 1
    assert [name for name in found if "gap" in name] == ['tercet_expert_placement_gap{worker="w"}']


def test_without_experts_on_several_ranks_there_is_no_series():
    assert placed({}, {}) == {}


def test_the_series_of_a_worker_end_with_it():
    metrics = Metrics()
    metrics.placement_told({"w": Moves()}, {"w": {"solves": 1, "failures": 0}})
    assert series_of(metrics)
    metrics.placement_told({}, {})
    assert series_of(metrics) == {}
