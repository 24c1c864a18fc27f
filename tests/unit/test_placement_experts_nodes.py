"""Experts onto nodes: small layers as enumeration has them, plans that keep what they must, refusals by name."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy.optimize import linprog

from tercet.errors import SpecError, UnsupportedSpec
from tercet.placement.experts import Dispatch, Objective, RoutingStats, Topology, rebalance_experts, solve_experts
from tercet.placement.experts import node_search as search
from tercet.placement.experts.homes import homes_of, source_load_of
from tercet.placement.experts.model import NO_SLOT
from tercet.placement.experts.node_search import chord_bound
from tercet.placement.experts.scoring import dispatched, evenly, node_copies, score

NODE_OBJECTIVES = [Objective.INTERNODE, Objective.INTERNODE_DEDUP]


def stats_of(source, top_k=1):
    return RoutingStats(source.sum(axis=1)[None], source, top_k=top_k)


def drawn(rng, layers, nodes, experts):
    """Hot experts, uneven sources, and some that nobody asks."""
    tokens = rng.lognormal(0, 1, (layers, 1, experts)) * rng.lognormal(0, 1, (layers, nodes, experts)) * 100
    return tokens * (rng.random(tokens.shape) > 0.1)


def cheapest(tokens, copies, most, each):
    """tokens [N, E], copies [E, N] -> the fewest tokens that leave their node; None if the limits cannot be kept."""
    nodes, experts = tokens.shape
    cost = np.broadcast_to(1 - np.eye(nodes)[:, None, :], (nodes, experts, nodes))
    flow = np.arange(cost.size).reshape(cost.shape)
    rows, limits = [], []
    for node in range(nodes):
        rows.append(np.isin(flow, flow[:, :, node]).ravel())
        limits.append(most)
        for expert in range(experts):
            rows.append(np.isin(flow, flow[:, expert, node]).ravel())
            limits.append(each * copies[expert, node])
    equal = np.array([np.isin(flow, flow[s, e]).ravel() for s in range(nodes) for e in range(experts)], float)
    found = linprog(cost.ravel(), np.array(rows, float), limits, equal, tokens.ravel())
    return found.fun if found.success else None


def enumerated(tokens, topo, eps, kappa):
    """Over all numbers of replicas."""
    mean, slots = tokens.sum() / topo.gpus, topo.gpus_per_node * topo.slots_per_gpu
    counts = product(range(topo.gpus_per_node + 1), repeat=tokens.shape[1])
    node = [count for count in counts if sum(count) == slots]
    found = []
    for each in product(node, repeat=topo.nodes):
        copies = np.array(each).T
        if (copies.sum(axis=1) > 0).all():
            found.append(cheapest(tokens, copies, (1 + eps) * mean * topo.gpus_per_node, kappa * mean))
    return min((cost for cost in found if cost is not None), default=None)


@pytest.mark.parametrize(("shape", "experts"), [((2, 2, 1), 3), ((2, 2, 1), 4), ((3, 1, 2), 4), ((2, 2, 2), 4)])
@pytest.mark.parametrize("eps", [0.05, 0.4])
def test_small_layers_equal_brute_force(shape, experts, eps, monkeypatch):
    monkeypatch.setattr(search, "GAP", 1e-7)
    topo, rng = Topology(*shape), np.random.default_rng([*shape, experts])
    source = drawn(rng, 2, topo.nodes, experts)
    placement = solve_experts(stats_of(source), topo, objective=Objective.INTERNODE, eps=eps, kappa=1.1)
    for tokens, report in zip(source, placement.layers, strict=True):
        best = enumerated(tokens, topo, eps, 1.1)
        assert (best is None) == bool(report.relaxed)
        if best is not None:
            assert report.objective == pytest.approx(best, rel=1e-5, abs=1e-5 * tokens.sum())
            assert report.bound <= best * (1 + 1e-6)


def instance(seed):
    rng = np.random.default_rng(seed)
    nodes, gpus, slots = (int(rng.integers(low, high)) for low, high in ((1, 5), (1, 4), (1, 3)))
    topo = Topology(nodes, gpus, slots)
    if seed % 3 == 0:
        topo = Topology(nodes, gpus, slots, gpu_speed=rng.uniform(0.5, 1.5, topo.gpus))
    experts = int(rng.integers(slots, topo.slots + 1))
    groups = 0
    if seed % 4 == 0 and experts // nodes >= slots:
        groups = nodes
        experts -= experts % nodes
    return topo, drawn(rng, 2, nodes, experts), groups, int(rng.integers(1, min(8, experts) + 1))


def check_valid(placement, source, topo, groups):
    experts = source.shape[2]
    for phy2log in placement.phy2log.reshape(len(source), topo.gpus, -1):
        assert all(len({*own}) == topo.slots_per_gpu for own in phy2log.tolist())
    assert (placement.count > 0).all()
    assert placement.count.sum(axis=1).tolist() == [topo.slots] * len(source)
    prob, pads = placement.dispatch_prob, placement.log2phy == NO_SLOT
    np.testing.assert_allclose(prob.sum(axis=3), 1, atol=1e-5)
    assert (prob >= 0).all()
    assert not prob.transpose(0, 2, 3, 1)[pads].any()
    if groups:
        on = np.zeros((len(source), experts, topo.nodes), bool)
        for layer, phy2log in enumerate(placement.phy2log.reshape(len(source), topo.nodes, -1)):
            for node, own in enumerate(phy2log):
                on[layer, own, node] = True
        assert on.reshape(len(source), groups, -1, topo.nodes).all(axis=2).any(axis=2).all()


def check_limits(placement, source, topo, eps, kappa):
    """As asked, or as reported."""
    to_slot = dispatched(placement, source, Dispatch.WEIGHTED).sum(axis=1)
    speed = topo.speed.reshape(topo.nodes, -1).mean(axis=1)
    for layer, report in enumerate(placement.layers):
        limit = {"eps": eps, "kappa": kappa}
        limit |= {name: float(value) for name, value in (each.split() for each in report.relaxed.split(", ") if each)}
        mean = source[layer].sum() / topo.gpus * speed
        of_node = to_slot[layer].reshape(topo.nodes, -1)
        assert (of_node.sum(axis=1) <= (1 + limit["eps"] + 1e-3) * mean * topo.gpus_per_node).all()
        for node, own in enumerate(placement.phy2log[layer].reshape(topo.nodes, -1)):
            count = np.bincount(own)
            tokens = np.bincount(own, of_node[node])
            assert (tokens <= (limit["kappa"] + 1e-3) * mean[node] * count).all()


@pytest.mark.parametrize("objective", NODE_OBJECTIVES)
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 8))])
def test_plans_are_valid(objective, part):
    for seed in range(part * 15, part * 15 + 15):
        topo, source, groups, top_k = instance(seed)
        stats = stats_of(source, top_k)
        placement = solve_experts(stats, topo, objective=objective, eps=0.1, kappa=0.8, keep_groups=groups)
        check_valid(placement, source, topo, groups)
        check_limits(placement, source, topo, 0.1, 0.8)
        worth, total = score(placement, stats, topo, Dispatch.WEIGHTED), source.sum(axis=(1, 2))
        for layer, report in enumerate(placement.layers):
            assert report.bound <= report.objective
            assert report.max_over_mean == pytest.approx(worth.max_over_mean[layer])
            crossing = worth.cross_node[layer] * total[layer]
            copies = worth.node_copies[layer] * total[layer] / top_k
            expected = crossing if objective is Objective.INTERNODE else copies
            assert report.objective == pytest.approx(expected, rel=1e-4, abs=1e-4 * total[layer])


@pytest.mark.parametrize("seed", range(5))
def test_dedup_sends_no_more_copies(seed):
    """Than the plan that it begins with; and none is below the bound."""
    topo, rng = Topology(4, 2, 2), np.random.default_rng(seed)
    stats = stats_of(drawn(rng, 1, 4, 12), top_k=4)
    once, each = (solve_experts(stats, topo, objective=objective, eps=0.1) for objective in NODE_OBJECTIVES[::-1])
    copies = [float(score(placement, stats, topo, Dispatch.WEIGHTED).node_copies[0]) for placement in (once, each)]
    assert copies[0] <= copies[1] * (1 + 1e-5)
    assert once.layers[0].bound <= each.layers[0].objective


@pytest.mark.parametrize("seed", range(20))
def test_no_flow_is_below_the_chord(seed):
    rng = np.random.default_rng(seed)
    plan = search.NodeSearch(drawn(rng, 1, 3, 9)[0], Topology(3, 2, 2), Objective.INTERNODE_DEDUP, 4, 0, 0).plan
    limits = search.NodeLayer(plan.flow.sum(axis=2), 4, 2, plan.flow.sum(axis=(0, 1)), np.ones(3))
    assert chord_bound(limits, plan.crossing, 4) <= float(node_copies(plan.flow.sum(axis=1), 4)) * (1 + 1e-9)


@pytest.mark.parametrize("objective", NODE_OBJECTIVES)
def test_same_seed_same_plan(objective):
    stats = stats_of(drawn(np.random.default_rng(0), 3, 2, 10), 2)
    plans = [
        solve_experts(stats, Topology(2, 3, 2), objective=objective, seed=7, workers=workers) for workers in (1, 1, 2)
    ]
    for plan in plans[1:]:
        assert (plan.phy2log == plans[0].phy2log).all()
        assert (plan.dispatch_prob == plans[0].dispatch_prob).all()


@pytest.mark.parametrize("objective", NODE_OBJECTIVES)
def test_ten_milliseconds_are_enough_for_a_plan(objective):
    topo, source = Topology(4, 4, 5), drawn(np.random.default_rng(0), 3, 4, 64)
    placement = solve_experts(stats_of(source, 4), topo, objective=objective, time_limit_s=0.01)
    check_valid(placement, source, topo, 0)
    assert {report.status for report in placement.layers} == {"deadline"}
    assert all(0 < report.bound <= report.objective for report in placement.layers)


def test_never_worse_than_greedy():
    topo, source = Topology(2, 4, 5), drawn(np.random.default_rng(1), 2, 2, 32)
    stats = stats_of(source, 4)
    greedy, solved = (
        solve_experts(stats, topo, objective=Objective.INTERNODE, eps=0.1, time_limit_s=seconds)
        for seconds in (0.01, 10)
    )
    for before, after in zip(greedy.layers, solved.layers, strict=True):
        assert after.objective < before.objective
        assert after.gap <= 2e-3
        assert after.bound >= before.bound


def test_gpus_keep_their_node():
    topo, source = Topology(2, 2, 3), drawn(np.random.default_rng(2), 2, 2, 8)
    first = solve_experts(stats_of(source), topo, objective=Objective.INTERNODE)
    again = solve_experts(stats_of(source), topo, objective=Objective.INTERNODE, old=first)
    assert [report.moved_slots for report in again.layers] == [0, 0]


def test_silent_layers_and_nodes():
    source = drawn(np.random.default_rng(3), 2, 3, 8)
    source[0], source[1, 2] = 0, 0
    placement = solve_experts(stats_of(source), Topology(3, 2, 2), objective=Objective.INTERNODE)
    check_valid(placement, source, Topology(3, 2, 2), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": -0.1}, "eps is -0.1"),
        ({"eps": np.nan}, "eps is nan"),
        ({"kappa": 0}, "kappa is 0"),
        ({"kappa": np.inf}, "kappa is inf"),
        ({"workers": 0}, "workers is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**31}, "seed is 2147483648"),
        ({"keep_groups": -1}, "keep_groups is -1"),
        ({"keep_groups": 3}, "keep_groups 3 must divide 8 experts"),
        ({"keep_groups": 1}, "and 2 nodes must divide it"),
        ({"time_limit_s": 0}, "time_limit_s is 0"),
    ],
)
def test_refuses_values(changes, message):
    stats = stats_of(drawn(np.random.default_rng(0), 1, 2, 8))
    with pytest.raises(SpecError, match=message):
        solve_experts(stats, Topology(2, 2, 2), objective=Objective.INTERNODE, **changes)


def test_refuses_what_it_cannot_do():
    source, topo = drawn(np.random.default_rng(0), 1, 2, 8), Topology(2, 2, 2)
    solve = {"objective": Objective.INTERNODE}
    with pytest.raises(SpecError, match="source_load is missing"):
        solve_experts(RoutingStats(source.sum(axis=1)[None]), topo, **solve)
    with pytest.raises(SpecError, match="source_load is of 2 nodes, the topology has 4"):
        solve_experts(stats_of(source), Topology(4, 1, 2), **solve)
    with pytest.raises(SpecError, match="8 experts do not fill 4 slots"):
        solve_experts(stats_of(source), Topology(2, 1, 2), **solve)
    with pytest.raises(SpecError, match="4 experts of a node do not fill"):
        solve_experts(stats_of(source), Topology(2, 2, 5), keep_groups=2, **solve)
    with pytest.raises(UnsupportedSpec, match="dispatch must be weighted"):
        solve_experts(stats_of(source), topo, dispatch=Dispatch.EVEN, **solve)


def test_score_of_a_known_placement():
    """Two experts, each on one node: all tokens of the other node cross; one draw of two, half of them there."""
    topo, source = Topology(2, 1, 1), np.array([[[30.0, 10.0], [10.0, 10.0]]])
    phy2log, _, _ = rebalance_experts(source.sum(axis=1), 2, 1, 1, 2)
    found = score(evenly(phy2log, 2, 2), stats_of(source, 2), topo, Dispatch.EVEN)
    assert found.cross_node == pytest.approx([20 / 60])
    assert found.max_over_mean == pytest.approx([40 / 30])
    assert found.node_copies == pytest.approx([(20 * (1 - 0.75**2) + 10 * (1 - 0.5**2)) / 30])


def test_homes_are_where_the_experts_are():
    source = np.array([[[90.0, 10.0], [10.0, 90.0]]])
    placement = evenly(np.array([[1, 0]]), 2, 2)
    counts = np.array([[[9.0, 1.0]], [[1.0, 9.0]], [[8.0, 2.0]], [[7.0, 3.0]]])
    homes = homes_of(counts, placement, np.array([2, 2]))
    assert homes.tolist() == [1, 0, 1, 0]
    assert source_load_of(counts, homes, 2).tolist() == [[[8.0, 12.0], [17.0, 3.0]]]
    assert source.shape == source_load_of(counts, homes, 2).shape
    with pytest.raises(SpecError, match="4 sequences do not fit"):
        homes_of(counts, placement, np.array([1, 2]))
