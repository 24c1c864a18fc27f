"""Objective `interlayer`: the exact chain, the descent and the bound against brute force, and what a plan must be."""

from itertools import combinations, count, product

import numpy as np
import pytest

from benchmarks.placement_chain import eplb_of
from benchmarks.placement_load import routing
from tercet.errors import SpecError
from tercet.placement.experts import Dispatch, Objective, RoutingStats, Topology, local_fraction, solve_experts
from tercet.placement.experts.chain_bound import Side, stays_at_most
from tercet.placement.experts.chain_descent import Descent, good_chain, items_of
from tercet.placement.experts.chain_exact import best_chain, is_few
from tercet.placement.experts.chain_model import Task, local_pairs, units_of
from tercet.placement.experts.tables import placement_of
from tests.few import few

SHAPES = [(1, 2, 2), (1, 3, 1), (1, 2, 1), (2, 1, 2), (2, 2, 1), (1, 1, 4)]  # nodes, GPUs of each, slots of each


def always():
    return True


def partitions(experts, gpus, slots):
    """All placements without replicas: held [G, K]."""
    if not gpus:
        return [[]]
    return [
        [list(first), *rest]
        for first in combinations(experts, slots)
        for rest in partitions([e for e in experts if e not in first], gpus - 1, slots)
    ]


def worst_of_all(held, weight, topo):
    return np.array([weight[held_there].sum(axis=1) / topo.speed for held_there in held]).max(axis=1)


def task_of(seed, shape=None, layers=3, eps=None, speeds=False):
    rng = np.random.default_rng(seed)
    topo = Topology(*(shape or SHAPES[seed % len(SHAPES)]))
    if speeds:
        topo = Topology(
            topo.nodes, topo.gpus_per_node, topo.slots_per_gpu, gpu_speed=rng.choice([1.0, 1.5], size=topo.gpus)
        )
    experts = topo.slots
    weight = rng.gamma(1.0, size=(layers, experts)) * 100
    pair = rng.poisson(rng.gamma(0.5, size=(layers - 1, experts, experts)) * 20).astype(float)
    every = np.array(partitions(range(experts), topo.gpus, topo.slots_per_gpu), dtype=np.int32)
    worst = np.array([worst_of_all(every, row, topo) for row in weight])
    floor = every[worst.argmin(axis=1)]
    eps = rng.choice([0.0, 0.1, 0.5, np.inf]) if eps is None else eps
    return Task(weight, pair, topo, Dispatch.WEIGHTED, floor, worst.min(axis=1), eps), every, worst


def stays_of(task, held):
    return local_pairs(placement_of(held, task.weight, task.topo, task.dispatch), task.pair, task.topo)


def brute(task, every, worst):
    """The most pairs that stay of all chains within the limits."""
    unit = np.empty((len(every), task.topo.slots), int)
    for row, held in zip(unit, every, strict=True):
        row[held.ravel()] = np.arange(task.topo.slots) // (task.topo.slots // task.units)
    allowed = [np.flatnonzero(each <= most * (1 + 1e-9)) for each, most in zip(worst, task.most, strict=True)]
    same = unit[:, None, :, None] == unit[None, :, None, :]
    joint = [np.einsum("stef,ef->st", same, pair) for pair in task.pair]
    best = max(
        sum(table[a, b] for table, a, b in zip(joint, chain, chain[1:], strict=False)) for chain in product(*allowed)
    )
    return best, [float(joint[at][np.ix_(allowed[at], allowed[at + 1])].max()) for at in range(len(joint))]


def valid(plan, topo, experts):
    held = plan.phy2log.reshape(-1, topo.gpus, topo.slots_per_gpu)
    for layer in held:
        assert set(layer.ravel().tolist()) == set(range(experts))
        assert all(len(set(gpu.tolist())) == topo.slots_per_gpu for gpu in layer)


@pytest.mark.parametrize("seed", [*range(40), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(40, 240))])
def test_chain_equals_brute_force(seed):
    task, every, worst = task_of(seed, layers=3 if seed % 6 else 2, speeds=seed % 4 == 3)
    best, each = brute(task, every, worst)
    assert is_few(task)
    held = best_chain(task, always)
    assert stays_of(task, held).sum() == pytest.approx(best)
    for layer, weight, most in zip(held, task.weight, task.most, strict=True):
        assert (weight[layer].sum(axis=1) / task.topo.speed).max() <= most * (1 + 1e-9)
    top = task.most * task.unit_speed.sum(axis=1).max()
    ones = np.ones(task.topo.slots, np.int32)
    sides = [Side(weight, ones, limit) for weight, limit in zip(task.weight, top, strict=True)]
    for at, pair in enumerate(task.pair):
        bound = stays_at_most(pair, sides[at], sides[at + 1], task.units, task.topo.slots // task.units)
        assert bound >= each[at] - 1e-9 * pair.sum()
    found = good_chain(task, np.random.default_rng(seed), always)
    assert stays_of(task, found).sum() <= best * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(30))
