"""RMSNorm (arXiv:1910.07467) over the last dimension: x / sqrt(mean(x²) + eps) * weight, computed in float32.

x       [.., n]; with a weight per head [.., heads, n]. Its rows may be strided, its last dimension is contiguous
weight  [n] or [heads, n]
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tercet.kernels.triton.dependent import after_previous, dependent

TILE = 1024  # numbers of a program: several narrow rows, or one wide row


@triton.jit
def _rms_norm(
    x,
    x_outer,
    x_inner,
    residual,
    residual_outer,
    residual_inner,
    total,
    weight,
    weight_stride,
    out,
    rows,
    inner,
    eps,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ADDS: tl.constexpr,
    PDL: tl.constexpr,
):
    after_previous(PDL)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    here = (row < rows)[:, None] & (col < N)[None, :]
    outer, head = row // inner, row % inner
    at = (outer * x_outer + head * x_inner)[:, None] + col[None, :]
    values = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    flat = row[:, None] * N + col[None, :]
    if ADDS:
        at = (outer * residual_outer + head * residual_inner)[:, None] + col[None, :]
        values += tl.load(residual + at, mask=here, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)  # what the next layer sees is what is normed
        tl.store(total + flat, rounded, mask=here)
        values = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, 1) / N + eps)
    at = (head * weight_stride)[:, None] + col[None, :]
    weights = tl.load(weight + at, mask=here, other=0.0).to(tl.float32)
    tl.store(out + flat, values * scale[:, None] * weights, mask=here)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """-> [.., n] of x's dtype, contiguous."""
    return _launch(x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> the norm of residual + x, and residual + x, both of x's shape and dtype, contiguous."""
    return _launch(x, residual, weight, eps)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    n = x.shape[-1]
    seen, other = _as_heads(x), _as_heads(x if residual is None else residual)
    rows, inner = seen.shape[0] * seen.shape[1], seen.shape[1]
    if weight.dim() > 1 and len(weight) != inner:
        raise ValueError(f"a weight of {len(weight)} heads for {inner}")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = out if residual is None else torch.empty_like(out)
    if rows:
        cols = triton.next_power_of_2(n)
        tall = max(1, TILE // cols)
        _rms_norm[(triton.cdiv(rows, tall),)](
            seen,
            seen.stride(0),
            seen.stride(1),
            other,
            other.stride(0),
            other.stride(1),
            total,
            weight,
            weight.stride(0) if weight.dim() > 1 else 0,
            out,
            rows,
            inner,
            eps,
            N=n,
            ROWS=tall,
            COLS=cols,
            ADDS=residual is not None,
            num_warps=4 if cols <= 4096 else 8,
            **dependent(),
        )
    return out, total


def _as_heads(x: Tensor) -> Tensor:
    """[.., n] -> [outer, inner, n], a view where the strides allow it."""
    return x.reshape(-1, x.shape[-2], x.shape[-1]) if x.dim() > 2 else x.reshape(-1, 1, x.shape[-1])
