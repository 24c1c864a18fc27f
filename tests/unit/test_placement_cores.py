"""Cores: each worker of a node has its own, kept while it runs, and what cannot be is refused by name."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tercet.core import Role
from tercet.errors import ClusterError, UnsupportedSpec
from tercet.placement.roles import Node, plan, scaled
from tercet.roles.worker import Worker
from tercet.spec import ClusterSpec, NetworkSpec, RoleSpec
from tests.helpers import TOKEN, spec_of


def spec(prefill, decode):
    roles = {Role.PREFILL: RoleSpec(**prefill), Role.DECODE: RoleSpec(**decode)}
    return ClusterSpec(roles=roles, network=NetworkSpec(host="node"))


def nodes(count=1):
    return [Node(f"node-{n}", f"10.0.0.{n}", {}, {"CPU": 64.0}) for n in range(count)]


def cores(placement):
    return {w.worker_id: w.cores for w in placement.workers}


def test_each_replica_takes_the_next_threads():
    wanted = spec(
        {"threads": 2, "cpu_affinity": [0, 1]}, {"replicas": 3, "threads": 2, "cpu_affinity": [7, 6, 2, 3, 8, 9]}
    )
    given_out = cores(plan(wanted, nodes()))
    assert given_out == {"worker-0": (0, 1), "worker-1": (7, 6), "worker-2": (2, 3), "worker-3": (8, 9)}
    assert set(cores(plan(spec({}, {}), nodes())).values()) == {()}


def test_every_node_has_all_of_them():
    wanted = spec({"cpu_affinity": [0]}, {"replicas": 4, "cpu_affinity": [1, 2]})
    placement = plan(wanted, nodes(2))
    taken = [(w.node.node_id, core) for w in placement.workers for core in w.cores]
    assert len(taken) == len({*taken}) == 5


@given(st.lists(st.integers(1, 4), max_size=8), st.randoms())
@settings(deadline=None)
def test_who_runs_keeps_its_cores(steps, rng):
    """Whatever is scaled and whoever of them leaves first."""
    now = spec({"cpu_affinity": [0]}, {"cpu_affinity": [1, 2, 3, 4]})
    placement = plan(now, nodes())
    for replicas in steps:
        before = cores(placement)
        now = scaled(now, "decode", replicas)
        kept = rng.sample(placement.workers, len(placement.workers))
        placement = plan(now, nodes(), kept)
        after = cores(placement)
        assert all(after[name] == before[name] for name in before.keys() & after.keys())
        assert len({c for each in after.values() for c in each}) == 1 + replicas


@pytest.mark.parametrize(
    ("prefill", "decode", "said"),
    [
        (
            {"cpu_affinity": [0]},
            {"replicas": 2, "cpu_affinity": [1]},
            r"roles.decode.cpu_affinity: \[1\] has no core left",
        ),
        ({"cpu_affinity": [0]}, {"cpu_affinity": [0]}, r"taken there: 0 by worker-0 \(prefill\)"),
    ],
)
def test_cores_that_are_taken_are_refused_before_anything_is_placed(prefill, decode, said):
    with pytest.raises(ClusterError, match=said):
        plan(spec(prefill, decode), nodes())


@pytest.mark.parametrize("bad", [[], [0, 0], [0, 1, 2], [-1, 0]])
def test_a_list_that_cannot_be_divided_is_refused(bad):
    with pytest.raises(ValidationError):
        RoleSpec(threads=2, cpu_affinity=bad)


async def test_a_core_that_is_not_there_is_refused():
    worker = Worker("w", Role.DECODE, 1, spec_of("pd"), "127.0.0.1", TOKEN, cores=[0, 60000])
    with pytest.raises(UnsupportedSpec, match=r"roles.decode.cpu_affinity: core 60000 is not here"):
        await worker.start()


async def test_the_engine_runs_on_its_core_alone():
    core = max(os.sched_getaffinity(0))
    worker = Worker("w", Role.DECODE, 1, spec_of("pd"), "127.0.0.1", TOKEN, cores=[core])
    await worker.start()
    try:
        assert os.sched_getaffinity(worker._parts[0]._thread.native_id) == {core}
        assert os.sched_getaffinity(0) >= {core}
    finally:
        await worker.stop()
