"""What a decoder layer is made of: attention and MLP, each behind a norm, each added to the layer's input.

    x = x + attention(attention_norm(x))
    x = x + mlp(mlp_norm(x))

T rows of the batch   E hidden size   H query heads   Hkv key-value heads   D head dimension   I intermediate size
n experts   k experts of a token   R rank of the latent   P rotary, N plain, V value dimension of a head
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from tercet.distributed.spread import Spread
from tercet.kernels.activation import silu_and_mul
from tercet.kernels.linear import PackedLinear
from tercet.kernels.moe import Experts, Routing, route
from tercet.kernels.norm import RmsNorm
from tercet.kernels.routing_counts import RoutingCounts


@dataclass(frozen=True)
class GroupedQuery:
    """Grouped-query attention (arXiv:2305.13245): H / Hkv query heads share a key and a value head."""

    qkv: PackedLinear  # E -> (H + 2 Hkv) * D: queries, keys, values
    qk_norm: RmsNorm | None  # weight [H + Hkv, D]
    output: PackedLinear  # H * D -> E


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1). The rotary part of queries and keys is
    in two halves, as `apply_rope` takes it."""

    query_down: PackedLinear | None  # E -> query rank; None: queries are made of the hidden state itself
    query_norm: RmsNorm | None
    query: PackedLinear  # query rank, or E -> H * (N + P)
    latent: PackedLinear  # E -> R + P: the latent, and the key that all heads share
    latent_norm: RmsNorm  # of the R values
    key_up: Tensor  # [H, N, R], of a latent to the plain part of each head's key
    value_up: Tensor  # [H, V, R]
    output: PackedLinear  # H * V -> E


@dataclass(frozen=True)
class DenseMlp:
    gate_up: PackedLinear  # E -> 2 I: gate, up
    down: PackedLinear  # I -> E

    def forward(self, x: Tensor) -> Tensor:
        """[T, E] -> [T, E]."""
        return self.down.linear(silu_and_mul(self.gate_up.linear(x)))


@dataclass(frozen=True)
class LayerCounts:
    """Of one layer."""

    sums: RoutingCounts
    number: int  # among the mixture layers that are here

    def count(self, experts: Tensor) -> None:
        self.sums.count(self.number, experts)


@dataclass
class MixtureMlp:
    """Each token goes to k of n experts, and to the shared ones."""

    router: Tensor  # [n, E] float32
    bias: Tensor | None  # [n] float32, of the choice
    routing: Routing
    experts: Experts  # all of them, or those of this rank's slots; others in their place once they have moved
    shared: DenseMlp | None
    layer: int  # of the model
    spread: Spread | None = None  # over the ranks of a group
    counts: LayerCounts | None = None

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, E] -> each row's experts [T, k] int64, and their weights [T, k] float32."""
        return route(functional.linear(x.float(), self.router), self.routing, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[T, E] -> [T, E]."""
        experts, weights = self.choose(x)
        if self.counts is not None:
            self.counts.count(experts)
        if self.spread is None:
            out = self.experts.forward(x, experts, weights)
        else:
            out = self.spread.forward(self.experts, self.layer, x, experts, weights)
        return out if self.shared is None else out.add_(self.shared.forward(x))


@dataclass(frozen=True)
class Layer:
    attention_norm: RmsNorm
    attention: GroupedQuery | Latent
    mlp_norm: RmsNorm
    mlp: DenseMlp | MixtureMlp
