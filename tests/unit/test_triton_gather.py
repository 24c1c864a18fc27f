"""Heads and blocks of a cache, packed and unpacked, against plain indexing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.triton_interpreter import DEVICE, DTYPES

triton = pytest.importorskip("triton")

from tercet.kernels.triton.gather import gather, scatter  # noqa: E402 # after the helper


@st.composite
def cases(draw):
    heads = draw(st.integers(1, 5))
    first = draw(st.integers(0, heads - 1))
    shape = (draw(st.integers(1, 6)), 2, draw(st.sampled_from([1, 4, 16])), heads, draw(st.sampled_from([16, 80, 128])))
    count = draw(st.integers(0, shape[0]))
    return shape, draw(st.permutations(range(shape[0])))[:count], first, draw(st.integers(0, heads - first))


@settings(max_examples=12, deadline=None)
@given(cases(), st.sampled_from([*DTYPES, torch.int8]), st.sampled_from([torch.int32, torch.int64]))
def test_there_and_back(case, dtype, index_dtype):
    shape, chosen, first, heads = case
    torch.manual_seed(0)
    layers = (torch.randn(shape[0], 3, *shape[1:]) * 50).to(DEVICE, dtype)
    cache = layers[:, 1]  # whose blocks are apart
    blocks = torch.tensor(chosen, dtype=index_dtype, device=DEVICE)
    packed = gather(cache, blocks, first, heads)
    assert packed.is_contiguous()
    assert torch.equal(packed, cache[blocks][..., first : first + heads, :])

    other = (torch.randn(packed.shape) * 50).to(DEVICE, dtype)
    expected = layers.clone()
    expected[:, 1][blocks, ..., first : first + heads, :] = other
    scatter(cache, blocks, first, other)
    assert torch.equal(layers, expected)


def test_what_does_not_fit_is_refused():
    cache, blocks = torch.zeros(2, 2, 4, 3, 16), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"heads 2 \.\. 3 of 3"):
        gather(cache, blocks, 2, 2)
    with pytest.raises(ValueError, match="float16"):
        scatter(cache, blocks, 0, torch.zeros(1, 2, 4, 3, 16, dtype=torch.float16))
    with pytest.raises(ValueError, match="strides"):
        scatter(cache, blocks, 0, torch.zeros(1, 2, 4, 3, 32)[..., ::2])
