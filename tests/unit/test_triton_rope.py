"""Rotation and cache write in one kernel, against the plain formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.kernels.rope import apply_rope_reference
from tests.triton_interpreter import DEVICE, DTYPES, TOLERANCE

triton = pytest.importorskip("triton")

from tercet.kernels.triton.rope import rope_and_write  # noqa: E402 # after the helper

BLOCKS, S = 6, 4


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 7),
    st.sampled_from([(1, 1), (3, 1), (4, 4), (15, 5), (32, 8)]),
    st.sampled_from([2, 64, 80, 96, 112, 128]),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 99),
)
def test_every_row(rows, heads, dim, dtype, strided, seed):
    query_heads, kv_heads = heads
    torch.manual_seed(seed)
    gap = 3 if strided else 0
    whole = torch.randn(rows, query_heads + 2 * kv_heads + gap, dim).to(DEVICE, dtype)
    qkv = whole[:, : query_heads + 2 * kv_heads]
    before = whole.clone()
    angles = torch.rand(rows, dim // 2, device=DEVICE) * 6
    cache = torch.full((BLOCKS, 2, S, kv_heads, dim), float("nan"), dtype=dtype, device=DEVICE)
    slots = torch.randperm(BLOCKS * S)[:rows].to(DEVICE)
    slots[torch.rand(rows) < 0.3] = -1

    rope_and_write(qkv, angles.cos(), angles.sin(), cache, slots, kv_heads)

    wide = before.double()
    turned = apply_rope_reference(wide, angles.double().cos(), angles.double().sin()).to(dtype)
    keys, values = slice(query_heads, query_heads + kv_heads), slice(query_heads + kv_heads, qkv.shape[1])
    torch.testing.assert_close(qkv[:, :query_heads], turned[:, :query_heads], **TOLERANCE[dtype])
    assert torch.equal(whole[:, query_heads:], before[:, query_heads:])
    expected = torch.full_like(cache, float("nan"))
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot // S, 0, slot % S] = turned[row, keys]
            expected[slot // S, 1, slot % S] = before[row, values]
    torch.testing.assert_close(cache, expected, equal_nan=True, **TOLERANCE[dtype])


def test_tables_of_different_layout_are_refused():
    cos = torch.ones(2, 4)
    with pytest.raises(ValueError, match="laid out"):
        rope_and_write(torch.ones(2, 3, 8), cos, torch.ones(4, 2).T, torch.ones(1, 2, 4, 1, 8), torch.ones(2), 1)
