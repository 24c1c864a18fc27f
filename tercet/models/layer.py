"""What a decoder layer is made of: attention and MLP, each behind a norm, each added to the layer's input.

    x = x + attention(attention_norm(x))
    x = x + mlp(mlp_norm(x))

T rows of the batch   E hidden size   H query heads   Hkv key-value heads   D head dimension   I intermediate size
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tercet.kernels.activation import silu_and_mul
from tercet.kernels.linear import PackedLinear
from tercet.kernels.norm import RmsNorm


@dataclass(frozen=True)
class GroupedQuery:
    """Grouped-query attention (arXiv:2305.13245): H / Hkv query heads share a key and a value head."""

    qkv: PackedLinear  # E -> (H + 2 Hkv) * D: queries, keys, values
    qk_norm: RmsNorm | None  # weight [H + Hkv, D]
    output: PackedLinear  # H * D -> E


@dataclass(frozen=True)
class DenseMlp:
    gate_up: PackedLinear  # E -> 2 I: gate, up
    down: PackedLinear  # I -> E

    def forward(self, x: Tensor) -> Tensor:
        """[T, E] -> [T, E]."""
        return self.down.linear(silu_and_mul(self.gate_up.linear(x)))


@dataclass(frozen=True)
class Layer:
    attention_norm: RmsNorm
    attention: GroupedQuery
    mlp_norm: RmsNorm
    mlp: DenseMlp
