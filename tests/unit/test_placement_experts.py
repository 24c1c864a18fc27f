"""Placement of experts, the objective `balance`: certificates against brute force, published examples, and what is
promised of any instance."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tercet.errors import SpecError, UnsupportedSpec
from tercet.placement.experts import (
    Dispatch,
    Objective,
    Placement,
    RoutingStats,
    Topology,
    balance,
    rebalance_experts,
    solve_experts,
)
from tercet.placement.experts.model import NO_SLOT
from tercet.placement.experts.sharing import Sharing
from tests.few import few

HOTNESS = np.array([600.0, 560, 120, 120, 20, 10, 10, 10])  # vLLM PR 37656: 8 GPUs of 2 slots, even dispatch


def stats(weight: np.ndarray) -> RoutingStats:
    """weight [L, E]."""
    return RoutingStats(weight[None])


def random_instance(seed: int, experts: int = 6, gpus: int = 3) -> tuple[np.ndarray, Topology]:
    rng = np.random.default_rng(seed)
    most, slots = int(rng.integers(1, gpus + 1)), int(rng.integers(1, 4))
    count = int(rng.integers(slots, min(experts, most * slots) + 1))
    speed = None if seed % 3 else rng.random(most) + 0.3
    weight = rng.random(count) * rng.choice([0, 1, 1, 10], size=count)
    return weight, Topology(1, most, slots, gpu_speed=speed)


def worst(held: np.ndarray, weight: np.ndarray, topo: Topology, dispatch: Dispatch) -> float:
    count = np.bincount(held.ravel(), minlength=len(weight))
    if dispatch is Dispatch.EVEN:
        return float(((weight / count)[held].sum(axis=1) / topo.speed).max())
    subsets = (list(s) for n in range(1, len(weight) + 1) for s in itertools.combinations(range(len(weight)), n))
    where = [(weight[s].sum(), topo.speed[np.isin(held, s).any(axis=1)].sum()) for s in subsets]
    return float(max(tokens / speed for tokens, speed in where))  # Hall: what only these GPUs can take


def brute_force(weight: np.ndarray, topo: Topology, dispatch: Dispatch) -> float:
    one = itertools.combinations(range(len(weight)), topo.slots_per_gpu)
    held = (np.array(rows) for rows in itertools.product(list(one), repeat=topo.gpus))
    least = topo.least_replicas
    return min(
        worst(h, weight, topo, dispatch) for h in held if (np.bincount(h.ravel(), minlength=len(weight)) >= least).all()
    )


def assert_valid(placement: Placement, topo: Topology, experts: int) -> None:
    for layer, row in enumerate(placement.phy2log):
        held = row.reshape(topo.gpus, topo.slots_per_gpu)
        assert all(len(set(gpu)) == topo.slots_per_gpu for gpu in held.tolist())
        assert set(row.tolist()) == set(range(experts))
        assert placement.count[layer].tolist() == np.bincount(row, minlength=experts).tolist()
        for expert, slots in enumerate(placement.log2phy[layer].tolist()):
            assert [s for s in slots if s != NO_SLOT] == np.flatnonzero(row == expert).tolist()
    prob = placement.dispatch_prob
    assert np.allclose(prob.sum(axis=3), 1, atol=1e-5)
    assert (prob >= 0).all()
    assert (prob[np.broadcast_to(placement.log2phy[:, None] == NO_SLOT, prob.shape)] == 0).all()
    assert all(report.bound <= report.objective * (1 + 1e-9) for report in placement.layers)


def loads(placement: Placement, weight: np.ndarray, topo: Topology) -> np.ndarray:
    """[L, G], by dispatch_prob."""
    found = np.zeros((len(weight), topo.slots + 1))
    for layer, expert in itertools.product(range(len(weight)), range(weight.shape[1])):
        np.add.at(
            found[layer],
            placement.log2phy[layer, expert],
            weight[layer, expert] * placement.dispatch_prob[layer, :, expert].mean(axis=0),
        )
    return found[:, :-1].reshape(len(weight), topo.gpus, -1).sum(axis=2)


# ---- published examples


def test_eplb_gives_its_published_example():
    weight = [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
    phy2log, log2phy, count = rebalance_experts(weight, 16, 4, 2, 8)
    assert phy2log.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    for layer, expert in itertools.product(range(2), range(12)):
        slots = [s for s in log2phy[layer, expert] if s != NO_SLOT]
        assert sorted(slots) == np.flatnonzero(phy2log[layer] == expert).tolist()
        assert len(slots) == count[layer, expert]


@pytest.mark.parametrize(("dispatch", "optimum"), [(Dispatch.EVEN, 196.6667), (Dispatch.WEIGHTED, 181.25)])
def test_the_golden_instance_is_solved_and_certified(monkeypatch, dispatch, optimum):
    monkeypatch.setattr(balance, "EXACT_S", 60.0)  # the proof takes 2 s of a core, which others may want, too
    topo = Topology(1, 8, 2)
    phy2log, _, count = rebalance_experts([HOTNESS], 16, 1, 1, 8)
    eplb = (HOTNESS / count[0])[phy2log[0]].reshape(8, 2).sum(axis=1).max()
    assert eplb == pytest.approx(232)
    [report] = solve_experts(stats(HOTNESS[None]), topo, dispatch=dispatch, time_limit_s=60).layers
    assert report.objective == pytest.approx(optimum, rel=1e-4)
    assert report.bound == pytest.approx(optimum, rel=1e-4)
    assert report.status == "optimal"


# ---- against brute force


SMALL = [(Dispatch.EVEN, range(30)), (Dispatch.WEIGHTED, range(10))]
SMALL += [(Dispatch.EVEN, range(30, 80)), (Dispatch.WEIGHTED, range(10, 30))]


@pytest.mark.parametrize(("dispatch", "seeds"), few(SMALL, 2), ids=str)
def test_small_layers_are_solved_as_by_brute_force(dispatch, seeds):
    for seed in seeds:
        weight, topo = random_instance(seed, 5 if dispatch is Dispatch.WEIGHTED else 6)
        if not weight.sum():
            continue
        optimum = brute_force(weight, topo, dispatch)
        placement = solve_experts(stats(weight[None]), topo, dispatch=dispatch)
        assert placement.layers[0].objective == pytest.approx(optimum, rel=1e-3), seed
        assert placement.layers[0].bound <= optimum * (1 + 1e-6), seed


@pytest.mark.parametrize("dispatch", Dispatch)
def test_with_each_expert_on_two_gpus_small_layers_are_solved_as_by_brute_force(dispatch):
    for seed in range(12):
        rng = np.random.default_rng(seed)
        topo = Topology(1, 3, int(rng.integers(2, 4)), least_replicas=2)
        experts = int(rng.integers(topo.slots_per_gpu, topo.slots // 2 + 1))
        weight = rng.random(experts) ** 3 + 0.001
        optimum = brute_force(weight, topo, dispatch)
        placement = solve_experts(stats(weight[None]), topo, dispatch=dispatch)
        assert (placement.count >= 2).all()
        assert placement.layers[0].objective == pytest.approx(optimum, rel=1e-3), seed
        assert placement.layers[0].bound <= optimum * (1 + 1e-6), seed


@pytest.mark.parametrize("dispatch", Dispatch)
def test_no_expert_falls_below_the_least_replicas_after_drift_or_at_the_deadline(dispatch):
    rng = np.random.default_rng(1)
    topo = Topology(1, 8, 9, expert_bytes=1, least_replicas=2)
    weight = rng.random((6, 32)) ** 4 + 1e-3
    old = solve_experts(stats(weight), topo, dispatch=dispatch, time_limit_s=1.0)
    drifted = np.take_along_axis(weight, rng.permuted(np.tile(np.arange(32), (6, 1)), axis=1), 1)
    for most, limit in ((None, 1.0), (40, 1.0), (0, 1.0), (None, 0.01)):
        moved = solve_experts(
            stats(drifted), topo, dispatch=dispatch, old=old, max_moved_bytes=most, time_limit_s=limit
        )
        assert_valid(moved, topo, 32)
        assert (moved.count >= 2).all()


def test_least_replicas_that_cannot_be_are_refused():
    with pytest.raises(SpecError, match=r"least_replicas is 3; of an expert there are 1 to 2"):
        Topology(1, 2, 4, least_replicas=3)
    with pytest.raises(SpecError, match=r"4 experts do not fill 6 slots, 3 .* each at least 2 times"):
        solve_experts(stats(np.ones((1, 4))), Topology(1, 2, 3, least_replicas=2))
    with pytest.raises(UnsupportedSpec, match="least_replicas with objective internode"):
        solve_experts(stats(np.ones((1, 2))), Topology(1, 2, 2, least_replicas=2), objective=Objective.INTERNODE)


@pytest.mark.parametrize("seeds", few([range(50), range(50, 200)], 1), ids=str)
def test_shares_are_the_best_of_a_placement(seeds):
    """By Hall's condition over all sets of experts; several layers at once, and from other shares."""
    for seed in seeds:
        weight, topo = random_instance(seed, 6, 4)
        rng = np.random.default_rng(seed)
        tokens = rng.random((3, len(weight))) * rng.choice([1, 9], size=(3, len(weight)))
        held = solve_experts(stats(np.tile(weight + 0.01, (3, 1))), topo, time_limit_s=0.001).phy2log
        held = held.reshape(3, topo.gpus, topo.slots_per_gpu)
        sharing = Sharing(held, len(weight), topo.speed)
        for start in (None, sharing.even(tokens * rng.random(tokens.shape))):
            share = sharing.solve(tokens, start, sweeps=300)
            assert (share >= 0).all()
            for layer in range(3):
                given = np.bincount(held[layer].ravel(), share[layer].ravel(), len(weight))
                assert np.allclose(given, tokens[layer])
                level = (share[layer].sum(axis=1) / topo.speed).max()
                best = worst(held[layer], tokens[layer], topo, Dispatch.WEIGHTED)
                assert level == pytest.approx(best, rel=1e-3), seed


