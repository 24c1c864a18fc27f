"""Placement: within every node's resources and labels, spread, found whenever there is one."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.core import Role
from tercet.errors import ClusterError, SpecError
from tercet.placement.roles import Node, plan, scaled
from tercet.spec import ClusterSpec, NetworkSpec, PoolSpec, RoleSpec


def spec_of(prefill: RoleSpec, decode: RoleSpec, pools: dict[str, PoolSpec] | None = None, host="loopback"):
    return ClusterSpec(
        pools=pools or {"default": PoolSpec()},
        roles={Role.PREFILL: prefill, Role.DECODE: decode},
        network=NetworkSpec(host=host),
    )


def node(name: str, cpus: float, **labels: str) -> Node:
    return Node(name, "10.0.0.1", labels, {"CPU": cpus})


def test_replicas_are_spread_and_the_gateway_stays_at_home():
    placement = plan(spec_of(RoleSpec(), RoleSpec(replicas=4)), [node("a", 8), node("b", 8)])
    decodes = Counter(w.node.node_id for w in placement.workers if w.role is Role.DECODE)
    assert decodes == {"a": 2, "b": 2}
    assert placement.gateway.node_id == "a"
    assert [(w.worker_id, w.role.value) for w in placement.workers] == [
        ("worker-0", "prefill"), *((f"worker-{n}", "decode") for n in range(1, 5))
    ]  # fmt: skip


def test_pools_bind_by_label():
    pools = {"p": PoolSpec(labels={"pool": "p"}), "d": PoolSpec(labels={"pool": "d"})}
    spec = spec_of(RoleSpec(pool="p"), RoleSpec(pool="d", replicas=2), pools)
    placement = plan(spec, [node("x", 9), node("a", 9, pool="p"), node("b", 9, pool="d")])
    assert {(w.role, w.node.node_id) for w in placement.workers} == {(Role.PREFILL, "a"), (Role.DECODE, "b")}
    with pytest.raises(
        ClusterError, match=r"roles.decode: no node carries the labels pool=d.*ray start --labels pool=d"
    ):
        plan(spec, [node("x", 9), node("a", 9, pool="p")])


def test_what_does_not_fit_is_named_with_what_each_node_has():
    with pytest.raises(ClusterError, match=r"roles.decode: worker-2 needs 2 CPU.*10.0.0.1 \(3 CPU\)"):
        plan(spec_of(RoleSpec(), RoleSpec(replicas=2, cpus=2)), [node("a", 3), node("b", 1)])


def test_steps_back_where_the_first_choice_leads_nowhere():
    spec = spec_of(RoleSpec(cpus=3), RoleSpec(replicas=2, cpus=2))
    placement = plan(spec, [node("a", 4), node("b", 3)])  # the greedy choice puts the 3 on a
    assert {w.worker_id: w.node.node_id for w in placement.workers}["worker-0"] == "b"


def test_loopback_does_not_reach_a_second_machine():
    nodes = [Node("a", "10.0.0.1", {}, {"CPU": 1.0}), Node("b", "10.0.0.2", {}, {"CPU": 1.0})]
    with pytest.raises(ClusterError, match=r"set network\.host: node"):
        plan(spec_of(RoleSpec(), RoleSpec()), nodes)
    assert len(plan(spec_of(RoleSpec(), RoleSpec(), host="node"), nodes).nodes) == 2


def test_a_thousand_replicas_are_placed():
    assert len(plan(spec_of(RoleSpec(), RoleSpec(replicas=1500, cpus=0.1)), [node("a", 151)]).workers) == 1501


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=3),
    st.tuples(st.integers(1, 2), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 2)),
)
def test_finds_a_placement_exactly_when_there_is_one(capacities, prefill, decode):
    nodes = [node(str(i), float(c)) for i, c in enumerate(capacities)]
    spec = spec_of(RoleSpec(replicas=prefill[0], cpus=prefill[1]), RoleSpec(replicas=decode[0], cpus=decode[1]))
    sizes = [prefill[1]] * prefill[0] + [decode[1]] * decode[0]
    exists = any(
        all(sum(s for s, n in zip(sizes, choice, strict=True) if n == i) <= c for i, c in enumerate(capacities))
        for choice in product(range(len(nodes)), repeat=len(sizes))
    )
    try:
        placement = plan(spec, nodes)
    except ClusterError:
        assert not exists
        return
    used: Counter[str] = Counter()
    for worker in placement.workers:
        used[worker.node.node_id] += worker.needs["CPU"]
    assert all(used[str(i)] <= c for i, c in enumerate(capacities))


def test_who_is_added_is_placed_beside_who_stays_and_gets_an_id_of_its_own():
    spec, nodes = spec_of(RoleSpec(), RoleSpec(replicas=2)), [node("a", 3), node("b", 2)]
    before = plan(spec, nodes)
    more = plan(scaled(spec, "decode", 4), nodes, before.workers, {"worker-3"})
    assert all(worker in more.workers for worker in before.workers)
    names = [w.worker_id for w in more.workers if w.role is Role.DECODE]
    assert names == ["worker-1", "worker-2", "worker-4", "worker-5"]
    assert Counter(w.node.node_id for w in more.workers) == {"a": 3, "b": 2}
    less = plan(scaled(spec, "decode", 1), nodes, more.workers)
    assert [w.worker_id for w in less.workers] == ["worker-0", "worker-1"]  # the newest are left out
    with pytest.raises(ClusterError, match=r"needs 1 CPU, beside 5 CPU for the 5 placed before it.*3 CPU.*2 CPU"):
        plan(scaled(spec, "decode", 5), nodes, more.workers)


def test_who_stays_on_a_node_that_died_takes_no_room_elsewhere():
    spec = spec_of(RoleSpec(), RoleSpec())
    before = plan(spec, [node("a", 1), node("b", 1)])
    placement = plan(scaled(spec, "decode", 2), [node("a", 2)], before.workers)
    assert {w.worker_id: w.node.node_id for w in placement.workers}["worker-2"] == "a"


@pytest.mark.parametrize(
    ("role", "replicas", "want"),
    [
        ("decode", 0, "decode cannot have 0 workers: without one no request can be served"),
        ("decode", -1, "cannot have -1 workers"),
        (
            "decode",
            999_999_999_999,
            "cannot have 999999999999 workers: Input should be less than or equal to 4096",
        ),
        ("aggregated", 2, "topology pd has no role aggregated; the roles of tercet are prefill, decode"),
        ("decoder", 2, "no role decoder"),
        ("decode", 4, "decode cannot have 4 workers: roles.prefill.cpus: pool 'default' has 4 cpus, its roles need 5"),
    ],
)
def test_what_no_cluster_can_be_scaled_to_is_named(role, replicas, want):
    spec = spec_of(RoleSpec(), RoleSpec(), {"default": PoolSpec(cpus=4)})
    assert scaled(spec, "decode", 3).roles[Role.DECODE].replicas == 3
    with pytest.raises(SpecError, match=want):
        scaled(spec, role, replicas)


def test_a_kind_of_device_that_no_node_has_is_named():
    pools = {"default": PoolSpec(), "gpus": PoolSpec(accelerator="gpu", gpus=2)}
    spec = spec_of(RoleSpec(), RoleSpec(pool="gpus", gpus=1), pools)
    with pytest.raises(ClusterError, match=r"worker-1 needs 1 GPU, and no node of its pool has any that Ray sees"):
        plan(spec, [node("a", 8)])
