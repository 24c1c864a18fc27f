"""Ragged prefill over the paged cache against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.kernels.attention import attention_reference
from tests.paged import Paged, attention
from tests.triton_interpreter import DEVICE, DTYPES, TOLERANCE

triton = pytest.importorskip("triton")

from tercet.kernels.triton import prefill  # noqa: E402 # after the helper
from tercet.kernels.triton.prefill import prefill_attention  # noqa: E402

TILING = prefill._tiling
CHUNK = st.tuples(st.sampled_from([0, 1, 5, 15, 16, 17, 33]), st.sampled_from([0, 1, 15, 16, 17, 40]))  # rows, cached


def check(chunks, *, size=8, kv_heads=2, group=3, dim=64, dtype=torch.float32, seed=0, padding=0, **options):
    paged = Paged([rows + cached for rows, cached in chunks], size, kv_heads, dim, dtype, seed)
    if options.get("window"):
        paged.forget([cached - options["window"] + 1 for _, cached in chunks])
    counts = torch.tensor([0] + [rows for rows, _ in chunks])
    starts = counts.cumsum(0)
    total = int(starts[-1])
    query = torch.randn(total + padding, kv_heads * group + 2, dim).to(DEVICE, dtype)[:, : kv_heads * group]
    out = prefill_attention(
        query, paged.cache, paged.tables, starts.to(DEVICE, torch.int32), paged.contexts, most_rows=int(counts.max()),
        **options,
    )  # fmt: skip
    value_dim = options.pop("value_dim", None)
    for i, (rows, _) in enumerate(chunks):
        mine = slice(int(starts[i]), int(starts[i]) + rows)
        values = paged.values[i][..., :value_dim]
        expected = attention(query[mine], paged.keys[i], values, **options)
        torch.testing.assert_close(out[mine], expected, **TOLERANCE[dtype])
        if not options.get("soft_cap") and rows:
            other = attention_reference(query[mine].cpu(), paged.keys[i].cpu(), values.cpu(), options.get("window"))
            torch.testing.assert_close(out[mine].cpu(), other, **TOLERANCE[dtype])


@pytest.fixture(scope="module", autouse=True)
def small_tiles():
    """So that few rows make several tiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "_tiling", lambda *_: {"ROWS": 16, "TILE": 16, "num_stages": 2})
        yield


@settings(max_examples=10, deadline=None)
@given(
    st.lists(CHUNK, max_size=3),
    st.sampled_from([None, 1, 5, 16, 33, 200]),
    st.sampled_from([None, 2.0]),
    st.sampled_from([0, 3]),
    st.integers(0, 99),
)
def test_any_chunks(chunks, window, soft_cap, padding, seed):
    check(chunks, window=window, soft_cap=soft_cap, padding=padding, seed=seed)


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from([(1, 1), (3, 1), (1, 7), (1, 35)]),
    st.sampled_from([64, 80, 96, 112, 256]),
    st.sampled_from([1, 4, 16, 32]),
    st.integers(0, 99),
)
def test_any_model(dtype, heads, dim, size, seed):
    check([(1, 36), (17, 3)], kv_heads=heads[0], group=heads[1], dim=dim, size=size, dtype=dtype, seed=seed)


def test_values_narrower_than_keys():
    check([(9, 40)], dim=80, value_dim=64)


@pytest.mark.parametrize("many", [0, 1 << 20])
@pytest.mark.parametrize(
    ("dtype", "dim"), [(torch.float16, 64), (torch.float16, 80), (torch.float16, 256), (torch.float32, 64)]
)
def test_the_tiles_that_a_gpu_takes(many, dtype, dim, monkeypatch):
    monkeypatch.setattr(prefill, "_tiling", TILING)
    monkeypatch.setattr(prefill, "MANY", many)
    for window in (None, 90):
        check([(200, 170), (1, 0), (130, 0)], size=16, kv_heads=1, group=2, dim=dim, dtype=dtype, window=window)
