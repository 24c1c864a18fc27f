"""Two slots a GPU and weighted dispatch: groups of experts that share GPUs, against brute force and packing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.placement.experts import Dispatch, RoutingStats, Topology, solve_experts
from tercet.placement.experts.arranging import worst_of
from tercet.placement.experts.balance import weighted_bound
from tercet.placement.experts.packing import packed, replicas_of
from tercet.placement.experts.pairing import _laid_out, can_pair, paired
from tests.few import few
from tests.unit.test_placement_experts import brute_force

ALWAYS = lambda: True  # noqa: E731  # go on


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=9))
def test_a_group_is_laid_out_without_idle_gpus(drawn):
    """Whatever the loads: no GPU has more than tokens over GPUs, if the largest expert may be on all of them."""
    weight = np.array(drawn)
    held = _laid_out(weight, np.arange(len(weight)))
    assert held.shape == (len(weight) - 1, 2)
    assert (held[:, 0] != held[:, 1]).all()
    assert set(held.ravel().tolist()) == set(range(len(weight)))
    if len(weight) > 2:
        level = weight.sum() / len(held)
        topo = Topology(1, len(held), 2)
        assert worst_of(held, weight, topo, Dispatch.WEIGHTED) <= level * (1 + 1e-4)  # as near as shares are solved


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 10**6), st.integers(2, 12), st.data())
def test_every_placement_is_one(seed, gpus, data):
    experts = data.draw(st.integers(gpus + 1, 2 * gpus - 1))
    rng = np.random.default_rng(seed)
    weight = rng.gamma(0.5, 1, experts) * (rng.random(experts) > data.draw(st.sampled_from([0.0, 0.5])))
    weight[0] += 0.1  # a layer without any tokens is told as an even one
    topo = Topology(1, gpus, 2)
    assert can_pair(experts, topo, Dispatch.WEIGHTED)
    held = paired(weight, topo, 0.0, ALWAYS)
    assert held.shape == (gpus, 2)
    assert (held[:, 0] != held[:, 1]).all()
    assert set(held.ravel().tolist()) == set(range(experts))
    assert worst_of(held, weight, topo, Dispatch.WEIGHTED) >= weighted_bound(weight, topo) * (1 - 1e-9)


@pytest.mark.parametrize("seed", few(range(40), 12))
def test_few_experts_are_grouped_about_as_well_as_can_be(seed):
    rng = np.random.default_rng(seed)
    gpus = int(rng.integers(2, 4))
    weight, topo = rng.random(int(rng.integers(gpus + 1, 2 * gpus))) + 0.01, Topology(1, gpus, 2)
    best = brute_force(weight, topo, Dispatch.WEIGHTED)
    found = worst_of(paired(weight, topo, 0.0, ALWAYS), weight, topo, Dispatch.WEIGHTED)
    assert best * (1 - 1e-6) <= found <= best * 1.2
    placed = solve_experts(RoutingStats(weight[None, None]), topo, dispatch=Dispatch.WEIGHTED)
    assert placed.layers[0].objective == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_many_experts_are_nearly_even(seed):
    """Where packing alone leaves the busiest GPU some percent above the mean."""
    rng = np.random.default_rng(seed)
    weight, topo = rng.lognormal(0, 1, 64), Topology(1, 40, 2)
    found = worst_of(paired(weight, topo, 0.0, ALWAYS), weight, topo, Dispatch.WEIGHTED)
    packing = packed(weight, replicas_of(weight, topo), topo)
    assert found < worst_of(packing.held, weight, topo, Dispatch.WEIGHTED)
    assert found <= 1.06 * weighted_bound(weight, topo)


def test_it_ends_when_it_is_told_to():
    weight, topo, asked = np.random.default_rng(0).lognormal(0, 1, 64), Topology(1, 40, 2), []
    held = paired(weight, topo, 0.0, lambda: bool(asked.append(1)))
    assert len(asked) == 1
    assert set(held.ravel().tolist()) == set(range(64))


@pytest.mark.parametrize(
    ("experts", "topo", "dispatch"),
    [
        (12, Topology(1, 8, 2), Dispatch.EVEN),
        (12, Topology(1, 8, 3), Dispatch.WEIGHTED),
        (8, Topology(1, 8, 2), Dispatch.WEIGHTED),
        (16, Topology(1, 8, 2), Dispatch.WEIGHTED),
        (12, Topology(1, 8, 2, least_replicas=2), Dispatch.WEIGHTED),
        (12, Topology(1, 2, 2, gpu_speed=np.array([1.0, 2.0])), Dispatch.WEIGHTED),
    ],
)
def test_other_shapes_are_for_other_solvers(experts, topo, dispatch):
    assert not can_pair(experts, topo, dispatch)
