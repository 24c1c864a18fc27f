"""Linear layers over weights that are packed for the native kernels. x and the result are float32.

n outputs   k inputs
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tercet.kernels.linear import PackedLinear
from tercet.kernels.native.library import FORMATS, Linear, library

BLOCK = 32  # inputs that share a scale


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


@dataclass(frozen=True)
class Quantised:
    """A matrix [n, k] in blocks of 32 inputs: w = scale * q + least."""

    q: Tensor  # [n, k] uint8, below 2**bits
    scales: Tensor  # [n, k / 32] float32
    leasts: Tensor  # [n, k / 32] float32
    bits: int  # 4 or 8

    def values(self) -> Tensor:
        """[n, k] float32."""
        blocks = self.q.view(*self.scales.shape, BLOCK).float()
        return torch.addcmul(self.leasts.unsqueeze(-1), blocks, self.scales.unsqueeze(-1)).view(self.q.shape)

    def share(self, rows: range | None, columns: range | None) -> Quantised:
        """Some of it; columns: whole blocks. None: all."""
        kept = slice(None) if rows is None else slice(rows.start, rows.stop)
        inputs = slice(None) if columns is None else slice(columns.start, columns.stop)
        blocks = slice(None) if columns is None else slice(columns.start // BLOCK, columns.stop // BLOCK)
        return Quantised(self.q[kept, inputs], self.scales[kept, blocks], self.leasts[kept, blocks], self.bits)


def stacked(parts: Sequence[Quantised]) -> Quantised:
    """Matrices of as many inputs and bits, one behind the other."""
    q, scales, leasts = (torch.cat([getattr(part, field) for part in parts]) for field in ("q", "scales", "leasts"))
    return Quantised(q, scales, leasts, parts[0].bits)


class QuantisedLinear(NativeLinear):
    """The product with the weights that the blocks stand for, which are widened in registers."""

    def __init__(self, weight: Quantised, bias: Tensor | None) -> None:
        lanes, (n, k), kind = library().lanes(), weight.q.shape, FORMATS[f"q{weight.bits}"]
        words = k // BLOCK * (2 + weight.bits)
        self._panels = torch.zeros(-(-n // lanes) * lanes, words, dtype=torch.int32)
        self._bias = None if bias is None else bias.float().contiguous()
        parts = [part.contiguous() for part in (weight.q, weight.scales, weight.leasts)]
        library().pack_quantised_weight(*(part.data_ptr() for part in parts), n, k, kind, self._panels.data_ptr())
        self.struct = Linear(self._panels.data_ptr(), None if self._bias is None else self._bias.data_ptr(), n, k, kind)
