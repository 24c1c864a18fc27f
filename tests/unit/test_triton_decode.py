"""Paged decode attention against float64, and its even division of the work."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.paged import Paged, attention
from tests.triton_interpreter import DEVICE, DTYPES, TOLERANCE

triton = pytest.importorskip("triton")

from tercet.kernels.triton import decode  # noqa: E402 # after the helper
from tercet.kernels.triton.decode import decode_attention, plan_decode, tile_borders  # noqa: E402

TILE = 16
LENGTHS = st.sampled_from([0, 1, 7, 15, 16, 17, 31, 32, 33, 48, 90])


def check(lengths, *, size=8, kv_heads=2, group=3, dim=64, dtype=torch.float32, programs=5, seed=0, **options):
    """Every sequence against the reference. Also with the query as a part of wider rows, as a model has it."""
    paged = Paged(lengths, size, kv_heads, dim, dtype, seed)
    wide = torch.randn(len(lengths), kv_heads * group + 2, dim).to(DEVICE, dtype)
    query = wide[:, : kv_heads * group]
    most = max(lengths, default=0)
    plan = None
    if options.get("window"):
        paged.forget([length - options["window"] for length in lengths])
    if lengths:
        window = options.get("window")
        plan = plan_decode(paged.contexts, kv_heads, most_context=most, window=window, programs=programs, tile=TILE)
    out = decode_attention(
        query, paged.cache, paged.tables, paged.contexts, most_context=most, programs=programs, plan=plan, **options
    )
    options.pop("scale", None)
    value_dim = options.pop("value_dim", None)
    expected = torch.zeros_like(out)
    for i, length in enumerate(lengths):
        if length:
            values = paged.values[i][..., :value_dim]
            expected[i] = attention(query[i : i + 1], paged.keys[i], values, **options)[0]
    torch.testing.assert_close(out, expected, **TOLERANCE[dtype])


@settings(max_examples=12, deadline=None)
@given(
    st.lists(LENGTHS, max_size=4),
    st.sampled_from([1, 2, 3, 7, 40]),
    st.sampled_from([None, 1, 5, 16, 33, 200]),
    st.sampled_from([None, 2.0]),
    st.integers(0, 99),
)
def test_any_lengths_over_any_number_of_programs(lengths, programs, window, soft_cap, seed):
    check(lengths, programs=programs, window=window, soft_cap=soft_cap, seed=seed)


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from([(1, 1), (4, 1), (1, 7), (2, 17)]),
    st.sampled_from([64, 80, 96, 112, 256]),
    st.sampled_from([1, 4, 16, 32]),
    st.integers(0, 99),
)
def test_any_model(dtype, heads, dim, size, seed):
    check([1, 37, 20], kv_heads=heads[0], group=heads[1], dim=dim, size=size, dtype=dtype, seed=seed)


def test_values_narrower_than_keys():
    check([9, 40], dim=80, value_dim=64)


def test_the_tile_that_a_gpu_takes():
    paged = Paged([130, 3], 16, 1, 64, torch.float32)
    query = torch.randn(2, 2, 64, device=DEVICE)
    common = (paged.cache, paged.tables, paged.contexts)
    out = decode_attention(query, *common, most_context=130, programs=2)
    for i in range(2):
        torch.testing.assert_close(out[i : i + 1], attention(query[i : i + 1], paged.keys[i], paged.values[i]))
    half = decode_attention(
        query / 2, paged.cache, paged.tables, paged.contexts, most_context=130, programs=2, scale=0.25
    )
    torch.testing.assert_close(half, out)  # twice the scale of 64^-0.5


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 600))
def test_shares_differ_by_at_most_one(total, programs):
    borders, busy = tile_borders(torch.tensor([total]), programs)
    shares = borders.diff()
    assert borders[0] == 0
    assert borders[-1] == total
    assert shares.max() - shares.min() <= 1
    assert int((shares > 0).sum()) == min(total, programs)
    assert (shares[: int(busy)] > 0).all() or total == 0
    # the merge finds the program of a tile by this formula
    for tile in {0, total // 3, total - 1} if total else ():
        program = ((tile + 1) * int(busy) - 1) // total
        assert borders[program] <= tile < borders[program + 1]


def test_skewed_lengths_are_shared_evenly():
    plan = plan_decode(torch.tensor([5000, 1, 0, 70]), 2, most_context=5000, window=None, programs=8)
    assert plan.ends.tolist() == [158, 160, 160, 164]
    assert set(plan.borders.diff().tolist()) == {20, 21}


def test_a_window_leaves_its_tiles_alone():
    plan = plan_decode(torch.tensor([5000, 1, 0, 70]), 1, most_context=5000, window=64, programs=8)
    assert plan.ends.diff(prepend=torch.zeros(1)).tolist() == [2, 1, 0, 2]


def test_no_more_programs_than_tiles():
    plan = plan_decode(torch.tensor([100, 100]), 2, most_context=100, window=None, programs=500)
    assert len(plan.borders) - 1 == 2 * 2 * -(-100 // decode.TILE)
