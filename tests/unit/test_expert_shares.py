"""Shares of an expert's replicas: what they are in turns, in other slots, and which replica each row takes by them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.distributed.expert_map import ExpertMap
from tercet.errors import ClusterError, NoWorkers, SpecError
from tercet.placement.expert_moves import settled
from tercet.placement.expert_shares import TURNS, check_shares, in_turns, resettled

RANKS, EACH, EXPERTS = 4, 3, 7


def random_row(rng: np.random.Generator) -> list[int]:
    return rng.permutation([*range(EXPERTS), *rng.integers(0, EXPERTS, RANKS * EACH - EXPERTS)]).tolist()


def random_shares(rng: np.random.Generator, row: list[int], nodes: int) -> list[list[int]]:
    """Some replicas get nothing."""
    shares = np.zeros((nodes, len(row)), np.int64)
    for expert in range(EXPERTS):
        slots = [slot for slot, held in enumerate(row) if held == expert]
        for node in range(nodes):
            shares[node, slots] = rng.multinomial(TURNS, rng.dirichlet(np.full(len(slots), 0.5)))
    return shares.tolist()


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(any), min_size=1, max_size=5))
def test_turns_are_the_nearest_to_the_shares(drawn):
    prob = np.array(drawn) / np.sum(drawn, axis=1, keepdims=True)
    found = in_turns(prob)
    assert (found.sum(axis=1) == TURNS).all()
    assert (np.abs(found - prob * TURNS) < 1).all()
    assert (found[prob == 0] == 0).all()


@pytest.mark.parametrize("nodes", [1, 2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_in_other_slots_each_rank_has_the_share_it_had(seed, nodes):
    rng = np.random.default_rng(seed)
    old, wanted = random_row(rng), random_row(rng)
    new = settled(old, wanted, EACH)  # the wanted one's experts, in other slots
    shares = random_shares(rng, wanted, nodes)
    found = resettled(wanted, shares, new, EACH)
    for before, after in zip(shares, found, strict=True):
        had, has = Counter[Any](), Counter[Any]()
        for slot in range(len(new)):
            had[wanted[slot], slot // EACH] += before[slot]
            has[new[slot], slot // EACH] += after[slot]
        assert had == has
    check_shares(np.array(new), np.array(found), RANKS)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 4]), st.lists(st.booleans(), min_size=RANKS, max_size=RANKS))
def test_rows_take_replicas_as_often_as_their_shares_say(seed, nodes, active):
    """On all ranks, with any of them lost, from any turn on; of an expert without a share on them: by turns."""
    rng = np.random.default_rng(seed)
    row = random_row(rng)
    shares = random_shares(rng, row, nodes)
    found = ExpertMap(torch.tensor([row]), EXPERTS, EACH).with_shares({0: shares})
    for rank in range(RANKS):
        its = shares[rank * nodes // RANKS]
        for expert in range(EXPERTS):
            there = {slot: its[slot] for slot, held in enumerate(row) if held == expert and active[slot // EACH]}
            period = sum(there.values()) or len(there)
            asked = torch.full((max(period, 1), 1), expert)
            if not there:
                with pytest.raises(NoWorkers, match=f"no active rank holds expert {expert}"):
                    found.choose(asked, rank, active=tuple(active))
                continue
            taken = found.choose(asked, rank, active=tuple(active), turn=int(rng.integers(1000))).flatten().tolist()
            wanted = there if any(there.values()) else dict.fromkeys(there, 1)
            assert Counter(taken) == Counter({slot: times for slot, times in wanted.items() if times})


def test_a_replica_with_a_small_share_is_not_taken_all_at_once():
    """In any few rows that follow each other each slot has its share, but for one row or two."""
    row, share = [0, 1, 0, 1], [96, 128, 32, 0]
    found = ExpertMap(torch.tensor([row]), 2, 2).with_shares({0: [share]})
    taken = found.choose(torch.zeros(3 * TURNS, 1, dtype=torch.int64), 1).flatten()
    for rows in (4, 8, 20):
        for first in range(2 * TURNS):
            few = (taken[first : first + rows] == 2).sum().item()
            assert abs(few - rows / 4) <= 1


def test_another_row_of_a_layer_forgets_its_shares_alone():
    rows = torch.tensor([[0, 1, 0], [1, 0, 1]])
    found = ExpertMap(rows, 2, 1).with_shares({0: [[100, 128, 28]], 1: [[64, 128, 64]]})
    after = found.with_rows({0: torch.tensor([1, 0, 0])}, layers=2)
    assert after.told_shares() == {1: [[64, 128, 64]]}
    assert found.with_shares({}).told_shares() == {}


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ([[64, 128]], r"shares of \[1, 2\], and must be \[nodes, 3\] for 3 ranks"),
        ([], "must be"),
        ([[64, 128, 64]] * 2, "for 3 ranks"),
        ([[64, 127, 64]], "shares of expert 1 sum to 127 at node 0, and must to 128"),
        ([[128, 128, 0], [128, 128, 0], [0, 128, 0]], "shares of expert 0 sum to 0 at node 2"),
        ([[-1, 128, 129]], "0 to 128"),
    ],
)
def test_what_are_no_shares_is_refused(shares, said):
    with pytest.raises(SpecError, match=said):
        check_shares(np.array([0, 1, 0]), np.array(shares, dtype=np.int64), 3)
    with pytest.raises(ClusterError, match=f"layer 0: .*{said}"):
        ExpertMap(torch.tensor([[0, 1, 0]]), 2, 1).with_shares({0: shares})
