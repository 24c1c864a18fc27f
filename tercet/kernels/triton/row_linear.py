"""y = x Wᵀ + b for a single row, with what stands beside it in a decoder layer: the norm of x before it, the gate or
the residual behind it. So a layer is a few kernels, each of which reads its weights at the rate of the memory; a
library's product of one row reaches less, and the small kernels between cost as much as the bytes of a whole weight.

R rows   K inputs   N outputs   weight [N, K], or [2N, K] if gated: the gate's rows first
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tercet.kernels.triton.dependent import after_previous, dependent

MOST_ROWS = 1  # that it is worth while for: each row reads the weights by itself
OUTPUTS, INPUTS, WARPS = 2, 2048, 8  # of a program: outputs, inputs at a time


class Norm(NamedTuple):
    """RMSNorm over a row of x (see rms_norm.py)."""

    weight: Tensor  # [K]
    eps: float


@triton.jit
def _tile(rows, at, here, K):
    """Of the weights, [OUTPUTS, INPUTS]; zeros behind the end."""
    return tl.load(rows + at[None, :], mask=here & (at < K)[None, :], other=0.0)


@triton.jit
def _row_linear(
    x,
    x_stride,
    weight,
    bias,
    norm,
    eps,
    residual,
    residual_stride,
    out,
    N: tl.constexpr,
    K: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    ADDS: tl.constexpr,
    PDL: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(1).to(tl.int64)
    here = (n < N)[:, None]
    col = tl.arange(0, INPUTS)
    firsts = weight + n[:, None] * K
    seconds = firsts + N * K
    tile = _tile(firsts, col, here, K)  # on its way while the kernel before ends
    other = _tile(seconds, col, here, K) if GATED else tile
    after_previous(PDL)
    acc = tl.zeros([OUTPUTS, INPUTS], tl.float32)
    acc_up = tl.zeros([OUTPUTS, INPUTS], tl.float32)
    squares = tl.zeros([INPUTS], tl.float32)
    for k in range(0, K, INPUTS):
        at = k + col
        v = tl.load(x + row * x_stride + at, mask=at < K, other=0.0).to(tl.float32)
        if NORM:
            squares += v * v
            v = v * tl.load(norm + at, mask=at < K, other=0.0).to(tl.float32)
        acc += tile.to(tl.float32) * v[None, :]
        tile = _tile(firsts, at + INPUTS, here, K)
        if GATED:
            acc_up += other.to(tl.float32) * v[None, :]
            other = _tile(seconds, at + INPUTS, here, K)
    made = tl.sum(acc, 1)
    up = tl.sum(acc_up, 1)
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(squares, 0) / K + eps)
        made *= scale
        up *= scale
    if BIAS:
        made += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        if GATED:
            up += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)
    if GATED:
        small = tl.exp(-tl.abs(made))  # as in activation.py
        made *= tl.where(made >= 0, 1.0, small) / (1.0 + small) * up
    if ADDS:
        made += tl.load(residual + row * residual_stride + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + row * N + n, made, mask=n < N)


def row_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    norm: Norm | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """x [R, K] -> [R, N], all of it computed in float32 and rounded once.

    norm      of x, before the product
    gated     silu(the first N outputs) * the others (see activation.py)
    residual  [R, N], added at the end
    """
    rows, inputs = x.shape
    outputs = len(weight) // 2 if gated else len(weight)
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    if rows:
        _row_linear[(triton.cdiv(outputs, OUTPUTS), rows)](
            x, x.stride(0), weight, weight if bias is None else bias, weight if norm is None else norm.weight,
            0.0 if norm is None else norm.eps, x if residual is None else residual,
            0 if residual is None else residual.stride(0), out, N=outputs, K=inputs, OUTPUTS=OUTPUTS,
            INPUTS=min(INPUTS, triton.next_power_of_2(inputs)), NORM=norm is not None, GATED=gated,
            BIAS=bias is not None, ADDS=residual is not None, num_warps=WARPS, **dependent(),
        )  # fmt: skip
    return out
