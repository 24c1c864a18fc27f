"""The norm kernels against float64, over shapes, strides and dtypes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.triton_interpreter import DEVICE, DTYPES, TOLERANCE

triton = pytest.importorskip("triton")

from tercet.kernels.triton.rms_norm import add_rms_norm, rms_norm  # noqa: E402 # after the helper

WIDTHS = st.sampled_from([1, 2, 16, 63, 64, 80, 96, 576, 1025])


def reference(x, weight, eps):
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def strided(*shape, dtype, gap):
    """Random numbers whose rows lie `gap` apart, with NaN between them."""
    whole = torch.full((*shape[:-1], shape[-1] + gap), float("nan"), dtype=dtype, device=DEVICE)
    whole[..., : shape[-1]] = torch.randn(shape)
    return whole[..., : shape[-1]]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 9), WIDTHS, st.sampled_from(DTYPES), st.sampled_from([0, 3]), st.sampled_from([1e-6, 1e-2]))
def test_rows(rows, n, dtype, gap, eps):
    torch.manual_seed(rows + n)
    x, weight = strided(rows, n, dtype=dtype, gap=gap), torch.randn(n, device=DEVICE).to(dtype)
    out = rms_norm(x, weight, eps)
    assert out.dtype == dtype
    assert out.is_contiguous()
    torch.testing.assert_close(out, reference(x, weight, eps).to(dtype), **TOLERANCE[dtype])


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 5), st.integers(1, 7), WIDTHS, st.sampled_from(DTYPES), st.booleans())
def test_heads_of_a_wider_row(tokens, heads, n, dtype, own_weights):
    torch.manual_seed(tokens)
    x = torch.randn(tokens, heads + 2, n).to(DEVICE, dtype)[:, 1:-1]  # as the queries and keys of a qkv row
    weight = torch.randn((heads, n) if own_weights else (n,), device=DEVICE)
    out = rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(out, reference(x, weight, 1e-5).to(dtype), **TOLERANCE[dtype])


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 9), WIDTHS, st.sampled_from(DTYPES), st.sampled_from([0, 5]))
def test_with_the_residual(rows, n, dtype, gap):
    torch.manual_seed(n)
    x, residual = strided(rows, 2, n, dtype=dtype, gap=gap), strided(rows, 2, n, dtype=dtype, gap=2 * gap)
    weight = torch.randn(n, device=DEVICE).to(dtype)
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    assert normed.dtype == total.dtype == dtype
    torch.testing.assert_close(total, (x.double() + residual.double()).to(dtype), **TOLERANCE[dtype])
    torch.testing.assert_close(normed, reference(total, weight, 1e-5).to(dtype), **TOLERANCE[dtype])


def test_more_dimensions():
    x, weight = torch.randn(2, 3, 4, 8, device=DEVICE), torch.randn(4, 8, device=DEVICE)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), reference(x, weight, 1e-5).float())


def test_a_weight_of_other_heads_is_refused():
    with pytest.raises(ValueError, match="2 heads for 3"):
        rms_norm(torch.randn(1, 3, 8), torch.randn(2, 8), 1e-5)
