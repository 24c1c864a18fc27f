"""Linear layers over weights that are packed for the native kernels. x and the result are float32.

n outputs   k inputs
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from tercet.kernels.linear import PackedLinear
from tercet.kernels.native.library import FORMATS, Linear, library


class NativeLinear(PackedLinear):
    """A row's result does not depend on the other rows of x, to the bit."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight [n, k], float32 or bfloat16."""
        lanes, (n, k) = library().lanes(), weight.shape
        whole = weight.float().contiguous() if k % 2 else weight.contiguous()  # bfloat16 goes in pairs
        kind = FORMATS[str(whole.dtype).removeprefix("torch.")]
        self._panels = torch.zeros(-(-n // lanes) * lanes, k, dtype=whole.dtype)
        self._bias = None if bias is None else bias.float().contiguous()
        library().pack(whole.data_ptr(), n, k, kind, self._panels.data_ptr())
        self.struct = Linear(self._panels.data_ptr(), None if self._bias is None else self._bias.data_ptr(), n, k, kind)

    def linear(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty(len(x), self.struct.n)
        library().linear_forward(ctypes.byref(self.struct), x.data_ptr(), len(x), out.data_ptr())
        return out
