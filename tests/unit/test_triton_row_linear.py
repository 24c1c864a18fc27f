"""The product of few rows, with what stands beside it in a layer, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from tests.triton_interpreter import DEVICE, DTYPES, TOLERANCE

triton = pytest.importorskip("triton")

from tercet.kernels.triton.row_linear import INPUTS, Norm, row_linear  # noqa: E402 # after the helper

EPS = 1e-5


def expected(x, weight, bias, norm, gated, residual):
    wide = x.double()
    if norm is not None:
        wide = wide * torch.rsqrt((wide**2).mean(-1, keepdim=True) + norm.eps) * norm.weight.double()
    made = functional.linear(wide, weight.double(), None if bias is None else bias.double())
    if gated:
        gate, up = made.chunk(2, -1)
        made = functional.silu(gate) * up
    return made if residual is None else made + residual.double()


def random(dtype, *shape):
    return torch.randn(shape).to(dtype).to(DEVICE)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 5),
    inputs=st.sampled_from([1, 5, 64, 576, INPUTS - 1, INPUTS, INPUTS + 1, 3 * INPUTS]),
    outputs=st.sampled_from([1, 2, 7, 16]),
    dtype=st.sampled_from(DTYPES),
    has_norm=st.booleans(),
    has_bias=st.booleans(),
    gated=st.booleans(),
    adds=st.booleans(),
    gap=st.sampled_from([0, 3]),
)
def test_rows(rows, inputs, outputs, dtype, has_norm, has_bias, gated, adds, gap):
    torch.manual_seed(rows + inputs + outputs)
    x = torch.full((rows, inputs + gap), float("nan"), dtype=dtype, device=DEVICE)[:, :inputs]
    x[:] = random(dtype, rows, inputs)
    weight = (torch.randn(outputs * (1 + gated), inputs) / inputs**0.5).to(dtype).to(DEVICE)
    norm = Norm(random(dtype, inputs), EPS) if has_norm else None
    bias = random(dtype, len(weight)) if has_bias else None
    residual = random(dtype, rows, outputs) if adds else None
    found = row_linear(x, weight, bias, norm=norm, gated=gated, residual=residual)
    assert found.dtype == dtype
    assert found.shape == (rows, outputs)
    torch.testing.assert_close(found, expected(x, weight, bias, norm, gated, residual).to(dtype), **TOLERANCE[dtype])


@pytest.mark.parametrize("scale", [1e-4, 300.0])
def test_the_tails_of_the_gate_and_the_norm(scale):
    """Neither overflows, nor does eps vanish."""
    x, weight = random(torch.float32, 1, 40) * scale, random(torch.float32, 6, 40)
    norm = Norm(torch.ones(40, device=DEVICE), EPS)
    for given_norm in (None, norm):
        found = row_linear(x, weight, None, norm=given_norm, gated=True)
        torch.testing.assert_close(
            found, expected(x, weight, None, given_norm, True, None).float(), rtol=1e-4, atol=1e-6
        )
