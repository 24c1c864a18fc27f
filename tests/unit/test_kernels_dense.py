"""Linear, norm, RoPE and SwiGLU against their references."""

from __future__ import annotations

import pytest
import torch

from tercet.kernels.activation import silu_and_mul, silu_and_mul_reference
from tercet.kernels.kinds import CPU, Kernels
from tercet.kernels.linear import (
    SLICE,
    Fp16Linear,
    OnednnLinear,
    PackedLinear,
    WidenedLinear,
    WideScratch,
    compute_dtype,
    linear_reference,
)
from tercet.kernels.norm import RmsNorm, rms_norm_reference
from tercet.kernels.packing import LinearPacker
from tercet.kernels.rope import RopeTable, apply_rope, apply_rope_reference


@pytest.mark.parametrize("rows", [1, 2, 17, 64, 70, 515])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", ["plain", "onednn", "widened", "chosen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(kind, dtype, rows, biased):
    torch.manual_seed(0)
    weight, bias = torch.randn(SLICE + 100, 96).to(dtype), torch.randn(SLICE + 100).to(dtype) if biased else None
    if kind == "chosen":
        linear = LinearPacker(dtype, 128, Kernels()).pack(weight, bias)
    elif kind == "widened":
        if compute_dtype(dtype, CPU) == dtype:
            pytest.skip("this CPU multiplies the dtype itself")
        linear = WidenedLinear(weight, bias, WideScratch(128))
    elif compute_dtype(dtype, CPU) != dtype:
        pytest.skip("activations are float32 on this CPU")
    else:
        linear = {"plain": PackedLinear, "onednn": OnednnLinear}[kind](weight, bias)
    x = torch.randn(rows, 96).to(compute_dtype(dtype, CPU))
    tolerance = 1e-4 if dtype == torch.float32 else 0.15  # bfloat16 rounds inputs and results of about 10 to 2^-8
    torch.testing.assert_close(linear.linear(x), linear_reference(x, weight, bias), rtol=1e-2, atol=tolerance)


def test_onednn_sees_few_numbers_of_rows(monkeypatch):
    """It keeps a kernel with scratch memory for each: prompts of every length made a worker grow without an end."""
    seen = set()
    linear, product = OnednnLinear(torch.randn(8, 8), None), OnednnLinear._product
    monkeypatch.setattr(OnednnLinear, "_product", lambda self, x: (seen.add(len(x)), product(self, x))[1])
    for rows in range(2500):
        assert linear.linear(torch.ones(rows, 8)).shape == (rows, 8)
    assert len(seen) < 40
    assert max(seen) == 512


@pytest.mark.parametrize("rows", [0, 1, 17])
@pytest.mark.parametrize("biased", [False, True])
def test_fp16_linear(rows, biased):
    """Where float16 holds the weights, the product is that of the weights themselves."""
    weight = (torch.randn(200, 96) * 64).round().bfloat16() / 64
    bias = torch.randn(200).bfloat16() if biased else None
    assert Fp16Linear.holds(weight)
    x = torch.randn(rows, 96)
    out = Fp16Linear(weight, bias).linear(x)
    torch.testing.assert_close(out, linear_reference(x, weight, bias), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("value", [1e5, 1e-6])
def test_weights_that_float16_does_not_hold_stay_as_they_are(value):
    weight = torch.full((40, 64), value).bfloat16()
    assert not Fp16Linear.holds(weight)
    x = torch.randn(2, 64).to(compute_dtype(torch.bfloat16, CPU))
    out = LinearPacker(torch.bfloat16, 64, Kernels()).pack(weight).linear(x)
    torch.testing.assert_close(out, linear_reference(x, weight, None), rtol=2e-2, atol=value * 0.1)


def test_linear_keeps_bfloat16_weights_exact():
    """More than one row is multiplied in float32, whatever the weights were rounded to when they were stored."""
    if compute_dtype(torch.bfloat16, CPU) == torch.bfloat16:
        pytest.skip("this CPU multiplies bfloat16 itself")
    weight, x = torch.randn(300, 64).bfloat16(), torch.randn(3, 64)
    out = LinearPacker(torch.bfloat16, 64, Kernels()).pack(weight).linear(x)
    torch.testing.assert_close(out, linear_reference(x, weight, None), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_rms_norm(scale):
    x, weight = torch.randn(5, 3, 64) * scale, torch.randn(3, 64)
    torch.testing.assert_close(RmsNorm(weight, 1e-5)(x), rms_norm_reference(x, weight, 1e-5))


def test_rms_norm_of_zeros_is_zero():
    assert RmsNorm(torch.ones(8), 1e-5)(torch.zeros(2, 8)).eq(0).all()


def test_rope():
    inv_freq, positions = 100.0 ** -torch.linspace(0, 1, 8), torch.tensor([0, 1, 7, 90])
    x, angles = torch.randn(4, 3, 16), torch.outer(positions.float(), inv_freq)
    expected = apply_rope_reference(x, angles.cos() * 1.5, angles.sin() * 1.5)
    wide = torch.cat((x, x), 1)[:, 2:5]  # a view with strides, written in place as the model does it
    apply_rope(x, *RopeTable(inv_freq, 128, 1.5, torch.device("cpu")).rows(positions, torch.float32), out=wide)
    torch.testing.assert_close(wide, expected)
    apply_rope(x, *RopeTable(inv_freq, 128, 1.5, torch.device("cpu")).rows(positions, torch.float32), out=x)
    torch.testing.assert_close(x, expected)


def test_silu_and_mul():
    gate_up = torch.randn(5, 32) * 5
    torch.testing.assert_close(silu_and_mul(gate_up), silu_and_mul_reference(gate_up))
