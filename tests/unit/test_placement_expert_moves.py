"""How a layer of experts gets from one placement to another: nothing is lost, and nothing goes twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tercet.errors import ClusterError
from tercet.placement.expert_moves import Fetch, fetches, rounds, settled

Row = Sequence[int]


def of_rank(row: Row, rank: int, slots: int) -> Row:
    return row[rank * slots : (rank + 1) * slots]


@st.composite
def placements(draw: Any) -> tuple[list[int], list[int], int]:
    """-> old, new, slots per rank. Each expert has a slot in both."""
    ranks, slots = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    experts = draw(st.integers(1, ranks * slots))
    more = st.lists(st.integers(0, experts - 1), min_size=ranks * slots - experts, max_size=ranks * slots - experts)
    old, new = (draw(st.permutations([*range(experts), *draw(more)])) for _ in range(2))
    return old, new, slots


@st.composite
def wishes(draw: Any) -> list[Fetch]:
    """Any, between ranks that differ; a slot is wanted once."""
    ranks = draw(st.integers(2, 7))
    some = st.tuples(st.integers(0, ranks - 1), st.integers(0, 4), st.integers(0, ranks - 1), st.integers(0, 9))
    found = draw(st.lists(some, max_size=60, unique_by=lambda fetch: fetch[2:]))
    return [Fetch(*each) for each in found if each[0] != each[2]]


# ---- settled


@given(placements())
def test_settling_changes_nothing_but_the_order_within_ranks(drawn):
    old, new, slots = drawn
    found = settled(old, new, slots)
    assert len(found) == len(new)
    for rank in range(len(new) // slots):
        had, wants, has = (of_rank(row, rank, slots) for row in (old, new, found))
        assert Counter(has) == Counter(wants)
        stays = [before == after for before, after in zip(had, has, strict=True)]
        assert sum(stays) == (Counter(had) & Counter(wants)).total(), "what a rank keeps stays in its slot"


@given(placements())
def test_what_is_asked_for_again_changes_nothing(drawn):
    old, new, slots = drawn
    found = settled(old, new, slots)
    assert settled(found, new, slots) == found
    assert settled(old, old, slots) == old


def test_settling_by_hand():
    assert settled([0, 1, 2, 3], [1, 2, 3, 0], 2) == [2, 1, 0, 3]
    assert settled([0, 0, 1, 2], [1, 0, 2, 0], 2) == [0, 1, 0, 2]


# ---- fetches


@given(placements())
def test_fetches_make_the_new_placement(drawn):
    """Weights are those that lay in the slots before the move: rounds may go in any order."""
    old, new, slots = drawn
    ranks = range(len(old) // slots)
    found = fetches(old, new, slots, ranks)
    assert len({fetch[2:] for fetch in found}) == len(found), "a slot is filled once"
    there = [[expert if expert in of_rank(old, r, slots) else None for expert in of_rank(new, r, slots)] for r in ranks]
    for fetch in found:
        assert fetch.source != fetch.rank
        assert there[fetch.rank][fetch.slot] is None, "only what a rank lacks is fetched"
        there[fetch.rank][fetch.slot] = of_rank(old, fetch.source, slots)[fetch.from_slot]
    assert [expert for its in there for expert in its] == new


@given(placements(), st.data())
def test_only_ranks_that_are_there_give_and_take(drawn, data):
    old, new, slots = drawn
    there = data.draw(st.sets(st.integers(0, len(old) // slots - 1)))
    held = {expert for rank in there for expert in of_rank(old, rank, slots)}
    wanted = {rank: of_rank(new, rank, slots) for rank in there}
    if not all(held.issuperset(its) for its in wanted.values()):
        with pytest.raises(ClusterError, match="no rank that is there has expert"):
            fetches(old, new, slots, there)
        return
    found = fetches(old, new, slots, there)
    lacking = {(r, slot) for r, its in wanted.items() for slot, e in enumerate(its) if e not in of_rank(old, r, slots)}
    assert {(fetch.rank, fetch.slot) for fetch in found} == lacking
    assert {fetch.source for fetch in found} <= there
    for fetch in found:
        assert of_rank(old, fetch.source, slots)[fetch.from_slot] == wanted[fetch.rank][fetch.slot]


def test_an_expert_that_nobody_has_is_refused():
    for there in ([0], {0, 2}):
        with pytest.raises(ClusterError, match="no rank that is there has expert 3"):
            fetches([0, 1, 2, 3, 0, 1], [0, 3, 2, 1, 0, 1], 2, there)
    assert fetches([0, 1, 2, 3, 0, 1], [0, 3, 2, 1, 0, 1], 2, [1, 2]) == [Fetch(2, 1, 1, 1)]
    assert fetches([0, 1], [1, 0], 1, []) == []


def test_ranks_give_by_turns():
    old, new = [0, 0, 0, 1, 2, 3], [0, 0, 0, 0, 0, 0]
    assert [fetch.source for fetch in fetches(old, new, 1, range(6))] == [0, 1, 2]


# ---- rounds


@given(wishes(), st.integers(1, 5))
def test_rounds_deliver_each_fetch_once(wanted, room):
    found = []
    for batch in rounds(wanted, room):
        assert batch, "a round in which nothing goes would be followed by others like it"
        peers: dict[int, set[int]] = {}
        for (source, rank), each in batch.items():
            assert 0 < len(each) <= room
            assert {(fetch.source, fetch.rank) for fetch in each} == {(source, rank)}
            peers.setdefault(source, set()).add(rank)
            peers.setdefault(rank, set()).add(source)
            found += each
        assert all(len(its) == 1 for its in peers.values())
        assert len(found) <= len(wanted)
    assert Counter(found) == Counter(wanted)


@given(wishes())
def test_a_pair_waits_only_for_a_rank_that_is_busy(wanted):
    left = Counter((fetch.source, fetch.rank) for fetch in wanted)
    for batch in rounds(wanted, 1):
        busy = {rank for pair in batch for rank in pair}
        for pair in left.keys() - batch.keys():
            assert busy & {*pair}
        left -= Counter(batch.keys())
    assert not left


def test_both_directions_of_a_pair_go_at_once_and_the_longest_first():
    there = [Fetch(0, slot, 1, slot) for slot in range(3)]
    back, other = [Fetch(1, 0, 0, 0)], [Fetch(2, 0, 1, 4), Fetch(2, 1, 1, 5)]
    assert [*rounds([*other, *back, *there], 2)] == [
        {(0, 1): there[:2], (1, 0): back},
        {(2, 1): other},
        {(0, 1): there[2:]},
    ]
    assert [*rounds([], 2)] == []


@given(placements(), st.integers(1, 4))
def test_a_move_from_one_placement_to_another(drawn, room):
    """As a group does it: all three together."""
    old, new, slots = drawn
    wanted = settled(old, new, slots)
    there = [*old]
    fetched = fetches(old, wanted, slots, range(len(old) // slots))
    for fetch in (fetch for batch in rounds(fetched, room) for each in batch.values() for fetch in each):
        there[fetch.rank * slots + fetch.slot] = of_rank(old, fetch.source, slots)[fetch.from_slot]
    at = {rank: of_rank(old, rank, slots) for rank in range(len(old) // slots)}
    changed = [s for s in range(len(old)) if there[s] != wanted[s]]
    assert all(wanted[slot] in at[slot // slots] for slot in changed), "copied from another slot of the same rank"
