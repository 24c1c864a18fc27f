"""Groups of ranks: how they divide a model, which nodes and cores their ranks get."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tercet.core import Role
from tercet.errors import ClusterError, SpecError, UnsupportedSpec
from tercet.placement.groups import ModelShape, refuse_indivisible, spreads
from tercet.placement.roles import Node, local_node, plan, scaled
from tercet.spec import MOST_RANKS, ClusterSpec, NetworkSpec, ParallelSpec, PoolSpec, RoleSpec

MODEL = ModelShape(layers=4, heads=8, kv_heads=2, intermediate=96)
MIXTURE = ModelShape(4, 8, 2, 96, experts=8, expert_intermediate=20, shared_intermediate=40)


# ---- what a spec may say


def test_ranks_are_tensor_by_pipeline_by_data():
    assert ParallelSpec().ranks == 1
    assert ParallelSpec(tensor=2, pipeline=3, data=4, expert=8).ranks == 24


@pytest.mark.parametrize(
    ("degrees", "said"),
    [
        ({"tensor": 2, "expert": 4}, r"expert: 4 is neither 1 nor 2 \(tensor \* data\)"),
        ({"tensor": 2, "data": 2, "expert": 2}, r"expert: 2 is neither 1 nor 4 \(tensor \* data\)"),
        ({"pipeline": 4, "expert": 4}, r"expert: 4 is neither 1 nor 1"),
        ({"data": 2}, r"data: 2 ranks that share no experts.* replicas: 2; of a mixture of experts, expert: 2"),
        ({"tensor": 2, "data": 3}, r"data: 3 ranks .* expert: 6 \(tensor \* data\)"),
        ({"tensor": 2, "expert_redundancy": 2}, "expert_redundancy: 2 has no effect where expert is 1"),
        ({"tensor": 32, "pipeline": 32}, f"tensor: tensor . pipeline . data are 1024 ranks, and {MOST_RANKS} the most"),
        ({"tensor": 0}, "greater than or equal to 1"),
        ({"expert_redundancy": -1}, "greater than or equal to 0"),
    ],
)
def test_degrees_that_do_not_go_together_are_refused(degrees, said):
    with pytest.raises(ValidationError, match=said):
        ParallelSpec(**degrees)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(1, 40), st.integers(0, 3))
def test_experts_are_on_all_ranks_of_a_stage_or_not_spread(tensor, pipeline, data, expert, redundancy):
    try:
        made = ParallelSpec(tensor=tensor, pipeline=pipeline, data=data, expert=expert, expert_redundancy=redundancy)
    except ValidationError:
        spread = expert == tensor * data
        assert not spread or (expert == 1 and redundancy)
        assert data > 1 or expert > 1 or redundancy
    else:
        assert expert in {1, tensor * data}
        assert data == 1 or expert == tensor * data
        assert redundancy == 0 or expert > 1
        assert made.ranks == tensor * pipeline * data


# ---- whether a model can be divided so


@pytest.mark.parametrize(
    ("degrees", "model", "said"),
    [
        (
            {"tensor": 3},
            MODEL,
            r"at.tensor: 3 does not divide the model's 8 attention heads; of 1 to 16, 1, 2, 4, 8 would do",
        ),
        ({"tensor": 8}, ModelShape(4, 8, 8, 100), r"at.tensor: 8 does not divide the model's 100 columns of the MLP"),
        ({"tensor": 4}, ModelShape(4, 24, 6, 96), "at.tensor: 4 neither divides the model's 6 KV heads nor is a mult"),
        ({"pipeline": 5}, MODEL, "at.pipeline: 5 is more than the model's 4 layers"),
        ({"tensor": 2, "expert": 2}, MODEL, "at.expert: 2 ranks for experts, and the model has 0 experts"),
        ({"tensor": 8}, MIXTURE, "at.tensor: 8 does not divide the model's 20 columns of an expert"),
        (
            {"tensor": 8},
            ModelShape(4, 8, 2, 96, 8, 16, 20),
            "at.tensor: 8 does not divide the model's 20 columns of the shared experts",
        ),
        (
            {"data": 3, "expert": 3, "expert_redundancy": 2},
            MIXTURE,
            "at.expert: 3 does not divide 10, the model's 8 experts and expert_redundancy 2; .* 1 or 4 would do",
        ),
        (
            {"data": 2, "expert": 2, "expert_redundancy": 10},
            MIXTURE,
            "expert_redundancy: 10 is more than 8, with which each of the model's 8 experts lies on all 2 ranks",
        ),
        ({"data": 16, "expert": 16}, MIXTURE, "does not divide 8, .* expert_redundancy 0; expert_redundancy 8 would"),
    ],
)
def test_what_the_model_does_not_divide_into_is_named_with_both_numbers(degrees, model, said):
    with pytest.raises(UnsupportedSpec, match=said):
        refuse_indivisible("at", ParallelSpec(**degrees), model)


@pytest.mark.parametrize(
    ("degrees", "model"),
    [
        ({}, MODEL),
        ({}, MIXTURE),
        ({"tensor": 8, "pipeline": 4}, MODEL),  # 2 KV heads, each on 4 ranks
        ({"tensor": 8, "expert": 8}, MIXTURE),  # whole experts: their 20 columns need not divide
        ({"data": 4, "expert": 4, "expert_redundancy": 8}, MIXTURE),
        ({"data": 16, "expert": 16, "expert_redundancy": 8}, MIXTURE),
    ],
)
def test_what_divides_is_let_through(degrees, model):
    refuse_indivisible("at", ParallelSpec(**degrees), model)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(1, 24))
def test_every_rank_has_as_many_heads_as_any_other(tensor, heads, kv_heads, intermediate):
    model = ModelShape(1, heads, kv_heads, intermediate)
    fair = heads % tensor == 0 and intermediate % tensor == 0 and 0 in {kv_heads % tensor, tensor % kv_heads}
    try:
        refuse_indivisible("at", ParallelSpec(tensor=tensor), model)
    except UnsupportedSpec:
        assert not fair
    else:
        assert fair


# ---- ways over nodes


def split(way: tuple[int, ...], tensor: int) -> int:
    """How many tensor groups are on more than one node."""
    return sum(len({*way[at : at + tensor]}) > 1 for at in range(0, len(way), tensor))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(1, 3), st.integers(1, 3))
def test_every_way_is_found_and_the_first_keeps_tensor_groups_whole_on_few_nodes(rooms, tensor, groups):
    ranks = tensor * groups
    ways = list(spreads(rooms, ranks, tensor))
    possible = [counts for counts in product(*(range(min(room, ranks) + 1) for room in rooms)) if sum(counts) == ranks]
    found = {tuple(Counter(way)[node] for node in range(len(rooms))) for way in ways}
    assert found == {*possible}
    assert all(len(way) == ranks for way in ways)
    if not ways:
        return
    whole = [counts for counts in possible if all(count % tensor == 0 for count in counts)]
    best = min(sum(count > 0 for count in counts) for counts in whole or possible)
    assert len({*ways[0]}) == best
    assert (split(ways[0], tensor) == 0) == bool(whole)


def test_ranks_of_a_tensor_group_stay_together_though_that_takes_more_nodes():
    assert next(spreads([7, 5, 4], 12, 4)) == (0,) * 4 + (1,) * 4 + (2,) * 4
    assert next(spreads([3, 3, 3], 8, 4)) == (0, 0, 0, 1, 1, 1, 2, 2)  # none of both can
    way = next(spreads([6, 4, 2], 12, 4))
    assert (way, split(way, 4)) == ((0,) * 4 + (1,) * 4 + (0, 0, 2, 2), 1)  # two can, of three


def test_the_first_way_over_many_nodes_comes_at_once():
    assert Counter(next(spreads([1] * 600, 512, 8))) == dict.fromkeys(range(512), 1)
    assert next(spreads([1] * 511, 512, 1), None) is None


# ---- a plan


def spec_of(prefill: RoleSpec, decode: RoleSpec, host: str = "node", **more) -> ClusterSpec:
    return ClusterSpec(roles={Role.PREFILL: prefill, Role.DECODE: decode}, network=NetworkSpec(host=host), **more)


def nodes_of(*cpus: float) -> list[Node]:
    return [Node(str(i), f"10.0.0.{i}", {}, {"CPU": float(n)}) for i, n in enumerate(cpus)]


def group(tensor: int = 1, pipeline: int = 1, **more) -> RoleSpec:
    return RoleSpec(parallelism=ParallelSpec(tensor=tensor, pipeline=pipeline), **more)


def where(placement, role: Role = Role.DECODE) -> list[str]:
    """Of each worker of the role, the nodes of its ranks."""
    return ["".join(node.node_id for node in w.nodes) for w in placement.workers if w.role is role]


def test_a_group_is_packed_and_groups_are_spread():
    assert where(plan(spec_of(RoleSpec(), group(4, replicas=2)), nodes_of(9, 9))) == ["0000", "1111"]
    assert where(plan(spec_of(RoleSpec(), group(2, 2)), nodes_of(2, 2, 3, 5))) == ["3333"]
    assert where(plan(spec_of(RoleSpec(), group(2, 2)), nodes_of(2, 2, 3))) == ["2200"]


def test_a_group_on_one_node_serves_on_loopback_and_one_on_several_does_not():
    on_one = plan(spec_of(RoleSpec(), group(4), host="loopback"), nodes_of(5))
    assert where(on_one) == ["0000"]
    with pytest.raises(ClusterError, match=r"placed on 10\.0\.0\.0, 10\.0\.0\.1; set network\.host: node"):
        plan(spec_of(RoleSpec(), group(4), host="loopback"), nodes_of(3, 2))


def test_every_node_of_a_group_is_one_of_the_placement():
    placement = plan(spec_of(RoleSpec(), group(4)), nodes_of(1, 2, 2))
    assert [n.node_id for n in placement.nodes] == ["0", "1", "2"]
    decode = placement.workers[-1]
    assert decode.ranks_on == {"1": (0, 1), "2": (2, 3)}
    assert decode.node.node_id == "1"


def test_a_group_that_fits_nowhere_is_named_with_its_ranks():
    spec = spec_of(RoleSpec(), group(4, 2, cpus=2.0))
    with pytest.raises(ClusterError, match=r"roles.prefill: worker-0 needs 1 CPU, beside 16 CPU for the 1 placed"):
        plan(spec, nodes_of(8, 8))
    with pytest.raises(ClusterError, match=r"worker-1 needs 2 CPU for each of 8 ranks, beside 0 CPU for the 0"):
        plan(spec, nodes_of(8, 7, 1))


def test_gpus_are_counted_by_ranks():
    pools = {"default": PoolSpec(accelerator="gpu", gpus=5)}
    spec = spec_of(RoleSpec(gpus=1), group(4, gpus=1), pools=pools)
    nodes = [Node(str(i), f"10.0.0.{i}", {}, {"CPU": 64.0, "GPU": 4.0}) for i in range(2)]
    assert where(plan(spec, nodes)) == ["0000"]
    with pytest.raises(ValidationError, match="pool 'default' has 5 gpus, its roles need 6"):
        spec_of(RoleSpec(gpus=1, replicas=2), group(4, gpus=1), pools=pools)


Wanted = tuple[int, tuple[int, int], int]  # replicas, tensor and pipeline, CPUs of a rank


def check_placement(capacities: Sequence[int], prefill: Wanted, decode: Wanted) -> None:
    """A placement is found exactly if there is one, and is one."""
    roles = [group(*shape, replicas=replicas, cpus=float(size)) for replicas, shape, size in (prefill, decode)]
    try:
        placement = plan(spec_of(*roles), nodes_of(*capacities))
    except ClusterError:
        assert not is_possible(capacities, prefill, decode)
        return
    assert is_possible(capacities, prefill, decode)
    used: Counter[str] = Counter()
    for worker, wanted in ((w, roles[w.role is Role.DECODE]) for w in placement.workers):
        assert len(worker.nodes) == wanted.parallelism.ranks
        for node in worker.nodes:
            used[node.node_id] += worker.needs["CPU"]
    assert all(used[str(i)] <= capacity for i, capacity in enumerate(capacities))


def is_possible(capacities: Sequence[int], prefill: Wanted, decode: Wanted) -> bool:
    """Ranks of a role are alike, so a placement is how many of each role are on each node."""
    first, second = (replicas * shape[0] * shape[1] for replicas, shape, _ in (prefill, decode))
    room = {0: 0}  # ranks of prefill placed -> the most of decode that fit beside them
    for capacity in capacities:
        ways = [(n, (capacity - n * prefill[2]) // decode[2]) for n in range(capacity // prefill[2] + 1)]
        after: dict[int, int] = {}
        for (done, rest), (n, more) in product(room.items(), ways):
            after[done + n] = max(after.get(done + n, 0), rest + more)
        room = after
    return any(n >= first and most >= second for n, most in room.items())


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=3),
    st.tuples(st.integers(1, 2), st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1)]), st.integers(1, 2)),
    st.tuples(st.integers(1, 2), st.sampled_from([(1, 1), (1, 2), (2, 1)]), st.integers(1, 2)),
)
def test_finds_a_placement_exactly_when_there_is_one(capacities, prefill, decode):
    check_placement(capacities, prefill, decode)


@pytest.mark.parametrize("decode", [(1, (2, 1), 2), (2, (1, 1), 2), (1, (1, 2), 1)])
@pytest.mark.parametrize("prefill", [(1, (2, 1), 3), (2, (1, 1), 3), (1, (1, 3), 2)])
def test_steps_back_where_the_first_choice_leads_nowhere(prefill, decode):
    """Of each size of three nodes: in some the ranks of both only just fit."""
    for capacities in product(range(7), repeat=3):
        check_placement(capacities, prefill, decode)


def test_nodes_with_as_much_free_are_not_alike_if_their_labels_differ():
    pools = {name: PoolSpec(labels={name: "yes"}) for name in ("a", "b")}
    spec = spec_of(group(2, pool="a"), group(2, pool="b"), pools=pools)
    both, only_a, only_b = {"a": "yes", "b": "yes"}, {"a": "yes"}, {"b": "yes"}
    labelled = [(both, 2.0), (only_a, 2.0), (only_b, 0.0)]  # prefill is tried on the first
    nodes = [Node(str(i), f"10.0.0.{i}", labels, {"CPU": cpus}) for i, (labels, cpus) in enumerate(labelled)]
    placement = plan(spec, nodes)
    assert (where(placement, Role.PREFILL), where(placement)) == (["11"], ["00"])


def test_a_group_that_runs_stays_where_it_is_and_more_are_placed_beside_it():
    spec, nodes = spec_of(RoleSpec(), group(2)), nodes_of(5, 2)
    before = plan(spec, nodes)
    after = plan(scaled(spec, "decode", 3), nodes, before.workers)
    assert after.workers[: len(before.workers)] == before.workers
    assert Counter("".join(where(after))) == {"0": 4, "1": 2}
    with pytest.raises(ClusterError, match="worker-4 needs 1 CPU for each of 2 ranks, beside 7 CPU for the 4 placed"):
        plan(scaled(spec, "decode", 4), nodes, after.workers)


def test_a_group_half_of_whose_nodes_died_takes_room_on_the_others_only():
    spec = spec_of(RoleSpec(), group(2))
    before = plan(spec, nodes_of(1, 1, 1))
    assert where(before) == ["01"]
    after = plan(scaled(spec, "decode", 2), nodes_of(9, 3)[1:], before.workers)
    assert where(after) == ["01", "11"]


def test_scaling_counts_ranks():
    spec = spec_of(RoleSpec(), group(4), pools={"default": PoolSpec(cpus=10)})
    assert scaled(spec, "decode", 2).roles[Role.DECODE].replicas == 2
    with pytest.raises(SpecError, match="pool 'default' has 10 cpus, its roles need 13"):
        scaled(spec, "decode", 3)


def test_a_ray_of_this_machine_has_room_for_all_ranks():
    spec = spec_of(RoleSpec(), group(16, 16, replicas=2))
    assert local_node(spec).resources["CPU"] == 513
    assert where(plan(spec, [local_node(spec)])) == ["local" * 256] * 2


def test_many_groups_over_many_nodes_are_placed():
    placement = plan(spec_of(RoleSpec(), group(8, 2, replicas=48)), nodes_of(1, *[8] * 96))
    assert len({node.node_id for w in placement.workers[1:] for node in w.nodes}) == 96
    assert all(len(w.ranks_on) == 2 for w in placement.workers[1:])


# ---- cores


def test_each_rank_takes_the_next_threads_of_its_node():
    decode = group(2, 2, replicas=2, threads=2, cpu_affinity=[7, 6, 2, 3, 8, 9, 4, 5])
    placement = plan(spec_of(RoleSpec(), decode), nodes_of(1, 4, 2, 2))
    first, second = placement.workers[1:]
    assert where(placement) == ["1111", "2233"]
    assert first.rank_cores == ((7, 6), (2, 3), (8, 9), (4, 5))
    assert second.rank_cores == ((7, 6), (2, 3), (7, 6), (2, 3))
    assert (first.cores, second.cores_of(3)) == ((7, 6), (2, 3))
    assert placement.workers[0].cores_of(0) == ()


def test_a_rank_without_cores_left_is_named():
    spec = spec_of(RoleSpec(), group(3, cpu_affinity=[1, 2]))
    with pytest.raises(ClusterError, match=r"no core left for rank 2 of worker-1 on 10.0.0.0; taken there: 1 by worke"):
        plan(spec, nodes_of(9))


@given(st.lists(st.integers(1, 3), max_size=6), st.randoms())
@settings(deadline=None, max_examples=40)
def test_no_two_ranks_of_a_node_share_a_core_however_it_is_scaled(steps, rng):
    now = spec_of(RoleSpec(cpu_affinity=[0]), group(2, cpu_affinity=[1, 2, 3, 4, 5, 6]))
    nodes, placement = nodes_of(4, 4), None
    for replicas in [1, *steps]:
        now = scaled(now, "decode", replicas)
        kept = rng.sample(placement.workers, len(placement.workers)) if placement else ()
        before = {w.worker_id: w.rank_cores for w in kept}
        placement = plan(now, nodes, kept)
        taken = [
            (node.node_id, core)
            for w in placement.workers
            for rank, node in enumerate(w.nodes)
            for core in w.cores_of(rank)
        ]
        assert len(taken) == len({*taken}) == 1 + 2 * replicas
        assert all(before.get(w.worker_id, w.rank_cores) == w.rank_cores for w in placement.workers)
