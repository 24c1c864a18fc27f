"""Where ranks stand, and what each has of a model: everything exactly once."""

from __future__ import annotations

from collections import Counter
from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from tercet.distributed.place import Place, share
from tercet.transfer.memory.layout import window

DEGREES = st.integers(1, 5)


@st.composite
def groups(draw):
    """The places of all ranks of a group."""
    tensor, pipeline, data = draw(DEGREES), draw(DEGREES), draw(DEGREES)
    return [Place(rank, tensor, pipeline, data) for rank in range(tensor * pipeline * data)]


@given(groups())
def test_each_coordinate_has_one_rank(places):
    assert all(place.ranks == len(places) for place in places)
    coordinates = {(place.stage, place.data_rank, place.tensor_rank) for place in places}
    assert len(coordinates) == len(places)
    for place in places:
        assert 0 <= place.stage < place.pipeline
        assert 0 <= place.data_rank < place.data
        assert 0 <= place.tensor_rank < place.tensor
        assert place.rank == (place.stage * place.data + place.data_rank) * place.tensor + place.tensor_rank


@given(groups())
def test_a_tensor_group_is_the_ranks_of_one_stage_and_replica(places):
    for place in places:
        same = [p.rank for p in places if (p.stage, p.data_rank) == (place.stage, place.data_rank)]
        assert list(place.tensor_group) == same
        assert list(place.stage_group) == [p.rank for p in places if p.stage == place.stage]
        assert place.tensor_group.index(place.rank) == place.tensor_rank


@given(groups())
def test_one_rank_of_each_replica_draws_and_it_has_the_logits(places):
    drawing = [place for place in places if place.draws]
    assert sorted(place.data_rank for place in drawing) == list(range(places[0].data))
    assert all(place.is_last and place.tensor_rank == 0 for place in drawing)
    assert [place.stage for place in places if place.is_first] == [0] * (places[0].tensor * places[0].data)


@given(groups())
def test_from_stage_to_stage_a_share_stays_the_same(places):
    for place in places:
        for stage in range(place.pipeline):
            there = places[place.at_stage(stage)]
            assert (there.stage, there.data_rank, there.tensor_rank) == (stage, place.data_rank, place.tensor_rank)


@given(groups(), st.integers(1, 40))
def test_each_layer_is_at_one_stage_and_no_stage_is_empty(places, layers):
    if layers < places[0].pipeline:
        return  # its spec is refused
    stages = {place.stage: place.layers(layers) for place in places}
    assert Counter(chain.from_iterable(stages.values())) == dict.fromkeys(range(layers), 1)
    assert all(len(part) for part in stages.values())
    assert all(place.layers(layers) == stages[place.stage] for place in places)


@given(st.integers(0, 300), st.integers(1, 9))
def test_shares_are_all_of_it_in_order_and_even(count, size):
    parts = [share(count, rank, size) for rank in range(size)]
    assert list(chain.from_iterable(parts)) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.integers(1, 300), st.integers(1, 9))
def test_windows_are_all_of_it_in_order_and_even(count, stages):
    parts = [window(count, stage, stages) for stage in range(stages)]
    assert list(chain.from_iterable(parts)) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
