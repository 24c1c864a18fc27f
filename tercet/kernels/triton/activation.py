"""SwiGLU (arXiv:2002.05202): silu(gate) * up, computed in float32.

T rows   n columns of the gate, and of the rest
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tercet.kernels.triton.dependent import after_previous, dependent

TILE = 1024  # numbers of a program


@triton.jit
def _silu_and_mul(gate_up, row_stride, out, n, TILE: tl.constexpr, PDL: tl.constexpr):
    after_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * TILE + tl.arange(0, TILE)
    here = col < n
    at = gate_up + row * row_stride + col
    gate = tl.load(at, mask=here, other=0.0).to(tl.float32)
    up = tl.load(at + n, mask=here, other=0.0).to(tl.float32)
    small = tl.exp(-tl.abs(gate))  # of the negative number: the other one may overflow
    sigmoid = tl.where(gate >= 0, 1.0, small) / (1.0 + small)
    tl.store(out + row * n + col, gate * sigmoid * up, mask=here)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """[T, 2n], the gate's n columns first, rows may be strided -> [T, n], contiguous."""
    rows, n = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, n, dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        _silu_and_mul[(rows, triton.cdiv(n, TILE))](gate_up, gate_up.stride(0), out, n, TILE=TILE, **dependent())
    return out