def test_descent_keeps_the_limits(seed):
    task, _, _ = task_of(seed, layers=5)
    descent, rng = Descent(task, items_of(task)), np.random.default_rng(seed)
    descent.build(rng, 0, always)
    reached = [descent.stays]
    descent.sweeps(rng, always)
    reached.append(descent.stays)
    assert reached == sorted(reached)
    held = descent.held()
    assert stays_of(task, held).sum() == pytest.approx(descent.stays)
    for layer, weight, most in zip(held, task.weight, task.most, strict=True):
        assert sorted(layer.ravel().tolist()) == list(range(task.topo.slots))
        assert (weight[layer].sum(axis=1) / task.topo.speed).max() <= most * (1 + 1e-4)


def counted(seed, layers, experts, nodes=1):
    rng = np.random.default_rng(seed)
    traffic = routing(rng, layers, experts, 2)
    return traffic.counted(rng, traffic.topics_of(rng, nodes, 50), 200)


@pytest.mark.parametrize(
    ("experts", "shape", "dispatch"),  # where the balance placement is soon found
    few(
        [
            (8, (1, 4, 2), Dispatch.EVEN),
            (8, (2, 2, 2), Dispatch.WEIGHTED),
            (8, (1, 1, 8), Dispatch.WEIGHTED),
            (16, (2, 2, 5), Dispatch.WEIGHTED),
            (64, (2, 4, 9), Dispatch.EVEN),
            (16, (1, 4, 5), Dispatch.WEIGHTED),
            (64, (1, 8, 9), Dispatch.EVEN),
            (128, (2, 8, 9), Dispatch.WEIGHTED),
        ],
        5,
    ),
)
def test_plan(experts, shape, dispatch):
    stats, topo = counted(3, 5, experts, shape[0]), Topology(*shape, expert_bytes=7)
    how = {"dispatch": dispatch, "time_limit_s": 60.0}
    floor = solve_experts(stats, topo, **how)
    plan = solve_experts(stats, topo, objective=Objective.INTERLAYER, **how)
    again = solve_experts(stats, topo, objective=Objective.INTERLAYER, **how)
    valid(plan, topo, experts)
    assert (plan.phy2log == again.phy2log).all()
    assert local_fraction(plan, stats.pair, topo) >= local_fraction(floor, stats.pair, topo)
    for layer, least in zip(plan.layers, floor.layers, strict=True):
        assert 0 <= layer.bound <= layer.objective
        assert layer.max_over_mean <= least.max_over_mean * 1.05 * (1 + 2e-4)
    leaves = sum(layer.objective for layer in plan.layers)
    assert 1 - leaves / stats.pair.sum() == pytest.approx(local_fraction(plan, stats.pair, topo))
    moved = solve_experts(stats, topo, objective=Objective.INTERLAYER, old=floor, **how)
    valid(moved, topo, experts)
    assert local_fraction(moved, stats.pair, topo) == pytest.approx(local_fraction(plan, stats.pair, topo), rel=1e-4)
    changed = (moved.phy2log != floor.phy2log).sum(axis=1)
    assert [layer.moved_bytes for layer in moved.layers] == (7 * changed).tolist()
    stays = solve_experts(stats, topo, objective=Objective.INTERLAYER, old=plan, **how)
    assert sum(each.moved_slots for each in stays.layers) == 0


@pytest.mark.slow
def test_descent_is_near_the_exact_chain():
    stats, topo = counted(0, 32, 8), Topology(1, 4, 2)
    for eps in (0.05, np.inf):
        floor = solve_experts(stats, topo, time_limit_s=5)
        worst = np.array([layer.objective for layer in floor.layers])
        held = floor.phy2log.reshape(32, 4, 2)
        task = Task(stats.weight, stats.pair, topo, Dispatch.WEIGHTED, held, worst, eps)
        exact = stays_of(task, best_chain(task, always)).sum()
        found = stays_of(task, good_chain(task, np.random.default_rng(0), always)).sum()
        assert 0.97 * exact <= found <= exact


