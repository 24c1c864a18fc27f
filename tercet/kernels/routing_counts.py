"""How many tokens went to each expert, and which experts of neighbouring layers the same token went to: what a plan of
where experts lie is made from.

L mixture layers of the model   n experts   T rows of the batch   k experts of a token
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class RoutingSums(NamedTuple):
    load: NDArray[np.int64]  # [L, n] assignments of each expert
    pairs: NDArray[np.int64]  # [L - 1, n, n] of a token's expert in layer l and one of its experts in layer l + 1


class _Step(threading.local):
    """The layers so far of a thread's step: threads may share a model."""

    def __init__(self) -> None:
        self.experts: list[Tensor] = []


class RoutingCounts:
    """Sums over steps, on the device. The layers of a step are added up at once, at its last layer, since each
    operation costs some microseconds however little it counts; nothing waits for the device."""

    def __init__(self, layers: int, experts: int, device: torch.device, every: int = 16) -> None:
        """every: pairs are counted in one of so many steps, the first one of them."""
        self._layers, self._experts, self._every = layers, experts, every
        self._bins = experts + 1  # the first one is ELSEWHERE
        self._load = torch.zeros(layers, self._bins, dtype=torch.int64, device=device)
        self._pairs = torch.zeros(max(0, layers - 1), self._bins, self._bins, dtype=torch.int64, device=device)
        starts = torch.arange(layers, device=device).view(-1, 1, 1)
        self._of_load = starts * self._bins + 1  # the bin of each layer's expert 0
        self._of_pairs = starts[: layers - 1].unsqueeze(-1) * self._bins**2 + self._bins + 1
        self._one = torch.ones(1, dtype=torch.int64, device=device)
        self._step, self._adding = _Step(), threading.Lock()
        self._steps = 0

    def count(self, layer: int, experts: Tensor) -> None:
        """experts [T, k] int64, numbers or ELSEWHERE, of this mixture layer; the layers of a step come in order, and
        their experts must not change before the last one. A step that ends early is not counted."""
        if layer == 0:
            self._step.experts = []
        step = self._step.experts
        assert layer == len(step), f"layer {layer} comes after {len(step)} layers"
        step.append(experts)
        if len(step) == self._layers:
            with self._adding:
                self._add(torch.stack(step))
            self._step.experts = []

    def load(self) -> NDArray[np.int64]:
        """-> [L, n], a copy."""
        return self._load[:, 1:].cpu().numpy().copy()

    def pairs(self, layer: int) -> NDArray[np.int64]:
        """-> [n, n], a copy, of this layer and the next."""
        return self._pairs[layer, 1:, 1:].cpu().numpy().copy()

    def read(self) -> RoutingSums:
        """Copies, of whole steps."""
        return RoutingSums(self.load(), self._pairs[:, 1:, 1:].cpu().numpy().copy())

    def _add(self, experts: Tensor) -> None:
        """experts [L, T, k]."""
        _add_ones(self._load, experts + self._of_load, self._one)
        if self._steps % self._every == 0:
            firsts, seconds = (
                experts[:-1].unsqueeze(-1),
                experts[1:].unsqueeze(-2),
            )  # [L - 1, T, k, 1], [L - 1, T, 1, k]
            _add_ones(self._pairs, firsts * self._bins + seconds + self._of_pairs, self._one)
        self._steps += 1


def _add_ones(sums: Tensor, bins: Tensor, one: Tensor) -> None:
    """One for each of these bins, which are counted over all dimensions of `sums`."""
    flat = bins.flatten()
    sums.view(-1).scatter_add_(0, flat, one.expand(len(flat)))
