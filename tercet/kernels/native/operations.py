"""Each operation of the native kernels alone, on float32 tensors, for checks and tests: a step makes one call for all.

T rows of the batch   H query heads   Hkv key-value heads   D head dimension
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from tercet.kernels.native.layers import NativeShape, NativeStep, native_shape, native_step
from tercet.kernels.native.library import library


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, n], weight [n]."""
    out = torch.empty_like(x)
    library().rms_norm_forward(x.data_ptr(), weight.data_ptr(), eps, *x.shape, out.data_ptr())
    return out


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """[T, 2n], the gate's n columns first -> [T, n]."""
    rows, n = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty(rows, n)
    library().silu_and_mul_forward(gate_up.data_ptr(), rows, n, out.data_ptr())
    return out


def rotate_and_write(qkv: Tensor, qk_norm: Tensor | None, shape: NativeShape, step: NativeStep, cache: Tensor) -> None:
    """qkv [T, H + 2 Hkv, D]: queries and keys are normed and rotated in place, keys and values written to `cache`, one
    layer's [blocks, 2, S, Hkv, D]."""
    weight = None if qk_norm is None else qk_norm.data_ptr()
    of, native = native_shape(shape, 0), native_step(step, cache)
    library().rotate_and_write_forward(qkv.data_ptr(), weight, ctypes.byref(of), ctypes.byref(native))


def attend(query: Tensor, shape: NativeShape, step: NativeStep, cache: Tensor, window: int | None) -> Tensor:
    """query [T, H, D], its rows may be strided -> [T, H, D]. Each sequence of the step over its part of `cache`."""
    out = torch.empty(query.shape)
    of, native = native_shape(shape, 0), native_step(step, cache)
    library().attention_forward(
        query.data_ptr(), query.stride(0), ctypes.byref(of), ctypes.byref(native), window or 0, out.data_ptr()
    )
    return out


def spans(rows: Sequence[tuple[int, int, int, Tensor]]) -> Tensor:
    """Of each sequence (first row, rows, context, block table [blocks] int64), which must live as long as these."""
    return torch.tensor([[*each, table.data_ptr()] for *each, table in rows], dtype=torch.int64).view(-1, 4)
