"""Which kind of linear layer a weight gets."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tercet.kernels.kinds import Kernels
from tercet.kernels.linear import (
    Fp16Linear,
    OnednnLinear,
    PackedLinear,
    WidenedLinear,
    WideScratch,
    compute_dtype,
    linear_reference,
)
from tercet.kernels.native.linear import NativeLinear


def activation_dtype(dtype: torch.dtype, kernels: Kernels) -> torch.dtype:
    """Of a model with weights of `dtype`."""
    if kernels.kind == "triton":
        return dtype
    return torch.float32 if kernels.native else compute_dtype(dtype, kernels.device)


class LinearPacker:
    """Makes a model's `PackedLinear`s: native ones, or the fastest of torch's for the dtype, or on a GPU and
    for Triton kernels plain ones."""

    def __init__(self, dtype: torch.dtype, max_fan_in: int, kernels: Kernels) -> None:
        self._dtype, self._kernels = dtype, kernels
        self._widens = not kernels.native and activation_dtype(dtype, kernels) != dtype
        self._scratch = WideScratch(max_fan_in if self._widens else 0)

    def pack(self, weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
        if self._kernels.native:
            return NativeLinear(weight, bias)
        if self._kernels.kind == "triton" or self._kernels.device.type != "cpu":
            return PackedLinear(weight, bias)
        if self._widens and _fbgemm_packs() and Fp16Linear.holds(weight):
            return Fp16Linear(weight, bias)
        if self._widens:
            return WidenedLinear(weight, bias, self._scratch)
        return OnednnLinear(weight, bias) if _onednn_packs(self._dtype) else PackedLinear(weight, bias)


@functools.cache
def _fbgemm_packs() -> bool:
    """Whether fbgemm's float16 product is there and right in this torch, on this CPU."""
    weight = torch.linspace(-1, 1, 64 * 64).reshape(64, 64).bfloat16()
    x = torch.linspace(-1, 1, 3 * 64).reshape(3, 64)
    try:
        packed = Fp16Linear(weight, None).linear(x)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return torch.allclose(packed, linear_reference(x, weight, None), rtol=1e-4, atol=1e-4)


@functools.cache
def _onednn_packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN's private ops are there and right in this torch, on this CPU, for this dtype."""
    weight = torch.linspace(-1, 1, 64 * 64).reshape(64, 64).to(dtype)
    x = torch.linspace(-1, 1, 3 * 64).reshape(3, 64).to(dtype)
    try:
        packed = OnednnLinear(weight, None).linear(x)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return torch.allclose(packed, linear_reference(x, weight, None), rtol=2e-2, atol=2e-2)
