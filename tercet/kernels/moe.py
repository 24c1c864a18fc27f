"""A mixture of experts: which experts a token goes to, and what they make of it.

T rows of the batch   E hidden size   n experts   k experts of a token   I intermediate size   M = T * k assignments

Rows are sorted by expert, so that each expert that got tokens multiplies them in one piece; an expert without tokens
costs nothing. `pack_experts` gives the experts of a layer for the kernels that a worker computes with.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional

from tercet.errors import UnsupportedModel
from tercet.kernels.activation import silu_and_mul, silu_and_mul_reference
from tercet.kernels.kinds import Kernels
from tercet.kernels.native.moe import NativeExperts
from tercet.kernels.packing import activation_dtype

ELSEWHERE = -1  # in place of an expert's number: another rank computes it


@dataclass(frozen=True)
class Routing:
    """How a router's logits become experts and weights. Raises UnsupportedModel if they cannot so."""

    experts: int
    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"  # of logits, in float32
    normalise: bool = False  # the k weights sum to 1
    scale: float = 1.0  # of the weights, in the end
    groups: int = 1  # of neighbouring experts, of which the best `top_groups` are looked at
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"  # of a group: its best expert's, or the sum of its best two

    def __post_init__(self) -> None:
        if self.groups < 1 or self.experts % self.groups:
            raise UnsupportedModel(f"router: {self.experts} experts cannot be divided into {self.groups} groups")
        if not 1 <= self.top_groups <= self.groups:
            raise UnsupportedModel(f"router: {self.top_groups} of {self.groups} groups")
        group = self.experts // self.groups
        if self.groups > 1 and self.group_score == "top2" and group < 2:
            raise UnsupportedModel("router: the best two of groups of one expert")
        looked_at = self.experts if self.groups == 1 else self.top_groups * group
        if not 1 <= self.top_k <= looked_at:
            raise UnsupportedModel(f"router: {self.top_k} experts of a token, where {looked_at} are looked at")


def route(logits: Tensor, routing: Routing, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """logits [T, n]; bias [n] float32, which decides who is chosen, but is no part of the weights (DeepSeek-V3,
    arXiv:2412.19437, section 2.1.2) -> experts [T, k] int64, weights [T, k] float32, the most wanted first."""
    wide = logits.float()
    scores = wide.softmax(-1) if routing.score == "softmax" else wide.sigmoid()
    wanted = scores if bias is None else scores + bias
    if routing.groups > 1:
        grouped = wanted.view(len(wanted), routing.groups, routing.experts // routing.groups)
        best = grouped.amax(-1) if routing.group_score == "max" else grouped.topk(2, -1)[0].sum(-1)
        out = torch.ones_like(best, dtype=torch.bool).scatter_(1, best.topk(routing.top_groups, -1)[1], False)
        wanted = grouped.masked_fill(out.unsqueeze(-1), -torch.inf).flatten(1)
    experts = wanted.topk(routing.top_k, -1)[1]
    weights = scores.gather(1, experts)
    if routing.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if routing.score == "sigmoid" else 0.0))
    return experts, weights * routing.scale


class Experts(Protocol):
    """Some experts' MLPs. x and the result have the kernels' activation dtype."""

    count: int

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """As these kernels keep them: tensors [count, ...], each contiguous, so that an expert's can go elsewhere."""

    def empty(self) -> Self:
        """As many of the same format, whose `weights` are still to be written."""

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """x [T, E]; experts [T, k] int64, numbers of those that are here or ELSEWHERE; weights [T, k] float32
        -> [T, E], the weighted sum of what the experts that are here make of each row; zero if none is."""


class PlainExperts:
    """What kernels that take a matrix as it is have of some experts."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        """[n, ...] each."""
        self.count = len(gate_up)
        self.weights = gate_up.contiguous(), down.contiguous()

    def empty(self) -> Self:
        """As `Experts`."""
        made = copy.copy(self)
        made.weights = torch.empty_like(self.weights[0]), torch.empty_like(self.weights[1])
        return made


class TorchExperts(PlainExperts):
    """By torch's grouped product, which wants rows of whole 16 bytes: inputs are padded with zeros up to that."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        """gate_up [n, 2 I, E], the gate's rows first; down [n, E, I]."""
        super().__init__(_aligned(gate_up), _aligned(down))

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """As `Experts`; what the k experts of a row make is summed in float32."""
        flat = experts.flatten()
        order = flat.argsort(stable=True)[int((flat == ELSEWHERE).sum()) :]
        made = x.new_zeros(len(flat), x.shape[1])
        if len(order):
            ends = torch.bincount(flat[order], minlength=self.count).cumsum(0).int()
            gate_up, down = (weight.transpose(1, 2) for weight in self.weights)
            both = functional.grouped_mm(_aligned(x[order // experts.shape[1]]), gate_up, offs=ends)
            made[order] = functional.grouped_mm(_aligned(silu_and_mul(both)), down, offs=ends)
        return torch.bmm(weights.unsqueeze(1), made.float().view(*experts.shape, x.shape[1])).squeeze(1).to(x.dtype)


def _aligned(inputs: Tensor) -> Tensor:
    """Rows of whole 16 bytes."""
    return functional.pad(inputs, (0, -inputs.shape[-1] % (16 // inputs.itemsize)))


def experts_reference(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """What `Experts.forward` gives, one assignment after the other in float64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for row, (numbers, shares) in enumerate(zip(experts.tolist(), weights.double(), strict=True)):
        for number, share in zip(numbers, shares, strict=True):
            if number != ELSEWHERE:
                both = gate_up[number].double() @ x[row].double()
                out[row] += share * (down[number].double() @ silu_and_mul_reference(both.unsqueeze(0))[0])
    return out.to(x.dtype)


def pack_experts(gate_up: Tensor, down: Tensor, dtype: torch.dtype, kernels: Kernels) -> Experts:
    """For these kernels; dtype: of the model. Shapes as `Experts` takes them."""
    if kernels.native:
        return NativeExperts(gate_up.to(dtype), down.to(dtype))
    activations = activation_dtype(dtype, kernels)
    gate_up, down = gate_up.to(activations), down.to(activations)
    if kernels.kind != "triton":
        return TorchExperts(gate_up, down)
    from tercet.kernels.triton.moe import TritonExperts  # it imports Triton, which other kernels do without

    return TritonExperts(gate_up, down)
