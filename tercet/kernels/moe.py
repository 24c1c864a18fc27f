"""A mixture of experts: which experts a token goes to, and what they make of it.

T rows of the batch   E hidden size   n experts   k experts of a token   I intermediate size   M = T * k assignments

Rows are sorted by expert, so that each expert that got tokens multiplies them in one piece; an expert without tokens
costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from tercet.kernels.activation import silu_and_mul, silu_and_mul_reference
from tercet.kernels.kinds import Kernels
from tercet.kernels.packing import activation_dtype

ELSEWHERE = -1  # in place of an expert's number: another rank computes it


@dataclass(frozen=True)
class Routing:
    """How a router's logits become experts and weights."""

    experts: int
    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"  # of logits, in float32
    normalise: bool = False  # the k weights sum to 1
    scale: float = 1.0  # of the weights, in the end
    groups: int = 1  # of neighbouring experts, of which the best `top_groups` are looked at
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"  # of a group: its best expert's, or the sum of its best two


def route(logits: Tensor, routing: Routing, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """logits [T, n]; bias [n] float32, which decides who is chosen, but is no part of the weights (DeepSeek-V3,
    arXiv:2412.19437, section 2.1.2) -> experts [T, k] int64, weights [T, k] float32, the most wanted first."""
    wide = logits.float()
    scores = wide.softmax(-1) if routing.score == "softmax" else wide.sigmoid()
    wanted = scores if bias is None else scores + bias
    if routing.groups > 1:
        grouped = wanted.view(len(wanted), routing.groups, -1)
        best = grouped.amax(-1) if routing.group_score == "max" else grouped.topk(2, -1)[0].sum(-1)
        out = torch.ones_like(best, dtype=torch.bool).scatter_(1, best.topk(routing.top_groups, -1)[1], False)
        wanted = grouped.masked_fill(out.unsqueeze(-1), -torch.inf).flatten(1)
    experts = wanted.topk(routing.top_k, -1)[1]
    weights = scores.gather(1, experts)
    if routing.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if routing.score == "sigmoid" else 0.0))
    return experts, weights * routing.scale


class Experts:
    """Some experts' MLPs, by torch's grouped product. x and the result have the kernels' activation dtype."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        """gate_up [n, 2 I, E], the gate's rows first; down [n, E, I]."""
        self._gate_up, self._down = gate_up.transpose(1, 2), down.transpose(1, 2)
        self.count = len(gate_up)

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """x [T, E]; experts [T, k] int64, numbers of those that are here or ELSEWHERE; weights [T, k] float32
        -> [T, E], the weighted sum of what the experts that are here make of each row; zero if none is."""
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        order = order[int((flat == ELSEWHERE).sum()) :]
        rows = order // experts.shape[1]
        out = torch.zeros_like(x)
        if not len(rows):
            return out
        ends = torch.bincount(flat[order], minlength=self.count).cumsum(0).int()
        gated = silu_and_mul(functional.grouped_mm(x[rows], self._gate_up, offs=ends))
        made = functional.grouped_mm(gated, self._down, offs=ends)
        return out.index_add_(0, rows, made * weights.flatten()[order].unsqueeze(1).to(made.dtype))


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
    activations = activation_dtype(dtype, kernels)
    return Experts(gate_up.to(activations), down.to(activations))
