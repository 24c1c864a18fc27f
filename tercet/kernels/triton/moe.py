"""The experts of a mixture by grouped products. Which expert has how many rows is known on the device only, and nothing
waits for it: there are as many programs as could be needed, and each finds its expert, or none, from the bounds.

T rows of the batch   E hidden size   n experts   k experts of a token   I intermediate size
M = T * k assignments, each a row and one of its experts; sorted by expert, those of expert e lie at
bounds[e] .. bounds[e + 1] - 1, and those that are ELSEWHERE before all others
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tercet.kernels.moe import PlainExperts
from tercet.kernels.triton.dependent import after_previous, dependent
from tercet.kernels.triton.tiles import FEWEST_ROWS, dot_type

COLUMNS = 64  # outputs of a program
MOST_ROWS = 128  # of a program
INPUT_BYTES = 128  # of a row that are multiplied at a time
TILE = 1024  # numbers of a program that sums


@triton.jit
def _rows_of(bounds, tile, n, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """-> the expert whose rows this tile has, the tile's first row, and the end of the expert's; n or more: none."""
    number = tl.arange(0, EXPERTS)
    begins = tl.load(bounds + number, mask=number < n, other=0)
    ends = tl.load(bounds + number + 1, mask=number < n, other=0)
    tiles = (ends - begins + ROWS - 1) // ROWS
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    before = tl.sum(tl.where(number < expert, tiles, 0), 0)
    mine = number == expert
    begin = tl.sum(tl.where(mine, begins, 0), 0) + (tile - before) * ROWS
    return expert, begin, tl.sum(tl.where(mine, ends, 0), 0)


@triton.jit
def _grouped_linear(
    x,
    x_stride,
    order,
    bounds,
    weight,
    out,
    n,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    """GATED: x [T, K], weight [n, 2 N, K] -> out [M, N] sorted, silu(the first N outputs) * the others.
    Else: x [M, K] sorted, weight [n, N, K] -> out [M, N] in the order of the assignments."""
    after_previous(PDL)
    programs = tl.cdiv(N, COLUMNS)
    expert, begin, end = _rows_of(bounds, tl.program_id(0) // programs, n, ROWS, EXPERTS)
    if expert >= n:
        return
    at = begin + tl.arange(0, ROWS)
    here = (at < end)[:, None]
    assignment = tl.load(order + at, mask=at < end, other=0)
    source = assignment // TOP_K if GATED else at.to(tl.int64)
    target = at.to(tl.int64) if GATED else assignment
    col = tl.program_id(0) % programs * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INPUTS)
    inputs = x + source[:, None] * x_stride
    firsts = weight + expert.to(tl.int64) * (2 * N * K if GATED else N * K) + col[None, :] * K
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    acc_up = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, K, INPUTS):
        i = k + inner
        a = tl.load(inputs + i[None, :], mask=here & (i < K)[None, :], other=0.0).to(DOT)
        inside = (col < N)[None, :] & (i < K)[:, None]
        b = tl.load(firsts + i[:, None], mask=inside, other=0.0).to(DOT)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        if GATED:
            up = tl.load(firsts + N * K + i[:, None], mask=inside, other=0.0).to(DOT)
            acc_up = tl.dot(a, up, acc_up, input_precision="ieee")
    if GATED:
        small = tl.exp(-tl.abs(acc))  # as in activation.py
        acc *= tl.where(acc >= 0, 1.0, small) / (1.0 + small) * acc_up
    tl.store(out + target[:, None] * N + col[None, :], acc, mask=here & (col < N)[None, :])


@triton.jit
def _combine(
    made, experts, weights, out, n, E: tl.constexpr, TOP_K: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr
):
    """The weighted sum of a row's assignments, in their order; NaN if one is for an expert that there is not."""
    after_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float32)
    for slot in range(TOP_K):
        a = row * TOP_K + slot
        expert = tl.load(experts + a)
        weight = tl.load(weights + a)
        value = tl.load(made + a * E + col, mask=(col < E) & (expert >= 0) & (expert < n), other=0.0).to(tl.float32)
        total += tl.where(expert < 0, 0.0, tl.where(expert < n, weight, float("nan")) * value)
    tl.store(out + row * E + col, total, mask=col < E)


class TritonExperts(PlainExperts):
    """x and the result have the weights' dtype; products and the sum over k are computed in float32."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        """gate_up [n, 2 I, E], the gate's rows first; down [n, E, I]."""
        super().__init__(gate_up, down)
        self._numbers = torch.arange(self.count + 1, device=gate_up.device)

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """As `moe.Experts`. Rows of x may be strided; a row for an expert that there is not becomes NaN."""
        (rows, k), (gate_up, down) = experts.shape, self.weights
        _, hidden, width = down.shape
        out = torch.empty(rows, hidden, dtype=x.dtype, device=x.device)
        if not rows:
            return out
        experts, weights = experts.contiguous(), weights.contiguous()
        numbers, order = experts.flatten().sort(stable=True)
        bounds = torch.searchsorted(numbers, self._numbers, out_int32=True)
        gated, made = (torch.empty(rows * k, n, dtype=x.dtype, device=x.device) for n in (width, hidden))
        self._multiply(x, order, bounds, gate_up, gated, k, gated=True)
        self._multiply(gated, order, bounds, down, made, k, gated=False)
        grid = (rows, triton.cdiv(hidden, TILE))
        _combine[grid](
            made, experts, weights, out, self.count, E=hidden, TOP_K=k, TILE=min(TILE, triton.next_power_of_2(hidden)),
            **dependent(),
        )  # fmt: skip
        return out

    def _multiply(
        self, x: Tensor, order: Tensor, bounds: Tensor, weight: Tensor, out: Tensor, k: int, *, gated: bool
    ) -> None:
        assignments, outputs = out.shape
        rows = tile_rows(assignments, self.count)
        tiles = assignments // rows + min(self.count, assignments)  # an expert has less than one that is not full
        _grouped_linear[(tiles * triton.cdiv(outputs, COLUMNS),)](
            x, x.stride(0), order, bounds, weight, out, self.count, N=outputs, K=x.shape[1], TOP_K=k, GATED=gated,
            ROWS=rows, COLUMNS=COLUMNS, INPUTS=INPUT_BYTES // x.element_size(),
            EXPERTS=triton.next_power_of_2(self.count), DOT=dot_type(x.dtype), **dependent(),
        )  # fmt: skip


def tile_rows(assignments: int, experts: int) -> int:
    """Rows of a program: about as many as an expert has if all have as many."""
    each = int(triton.next_power_of_2(-(-assignments // experts)))
    return min(MOST_ROWS, max(FEWEST_ROWS, each))