def test_better_than_eplb_on_held_out_counts():
    rng, topo = np.random.default_rng(1), Topology(1, 4, 2)
    traffic = routing(rng, 32, 8, 2)
    topics = traffic.topics_of(rng, 1, 200)
    stats, later = traffic.counted(rng, topics, 500), traffic.counted(rng, topics, 500)
    plan = solve_experts(stats, topo, objective=Objective.INTERLAYER)
    assert {layer.status for layer in plan.layers} == {"optimal"}
    assert local_fraction(plan, later.pair, topo) > 1.2 * local_fraction(eplb_of(stats, topo), later.pair, topo)


def test_a_deadline_of_10_ms():
    stats, topo = counted(4, 8, 64, 2), Topology(2, 4, 9)
    plan = solve_experts(stats, topo, objective=Objective.INTERLAYER, time_limit_s=0.01)
    valid(plan, topo, 64)
    assert all(layer.bound <= layer.objective for layer in plan.layers)


@pytest.mark.parametrize("last", range(1, 40, 3))
def test_a_deadline_anywhere(last):
    stats, topo, ticks = counted(4, 4, 16), Topology(1, 4, 5), count()
    plan = solve_experts(
        stats, topo, objective=Objective.INTERLAYER, time_limit_s=float(3 * last), clock=lambda: float(next(ticks))
    )
    valid(plan, topo, 16)


@pytest.mark.slow
def test_no_pairs():
    stats = counted(5, 3, 16)
    silent = RoutingStats(stats.load, pair=np.zeros_like(stats.pair))
    for topo in (Topology(1, 4, 4), Topology(1, 4, 5), Topology(1, 2, 8)):
        plan = solve_experts(silent, topo, objective=Objective.INTERLAYER)
        valid(plan, topo, 16)
        assert [(layer.objective, layer.bound) for layer in plan.layers] == [(0.0, 0.0)] * 3
        assert local_fraction(plan, silent.pair, topo) == 0.0


def test_replica_counts_in_full():
    """Expert 1 of the second layer is on both GPUs: its pairs stay wherever their first expert is."""
    stats, topo = RoutingStats(np.ones((1, 2, 3))), Topology(1, 2, 2)
    plan = placement_of(np.array([[[0, 1], [1, 2]], [[0, 1], [1, 2]]]), stats.weight, topo, Dispatch.EVEN)
    pair = np.zeros((1, 3, 3))
    pair[0, 0, 1], pair[0, 2, 1], pair[0, 1, 0], pair[0, 0, 2] = 5, 7, 4, 9
    assert local_pairs(plan, pair, topo).tolist() == [5 + 7 + 4 / 2]


def test_units():
    assert [units_of(Topology(*shape)) for shape in ((1, 4, 2), (2, 4, 2), (3, 1, 2))] == [4, 2, 3]


@pytest.mark.parametrize(
    ("load", "pair", "eps", "said"),
    [
        ((1, 3, 4), None, 0.05, "needs pairs"),
        ((1, 1, 4), (0, 4, 4), 0.05, "at least 2 layers"),
        ((1, 2, 4), (1, 4, 4), -1.0, "eps is -1.0"),
        ((1, 2, 4), (1, 4, 4), float("nan"), "eps is nan"),
    ],
)
def test_refusals(load, pair, eps, said):
    stats = RoutingStats(np.ones(load), pair=None if pair is None else np.ones(pair))
    with pytest.raises(SpecError, match=said):
        solve_experts(stats, Topology(1, 2, 2), objective=Objective.INTERLAYER, eps=eps)


@pytest.mark.parametrize("seed", range(20))
def test_bound_with_replicas(seed):
    """Any placement with these counts, with shares as they come, is below the bound."""
    rng, topo, experts = np.random.default_rng(seed), Topology(1, 3, 3), 6
    weight, pair = rng.gamma(1.0, size=(2, experts)), rng.poisson(rng.gamma(0.5, size=(1, experts, experts)) * 20) * 1.0
    choices = list(combinations(range(experts), 3))
    plans = [np.array([[choices[at] for at in rng.integers(20, size=3)] for _ in range(2)]) for _ in range(400)]
    for held in (each for each in plans if all(len(np.unique(layer)) == experts for layer in each)):
        plan = placement_of(held, weight, topo, Dispatch.EVEN)
        loads = np.array([(row / n)[its].sum(axis=1) for row, n, its in zip(weight, plan.count, held, strict=True)])
        sides = [Side(*each) for each in zip(weight, plan.count, loads.max(axis=1), strict=True)]
        assert local_pairs(plan, pair, topo)[0] <= stays_at_most(pair[0], *sides, 3, 3) * (1 + 1e-6)
