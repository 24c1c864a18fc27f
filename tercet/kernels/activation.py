"""SwiGLU (arXiv:2002.05202): silu(gate) * up."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def silu_and_mul_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, -1)
    return (gate / (1 + (-gate).exp()) * up).to(gate_up.dtype)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """[T, 2n], the gate's n columns first -> [T, n]."""
    gate, up = gate_up.chunk(2, -1)
    return functional.silu(gate).mul_(up)
