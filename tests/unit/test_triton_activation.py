"""SwiGLU's kernel against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.triton_interpreter import DEVICE, DTYPES, TOLERANCE

triton = pytest.importorskip("triton")

from tercet.kernels.triton.activation import silu_and_mul  # noqa: E402 # after the helper


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 5),
    st.sampled_from([1, 3, 64, 1023, 1024, 1025, 1536]),
    st.sampled_from(DTYPES),
    st.sampled_from([0, 7]),
    st.sampled_from([1, 200]),
)
def test_rows(rows, n, dtype, gap, scale):
    torch.manual_seed(rows + n)
    whole = torch.full((rows, 2 * n + gap), float("nan"), dtype=dtype, device=DEVICE)
    gate_up = whole[:, : 2 * n]
    gate_up[:] = torch.randn(rows, 2 * n)
    gate_up[:, :n] *= scale  # the sigmoid's tails
    out = silu_and_mul(gate_up)
    gate, up = gate_up.double().chunk(2, -1)
    assert out.dtype == dtype
    assert out.is_contiguous()
    torch.testing.assert_close(out, (gate / (1 + (-gate).exp()) * up).to(dtype), **TOLERANCE[dtype])