# ---- promises


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from(Dispatch))
@example(492, Dispatch.WEIGHTED)  # its shares settle slowly
def test_every_expert_is_placed_and_none_twice_on_a_gpu(seed, dispatch):
    rng = np.random.default_rng(seed)
    topo = Topology(int(rng.integers(1, 3)), int(rng.integers(1, 5)), int(rng.integers(1, 5)))
    experts = int(rng.integers(topo.slots_per_gpu, topo.slots + 1))
    weight = rng.random((2, experts)) ** 4 * rng.choice([0, 1, 50], size=(2, experts))
    placement = solve_experts(stats(weight), topo, dispatch=dispatch, time_limit_s=0.3)
    assert_valid(placement, topo, experts)
    busiest = loads(placement, stats(weight).weight, topo).max(axis=1)
    assert busiest == pytest.approx([report.objective for report in placement.layers], rel=2e-3)


@pytest.mark.parametrize("seconds", [1e-9, 0.01])
def test_a_deadline_still_gives_a_valid_plan(seconds):
    weight = np.random.default_rng(0).lognormal(0, 0.8, (8, 64))
    topo = Topology(2, 4, 9)
    placement = solve_experts(stats(weight), topo, time_limit_s=seconds)
    assert_valid(placement, topo, 64)
    assert {report.status for report in placement.layers} <= {"deadline", "optimal"}


