"""The experts of a mixture over weights that are packed for the native kernels. x and the result are float32.

T rows of the batch   E hidden size   n experts   k experts of a token   I intermediate size   W lanes of a panel
"""

from __future__ import annotations

import copy
import ctypes

import torch
from torch import Tensor

from tercet.kernels.native.library import FORMATS, ExpertWeights, Linear, library


class NativeExperts:
    """A row's result does not depend on the other rows, to the bit; its k experts are summed in their order."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        """gate_up [n, 2 I, E], the gate's rows first; down [n, E, I]; float32 or bfloat16."""
        self.count = len(gate_up)
        gate_up, gate_up_struct = _packed(gate_up, paired=True)
        down, down_struct = _packed(down, paired=False)
        self.weights = gate_up, down
        self._struct = ExpertWeights(gate_up_struct, down_struct, self.count)

    def empty(self) -> NativeExperts:
        """As `moe.Experts`."""
        made = copy.copy(self)
        made.weights = torch.empty_like(self.weights[0]), torch.empty_like(self.weights[1])
        layers = zip((self._struct.gate_up, self._struct.down), made.weights, strict=True)
        structs = [Linear(panels.data_ptr(), None, its.n, its.k, its.format) for its, panels in layers]
        made._struct = ExpertWeights(*structs, self.count)
        return made

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """As `moe.Experts`. Raises IndexError for an expert that there is not."""
        x, experts, weights = x.contiguous(), experts.contiguous(), weights.contiguous()
        rows, k = experts.shape
        out = torch.zeros_like(x)
        wrong = library().experts_forward(
            ctypes.byref(self._struct),
            x.data_ptr(),
            rows,
            experts.data_ptr(),
            weights.data_ptr(),
            k,
            out.data_ptr(),
        )
        if wrong >= 0:
            raise IndexError(f"row {wrong // k} is for expert {int(experts.flatten()[wrong])} of {self.count}")
        return out


def _packed(weights: Tensor, *, paired: bool) -> tuple[Tensor, Linear]:
    """[n, outputs, inputs] -> the panels of all, and the first one's structure. paired: see `_by_pairs`."""
    inputs = weights.shape[2]
    if inputs % 2:
        weights = weights.float()  # bfloat16 goes in pairs
    kind, lanes = FORMATS[str(weights.dtype).removeprefix("torch.")], library().lanes()
    outputs = 2 * _whole(weights.shape[1] // 2, lanes) if paired else weights.shape[1]
    panels = torch.zeros(len(weights), _whole(outputs, lanes), inputs, dtype=weights.dtype)
    for weight, packed in zip(weights, panels, strict=True):
        rows = _by_pairs(weight, lanes) if paired else weight.contiguous()
        library().pack(rows.data_ptr(), len(rows), inputs, kind, packed.data_ptr())
    return panels, Linear(panels.data_ptr(), None, outputs, inputs, kind)


def _by_pairs(weight: Tensor, lanes: int) -> Tensor:
    """[2 I, E] -> a panel's rows of the gate, the same ones of `up`, and so on, so that one tile has both; zeros fill
    up the last panels."""
    width, inputs = len(weight) // 2, weight.shape[1]
    whole = weight.new_zeros(2, _whole(width, lanes), inputs)
    whole[:, :width] = weight.reshape(2, width, inputs)
    return whole.view(2, -1, lanes, inputs).transpose(0, 1).reshape(-1, inputs)


def _whole(outputs: int, lanes: int) -> int:
    """Outputs of the panels that hold these."""
    return -(-outputs // lanes) * lanes
