"""y = x Wᵀ + b, by the fastest way that this CPU has for the weight's dtype; on a GPU by torch's own product. Every way
keeps the weights' values.

Medians of all weight multiplications of a SmolLM2-135M step, 1 thread, ms (AVX2 without bf16 instructions):

    rows                              1     2     4    16    128
    bf16 `functional.linear`         29    55   108   434     -
    bf16 widened to float32 by slice 38    49    59    95   457
    float32 `functional.linear`      36    65    68   109   497
    float32 packed by oneDNN         32    36    50    89   475

In another run of the same products, bf16 packed as float16 by fbgemm against widened by slice (one row: bf16 linear):

    fbgemm                           20    23    26    65   435
    widened                          32    62    74   121   499

On AVX512-BF16, bf16 packed by oneDNN takes half of what `functional.linear` takes, so packing comes first.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.nn import functional

MOST_ROWS = 512  # of one oneDNN product
PACK_ROWS = 16  # the batch that oneDNN lays the weights out for; that layout is the best for 1 to 128 rows, too
SLICE = 1024  # output columns widened at once: 2.4 MB of float32 for SmolLM2, which stays in the cache


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In float64; the result has the dtype of x."""
    wide = None if bias is None else bias.double()
    return functional.linear(x.double(), weight.double(), wide).to(x.dtype)


class PackedLinear:
    """weight [n, k], bias [n] or None. `linear`: x [T, k] -> [T, n].

    This one is plain torch, for activations of the weights' dtype; `LinearPacker` (packing.py) chooses.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    def linear(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class OnednnLinear(PackedLinear):
    """Weights in oneDNN's blocked layout, by the ops that torch.compile's CPU freezing uses.

    oneDNN and torch make a kernel with scratch memory for each number of rows, and keep a thousand of them: a worker
    that sees every length grows by more than a gigabyte. So rows come in few numbers.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(weight, PACK_ROWS), bias)

    def linear(self, x: Tensor) -> Tensor:
        if len(x) > MOST_ROWS:
            return torch.cat([self.linear(x[at : at + MOST_ROWS]) for at in range(0, len(x), MOST_ROWS)])
        rows = padded_rows(len(x))
        return self._product(x) if rows == len(x) else self._product(_padded(x, rows))[: len(x)]

    def _product(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


def padded_rows(rows: int) -> int:
    """The number of rows that is multiplied instead: any up to 16, then a multiple of 16, above 64 of 32."""
    step = 1 if rows <= 16 else 16 if rows <= 64 else 32
    return -(-rows // step) * step


def _padded(x: Tensor, rows: int) -> Tensor:
    wide = x.new_zeros(rows, x.shape[1])
    wide[: len(x)] = x
    return wide


class WideScratch(threading.local):
    """Where weights are widened: one place for all of a model's products, since fresh memory in each call would cost
    more in page faults than the product; and one for each thread, so that threads may share a model."""

    def __init__(self, max_fan_in: int) -> None:
        self.values = torch.empty(SLICE * max_fan_in)


class Fp16Linear(PackedLinear):
    """bfloat16 weights on a CPU without bfloat16 instructions, where float16 holds every one of them exactly: fbgemm
    packs them as float16, widens them in registers and multiplies in float32. x and the result are float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        wide_bias = None if bias is None else bias.float()
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), wide_bias)

    @staticmethod
    def holds(weight: Tensor) -> bool:
        """Whether float16 has every value of `weight`."""
        return torch.equal(weight.half().float(), weight.float())

    def linear(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self._packed)
        return out


class WidenedLinear(PackedLinear):
    """bfloat16 weights on a CPU without bfloat16 instructions, whatever their values: x and the result are float32.

    One row goes through torch's bfloat16 matrix-vector product, which reads half the bytes. More rows are multiplied
    in float32 by slices of the weight that are widened on the way, so that no float32 copy of the model is kept.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, scratch: WideScratch) -> None:
        super().__init__(weight, None if bias is None else bias.float())
        self._scratch = scratch

    def linear(self, x: Tensor) -> Tensor:
        if x.shape[0] == 1:
            out = functional.linear(x.bfloat16(), self.weight).float()
        else:
            out = x.new_empty(x.shape[0], self.weight.shape[0])
            for at in range(0, out.shape[1], SLICE):
                part = self.weight[at : at + SLICE]
                widened = self._scratch.values[: part.numel()].view(part.shape).copy_(part)
                torch.mm(x, widened.t(), out=out[:, at : at + SLICE])
        return out if self.bias is None else out.add_(self.bias)


def compute_dtype(weight_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of activations: that of the weights, or float32 where the CPU has no bfloat16 instructions."""
    native = device.type != "cpu" or weight_dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight_dtype if native else torch.float32