def test_the_greedy_plan_is_never_beaten_downwards():
    weight = np.random.default_rng(1).lognormal(0, 0.8, (6, 48))
    for dispatch in Dispatch:
        greedy, full = (
            solve_experts(stats(weight), Topology(2, 4, 8), dispatch=dispatch, time_limit_s=s) for s in (1e-9, 5.0)
        )
        assert all(f.objective <= g.objective for f, g in zip(full.layers, greedy.layers, strict=True))


def test_the_same_counts_give_the_same_plan():
    weight = np.random.default_rng(2).lognormal(0, 0.8, (4, 40))
    once, again = (solve_experts(stats(weight), Topology(2, 3, 8), time_limit_s=60) for _ in range(2))
    assert once.phy2log.tolist() == again.phy2log.tolist()
    assert once.dispatch_prob.tolist() == again.dispatch_prob.tolist()


def test_a_faster_gpu_gets_more():
    speed = np.array([1.0, 1, 1, 3])
    topo = Topology(1, 4, 8, gpu_speed=speed)
    weight = np.random.default_rng(3).lognormal(0, 0.5, (1, 24))
    placement = solve_experts(stats(weight), topo)
    assert placement.layers[0].gap < 0.01
    assert loads(placement, weight, topo)[0] == pytest.approx(weight.sum() * speed / 6, rel=0.02)


# ---- from an old placement


def drifted(seed: int, deviation: float) -> tuple[Placement, np.ndarray, Topology]:
    rng, topo = np.random.default_rng(seed), Topology(2, 4, 9, expert_bytes=1000)
    weight = rng.lognormal(0, 0.8, (4, 64))
    return solve_experts(stats(weight), topo), weight * rng.lognormal(0, deviation, weight.shape), topo


