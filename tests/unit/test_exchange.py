"""What both exchanges of tokens share: routes, sums, byte counts and refusals, without any rank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tercet.distributed.exchange import (
    Handle,
    Routes,
    Sent,
    check_batch,
    check_received,
    expected_bytes,
    routes_of,
    routing_on_wire,
    sum_of_ranks,
)
from tercet.errors import InternalError, ProtocolViolation, RankLost, from_wire
from tercet.kernels.moe import ELSEWHERE

SLOTS_PER_RANK = 3


@st.composite
def routings(draw) -> list[torch.Tensor]:
    """Slots [T, k] of each of some ranks."""
    size, k = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    slot = st.integers(0, size * SLOTS_PER_RANK - 1)
    row = st.lists(slot, min_size=k, max_size=k)
    every = draw(st.lists(st.lists(row, max_size=6), min_size=size, max_size=size))
    return [torch.tensor(rows, dtype=torch.int64).view(-1, k) for rows in every]


def ranks_of(row: list[int]) -> set[int]:
    return {slot // SLOTS_PER_RANK for slot in row}


@given(routings())
def test_each_row_goes_once_to_each_distinct_rank(slots):
    for each in slots:
        routes, weights = routes_of(each, SLOTS_PER_RANK, len(slots)), torch.rand(each.shape)
        within, shares = routing_on_wire(each, weights, routes, SLOTS_PER_RANK)
        for rank, piece in enumerate(routes.bounds):
            rows = [row for row, numbers in enumerate(each.tolist()) if rank in ranks_of(numbers)]
            assert routes.rows[piece].tolist() == rows
            assert within[piece].tolist() == [
                [n % SLOTS_PER_RANK if n // SLOTS_PER_RANK == rank else ELSEWHERE for n in each[row].tolist()]
                for row in rows
            ]
            assert torch.equal(shares[piece], weights[rows])
        assert (within.dtype, shares.dtype) == (torch.int32, torch.float32)


@given(routings())
def test_expected_bytes_are_those_of_rows_that_leave_and_of_their_way_back(slots):
    for rank, each in enumerate(slots):
        leave = sum(len(ranks_of(row) - {rank}) for row in each.tolist())
        come = sum(
            rank in ranks_of(row) for source, other in enumerate(slots) if source != rank for row in other.tolist()
        )
        found = expected_bytes(slots, rank, SLOTS_PER_RANK, row_bytes=10, header_bytes=7)
        assert found == Sent((leave + come) * 10, leave * each.shape[1] * (4 + 4), (len(slots) - 1) * 7)


def test_the_sum_is_in_float32_in_the_order_of_ranks():
    """In bfloat16, or from the last rank to the first, it would be another number."""
    back = torch.tensor([[1e8], [-1e8], [1.0]])  # float32 has 24 bits: 1e8 + 1 is 1e8
    handle = Handle(Routes(torch.tensor([1, 1, 1]), [1, 1, 1]), [0], 2, back[:0], 0)
    assert sum_of_ranks(back, handle).tolist() == [[0.0], [1.0]]
    assert sum_of_ranks(back.flip(0), handle).tolist() == [[0.0], [0.0]]
    fine = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)  # bfloat16 has 8 bits: 256 + 1 is 256
    assert sum_of_ranks(fine, handle).tolist()[1] == [258.0]
    assert sum_of_ranks(fine, handle).dtype == torch.bfloat16


X, SLOTS, WEIGHTS = torch.zeros(2, 4), torch.tensor([[0, 5], [1, 2]]), torch.ones(2, 2)


@pytest.mark.parametrize(
    ("x", "slots", "weights", "layer", "says"),
    [
        (X[0], SLOTS, WEIGHTS, 0, r"not torch.float32 \[4\]"),
        (X[:, :0], SLOTS, WEIGHTS, 0, r"\[2, 0\]"),
        (X.double(), SLOTS, WEIGHTS, 0, "not torch.float64"),
        (X[:1], SLOTS, WEIGHTS, 0, r"for 1 rows .* not torch.int64 \[2, 2\]"),
        (X, SLOTS[:, :1], WEIGHTS, 0, r"\[2, 1\] and torch.float32 \[2, 2\]"),
        (X, SLOTS.int(), WEIGHTS, 0, "torch.int32"),
        (X, SLOTS, WEIGHTS.double(), 0, "torch.float64"),
        (X, SLOTS[:, 0], WEIGHTS[:, 0], 0, "int64 slots"),
        (X, SLOTS + 1, WEIGHTS, 0, "slots from 1 to 6; there are 6"),
        (X, SLOTS - 1, WEIGHTS, 0, "slots from -1 to 4"),
        (X, SLOTS, WEIGHTS, -1, "layer -1"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(x, slots, weights, layer, says):
    check_batch(X, SLOTS, WEIGHTS, 0, num_slots=6)
    with pytest.raises(InternalError, match=says):
        check_batch(x, slots, weights, layer, num_slots=6)


@pytest.mark.parametrize("y", [torch.zeros(2, 4), torch.zeros(3, 5), torch.zeros(3, 4).half()])
def test_what_is_combined_must_be_a_row_for_each_that_came(y):
    handle = Handle(Routes(torch.zeros(0).long(), [0, 0]), [1, 2], 0, X[:0], 8)
    handle.check(torch.zeros(3, 4))
    with pytest.raises(InternalError, match=r"layer 8: combine got .* gave torch.float32 \[3, 4\]"):
        handle.check(y)


@pytest.mark.parametrize("slot", [-2, 3])
def test_a_slot_that_is_not_here_is_refused(slot):
    check_received(torch.tensor([[ELSEWHERE, 0, 2]]), SLOTS_PER_RANK)
    ends = sorted((0, slot))
    with pytest.raises(ProtocolViolation, match=f"slots from {ends[0]} to {ends[1]}; this rank has 3"):
        check_received(torch.tensor([[0, slot]]), SLOTS_PER_RANK)


def test_a_lost_rank_keeps_its_name_over_a_wire():
    error = from_wire("rank_lost", "rank 3 has closed its link")
    assert type(error) is RankLost
    assert (str(error), error.rank) == ("rank 3 has closed its link", None)
