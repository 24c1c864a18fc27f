"""Whether the native kernels compute the right values on this CPU: each against its reference, before they are used."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from tercet.kernels.activation import silu_and_mul_reference
from tercet.kernels.attention import attention_reference
from tercet.kernels.linear import linear_reference
from tercet.kernels.native import operations
from tercet.kernels.native.layers import NativeShape, NativeStep
from tercet.kernels.native.library import NativeMissingError, library
from tercet.kernels.native.linear import NativeLinear
from tercet.kernels.norm import rms_norm_reference
from tercet.kernels.rope import apply_rope_reference

TOLERANCE = 2e-2  # of values around 1: where the CPU multiplies bfloat16, what goes in is rounded to 2^-8


@functools.cache
def missing() -> str | None:
    """Why the native kernels cannot be used here; None if they can. Builds them if need be."""
    try:
        library()
    except NativeMissingError as error:
        return str(error)
    for name, computed, expected in _trials():
        if not torch.allclose(computed, expected, rtol=TOLERANCE, atol=TOLERANCE):
            return f"{name} gives wrong values on this CPU (off by {(computed - expected).abs().max():.2g})"
    return None


def _trials() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, what the kernel gives, what it should."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    for dtype in (torch.float32, torch.bfloat16):
        weight = (some(70, 64) / 8).to(dtype)
        for rows in (1, 2, 5, 30):
            x = some(rows, 64)
            yield (
                f"linear ({dtype}, {rows} rows)",
                NativeLinear(weight, None).linear(x),
                linear_reference(x, weight, None),
            )
    x, weight = some(3, 70), some(70)
    yield "rms_norm", operations.rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5)
    yield "silu_and_mul", operations.silu_and_mul(x), silu_and_mul_reference(x)
    for dtype in (torch.float32, torch.bfloat16):
        yield from _attention(some(150, 8, 32), dtype)


def _attention(qkv: Tensor, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of 4 query heads over 2 KV heads of 32; 150 tokens in ten blocks of 16."""
    angles, positions = torch.outer(torch.arange(150.0), torch.arange(1, 17) / 16), torch.arange(150)
    table, cache = torch.tensor([2, 0, 1, 9, 3, 8, 4, 7, 5, 6]), torch.zeros(10, 2, 16, 2, 32, dtype=dtype)
    shape = NativeShape(4, 2, 32, 1e-5, angles.cos(), angles.sin())
    step = NativeStep(positions, table[positions // 16] * 16 + positions % 16, operations.spans([(0, 150, 150, table)]))
    rotated = apply_rope_reference(qkv[:, :6], angles.cos(), angles.sin())
    value = qkv[:, 6:].to(dtype).float()
    expected = attention_reference(rotated[:, :4], rotated[:, 4:].to(dtype).float(), value, None)
    operations.rotate_and_write(qkv, None, shape, step, cache)
    yield f"rotate_and_write ({dtype})", qkv[:, :6], rotated
    yield f"attend ({dtype})", operations.attend(qkv[:, :4], shape, step, cache, None), expected
