"""Decode attention over a shared prefix, against float64 over each whole sequence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.paged import Paged, attention
from tests.triton_interpreter import DEVICE, DTYPES, TOLERANCE

triton = pytest.importorskip("triton")

from tercet.kernels.triton.decode import plan_decode  # noqa: E402 # after the helper
from tercet.kernels.triton.shared_prefix import own_contexts, shared_prefix_attention  # noqa: E402

TILE = 16
OWN = st.sampled_from([None, 1, 7, 16, 17, 40])  # None: a dead row


def check(prefix, own, *, size=8, kv_heads=2, group=3, dim=64, dtype=torch.float32, programs=5, seed=0, **options):
    paged = Paged([prefix, *(length or 0 for length in own)], size, kv_heads, dim, dtype, seed)
    query = torch.randn(len(own), kv_heads * group + 2, dim).to(DEVICE, dtype)[:, : kv_heads * group]
    contexts = torch.tensor([0 if n is None else prefix + n for n in own], dtype=torch.int32, device=DEVICE)
    length = paged.contexts[:1]
    most = max((n or 0 for n in own), default=0)
    plan = None
    if own:
        plan = plan_decode(
            own_contexts(contexts, length), kv_heads, most_context=most, window=options.get("window"),
            programs=programs, tile=TILE,
        )  # fmt: skip
    out = shared_prefix_attention(
        query, paged.cache, paged.tables[0], length, paged.tables[1:], contexts, most_prefix=prefix,
        most_context=most, programs=programs, plan=plan, **options,
    )  # fmt: skip
    value_dim = options.pop("value_dim", None)
    expected = torch.zeros_like(out)
    for i, tokens in enumerate(own):
        if tokens is not None:
            keys = torch.cat((paged.keys[0], paged.keys[i + 1]))
            values = torch.cat((paged.values[0], paged.values[i + 1]))[..., :value_dim]
            expected[i] = attention(query[i : i + 1], keys, values, **options)[0]
    torch.testing.assert_close(out, expected, **TOLERANCE[dtype])


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from([0, 1, 15, 16, 17, 33, 60]),
    st.lists(OWN, max_size=4),
    st.sampled_from([1, 4, 30]),
    st.sampled_from([None, 1, 5, 20, 200]),
    st.sampled_from([None, 2.0]),
    st.integers(0, 99),
)
def test_any_lengths(prefix, own, programs, window, soft_cap, seed):
    check(prefix, own, programs=programs, window=window, soft_cap=soft_cap, seed=seed)


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from([(1, 1), (3, 1), (1, 7), (1, 35)]),
    st.sampled_from([64, 80, 112, 256]),
    st.sampled_from([1, 4, 16]),
    st.integers(0, 99),
)
def test_any_model(dtype, heads, dim, size, seed):
    check(16, [3, 18], kv_heads=heads[0], group=heads[1], dim=dim, size=size, dtype=dtype, seed=seed)


@pytest.mark.parametrize("window", [5, 20, 36])
def test_a_window_that_ends_in_the_prefix(window):
    check(33, [1, 7, None, 17], window=window)


def test_values_narrower_than_keys():
    check(24, [9, 2], dim=80, value_dim=64)


def test_a_plan_of_its_own():
    paged = Paged([32, 5], 16, 1, 64, torch.float32)
    query = torch.randn(1, 2, 64, device=DEVICE)
    contexts = torch.tensor([37], dtype=torch.int32, device=DEVICE)
    out = shared_prefix_attention(
        query, paged.cache, paged.tables[0], paged.contexts[:1], paged.tables[1:], contexts, most_prefix=32,
        most_context=5, programs=4,
    )  # fmt: skip
    torch.testing.assert_close(out, attention(query, torch.cat(paged.keys), torch.cat(paged.values)))
