"""Which slots hold an expert, and which of them each assignment takes: properties, against a search of the list."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.distributed.expert_map import NO_SLOT, ExpertMap, default_map
from tercet.errors import ClusterError, InternalError, NoWorkers


@st.composite
def maps(draw) -> ExpertMap:
    """Random placements: every expert somewhere, replicas anywhere, also twice on one rank."""
    ranks, per_rank = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    experts = draw(st.integers(1, ranks * per_rank))
    layers = draw(st.integers(1, 3))
    rows = []
    for _ in range(layers):
        more = draw(
            st.lists(st.integers(0, experts - 1), min_size=ranks * per_rank - experts, max_size=ranks * per_rank)
        )
        rows.append(draw(st.permutations([*range(experts), *more[: ranks * per_rank - experts]])))
    return ExpertMap(torch.tensor(rows), experts, per_rank)


@st.composite
def questions(draw) -> tuple[ExpertMap, int, int, tuple[bool, ...], torch.Tensor]:
    """A map, a layer, the rank that asks, the ranks that are active, and experts of some tokens."""
    found = draw(maps())
    active = tuple(draw(st.lists(st.booleans(), min_size=found.ranks, max_size=found.ranks)))
    tokens, k = draw(st.integers(0, 9)), draw(st.integers(1, min(4, found.experts)))
    experts = [draw(st.permutations(range(found.experts)))[:k] for _ in range(tokens)]
    layer, rank = draw(st.integers(0, len(found.phy2log) - 1)), draw(st.integers(0, found.ranks - 1))
    return found, layer, rank, active, torch.tensor(experts, dtype=torch.int64).view(tokens, k)


@given(maps())
def test_log2phy_names_every_slot_of_every_expert_once(found):
    for layer, row in enumerate(found.phy2log.tolist()):
        table = found.log2phy(layer).tolist()
        assert [[slot for slot in slots if slot != NO_SLOT] for slots in table] == [
            [slot for slot, held in enumerate(row) if held == expert] for expert in range(found.experts)
        ]
        assert len(table[0]) == max(row.count(expert) for expert in range(found.experts))
        for rank in range(found.ranks):
            assert found.experts_on(rank, layer) == row[rank * found.slots_per_rank :][: found.slots_per_rank]


@settings(max_examples=300, deadline=None)
@given(questions())
def test_each_assignment_takes_a_replica_by_turns_on_an_active_rank_and_its_own_one_first(question):
    found, layer, rank, active, experts = question
    row = found.phy2log[layer].tolist()
    everywhere = {e: [s for s, held in enumerate(row) if held == e] for e in range(found.experts)}
    usable = {e: [s for s in slots if active[s // found.slots_per_rank]] for e, slots in everywhere.items()}
    missing = [e for e in experts.flatten().tolist() if not usable[e]]
    if missing:
        with pytest.raises(NoWorkers, match=f"holds expert {missing[0]} of layer {layer};"):
            found.choose(experts, rank, layer, active)
        return
    slots = found.choose(experts, rank, layer, active)
    assert slots.shape == experts.shape
    assert slots.dtype == torch.int64
    for token, (numbers, taken) in enumerate(zip(experts.tolist(), slots.tolist(), strict=True)):
        for expert, slot in zip(numbers, taken, strict=True):
            here = [s for s in usable[expert] if s // found.slots_per_rank == rank]
            candidates = here or usable[expert]
            assert slot == candidates[(token + rank) % len(candidates)]
    assert torch.equal(found.choose(experts, rank, layer, active), slots)


def test_replicas_share_the_rows_evenly():
    found = ExpertMap(torch.tensor([[0, 1, 1, 2, 1, 3]]), 4, 2)
    slots = found.choose(torch.ones(9, 1, dtype=torch.int64), rank=0)
    assert slots.flatten().tolist() == [1] * 9  # its own
    found = ExpertMap(torch.tensor([[0, 2, 1, 2, 1, 3, 3, 1]]), 4, 2)
    slots = found.choose(torch.ones(9, 1, dtype=torch.int64), rank=0)
    assert sorted(torch.bincount(slots.flatten(), minlength=8).tolist()) == [0, 0, 0, 0, 0, 3, 3, 3]


def test_one_row_of_the_map_serves_all_layers_and_several_do_not_serve_more():
    one = ExpertMap(torch.tensor([[1, 0]]), 2, 1)
    experts = torch.tensor([[0]])
    assert one.choose(experts, 0, layer=7).tolist() == [[1]]
    two = ExpertMap(torch.tensor([[1, 0], [0, 1]]), 2, 1)
    assert [two.choose(experts, 0, layer).item() for layer in (0, 1)] == [1, 0]
    for layer in (2, -1):
        with pytest.raises(InternalError, match=f"layer {layer} has no placement"):
            two.choose(experts, 0, layer)


@pytest.mark.parametrize(
    ("rows", "experts", "per_rank", "says"),
    [
        ([[0, 1, 2]], 3, 2, "3 slots are no multiple of 2"),
        ([[0, 1]], 2, 0, "no multiple of 0"),
        ([[]], 0, 1, "no multiple"),
        ([[0, 1], [0, 2]], 2, 1, "layer 1: slots of experts \\[2\\]"),
        ([[0, -1]], 1, 1, "layer 0: slots of experts \\[-1\\]"),
        ([[0, 1, 1, 0]], 3, 2, "layer 0: no slot holds experts \\[2\\]"),
    ],
)
def test_a_placement_that_is_none_is_refused(rows, experts, per_rank, says):
    with pytest.raises(ClusterError, match=says):
        ExpertMap(torch.tensor(rows, dtype=torch.int64), experts, per_rank)


@pytest.mark.parametrize("phy2log", [torch.zeros(2, dtype=torch.int64), torch.zeros(1, 2), torch.zeros(0, 2).long()])
def test_a_map_of_another_shape_or_dtype_is_refused(phy2log):
    with pytest.raises(ClusterError, match="must be int64 of shape"):
        ExpertMap(phy2log, 1, 1)


@pytest.mark.parametrize(("rank", "active"), [(2, (True, True)), (-1, (True, True)), (0, (True,)), (0, ())])
def test_a_rank_or_a_mask_that_does_not_fit_is_refused(rank, active):
    with pytest.raises(InternalError, match="there are 2 ranks"):
        ExpertMap(torch.tensor([[0, 1]]), 2, 1).choose(torch.tensor([[0]]), rank, active=active)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 80), st.integers(1, 8))
def test_the_default_map_has_every_expert_and_replicas_on_other_ranks(experts, redundancy, ranks):
    if (experts + redundancy) % ranks:
        with pytest.raises(ClusterError, match=f"are no multiple of {ranks} ranks"):
            default_map(experts, redundancy, ranks)
        return
    found = default_map(experts, redundancy, ranks)
    assert (found.ranks, found.slots_per_rank) == (ranks, (experts + redundancy) // ranks)
    held = [set(found.experts_on(rank)) for rank in range(ranks)]
    holders = [sum(expert in its for its in held) for expert in range(experts)]
    assert min(holders) >= 1
    if ranks > 1 and redundancy >= experts:
        assert min(holders) >= 2
    assert found.phy2log.equal(default_map(experts, redundancy, ranks).phy2log)  # at all ranks alike


@pytest.mark.parametrize(("redundancy", "held"), [(0, [[0, 1], [2, 3]]), (4, [[0, 1, 2, 3], [2, 3, 0, 1]])])
def test_the_default_map_of_two_ranks(redundancy, held):
    found = default_map(4, redundancy, 2)
    assert [found.experts_on(rank) for rank in range(2)] == held