@pytest.mark.parametrize("deviation", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("most", few([0, 7, None, 1, 40], 3))
def test_no_more_than_allowed_moves_and_nothing_gets_worse(deviation, most):
    old, weight, topo = drifted(4, deviation)
    before = loads(solve_experts(stats(weight), topo, old=old, max_moved_bytes=0), weight, topo).max(axis=1)
    placement = solve_experts(stats(weight), topo, old=old, max_moved_bytes=None if most is None else most * 1000 + 999)
    assert_valid(placement, topo, 64)
    moved = (placement.phy2log != old.phy2log).sum(axis=1)
    assert [report.moved_slots for report in placement.layers] == moved.tolist()
    assert [report.moved_bytes for report in placement.layers] == (moved * 1000).tolist()
    assert most is None or moved.sum() <= most
    assert (loads(placement, weight, topo).max(axis=1) <= before * (1 + 1e-4)).all()


def test_a_little_drift_is_mended_by_few_moves():
    old, weight, topo = drifted(5, 0.1)
    placement = solve_experts(stats(weight), topo, old=old, time_limit_s=60)
    assert max(report.max_over_mean for report in placement.layers) < 1.03
    assert max(report.moved_slots for report in placement.layers) <= 10


def test_what_has_not_changed_moves_nothing():
    old, _, topo = drifted(6, 0.0)
    weight = np.random.default_rng(6).lognormal(0, 0.8, (4, 64))
    placement = solve_experts(stats(weight), topo, old=old)
    assert placement.phy2log.tolist() == old.phy2log.tolist()


# ---- refusals


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"load": np.array([[[1.0, np.nan]]])}, "1 values that are no finite numbers"),
        ({"load": np.array([[[1.0, -2.0]]])}, "1 values below 0"),
        ({"load": np.ones((2, 2))}, "load has 2 dimensions"),
        ({"load": np.zeros((0, 1, 4))}, "nothing was counted"),
        ({"load": np.ones((1, 2, 4)), "top_k": 5}, "top_k 5 of 4 experts"),
        ({"load": np.ones((1, 2, 4)), "source_load": np.ones((2, 3, 5))}, "source_load is"),
        ({"load": np.ones((1, 2, 4)), "pair": np.ones((2, 4, 4))}, "pair is"),
    ],
)
def test_counts_that_cannot_be_are_refused_by_name(changes, said):
    with pytest.raises(SpecError, match=said):
        RoutingStats(**changes)


def test_nothing_counted_yet_is_placed_evenly():
    placement = solve_experts(stats(np.zeros((1, 8))), Topology(1, 4, 2))
    assert placement.layers[0].max_over_mean == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"topo": Topology(1, 2, 3)}, SpecError, "8 experts do not fill 6 slots"),
        ({"topo": Topology(1, 2, 9)}, SpecError, "8 experts do not fill 18 slots, 9 different ones"),
        ({"objective": Objective.INTERNODE}, SpecError, "source_load"),
        ({"objective": Objective.INTERLAYER, "max_moved_bytes": 5}, UnsupportedSpec, "max_moved_bytes with objective"),
        ({"time_limit_s": 0.0}, SpecError, "time_limit_s is 0.0"),
        ({"time_limit_s": float("nan")}, SpecError, "time_limit_s is nan"),
        ({"max_moved_bytes": 5}, SpecError, "max_moved_bytes 5"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(arguments, error, said):
    given = {"topo": Topology(1, 4, 2)} | arguments
    with pytest.raises(error, match=said):
        solve_experts(stats(np.ones((1, 8))), given.pop("topo"), **given)


def test_an_old_placement_of_another_shape_is_refused():
    old = solve_experts(stats(np.ones((1, 8))), Topology(1, 4, 2))
    with pytest.raises(SpecError, match=r"layers and slots \(1, 8\), not \(2, 8\)"):
        solve_experts(stats(np.ones((2, 8))), Topology(1, 4, 2), old=old)
    with pytest.raises(SpecError, match="nodes is 0"):
        replace(Topology(1, 4, 2), nodes=0)
    with pytest.raises(SpecError, match="gpu_speed must be 4 numbers above 0"):
        Topology(1, 4, 2, gpu_speed=np.array([1.0, 0, 1, 1]))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((16, 5, 2, 8), "do not divide"),
        ((15, 4, 2, 8), "do not divide"),
        ((8, 4, 2, 8), "8 replicas are fewer than 12 experts"),
    ],
)
def test_eplb_refuses_what_does_not_divide(arguments, said):
    with pytest.raises(SpecError, match=said):
        rebalance_experts(np.ones((1, 12)), *arguments)
