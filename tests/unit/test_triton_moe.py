"""The grouped products of experts against float64, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.triton_interpreter import DEVICE, DTYPES, TOLERANCE

triton = pytest.importorskip("triton")

from tercet.kernels.kinds import Kernels  # noqa: E402 # after the helper
from tercet.kernels.moe import ELSEWHERE, experts_reference, pack_experts  # noqa: E402
from tercet.kernels.triton.moe import TritonExperts, tile_rows  # noqa: E402


def some_experts(n, hidden, width, dtype):
    gate_up, down = torch.randn(n, 2 * width, hidden) / hidden**0.5, torch.randn(n, hidden, width) / width**0.5
    return gate_up.to(dtype).to(DEVICE), down.to(dtype).to(DEVICE)


def close(out, x, numbers, weights, gate_up, down):
    expected = experts_reference(x.cpu(), numbers.cpu(), weights.cpu(), gate_up.cpu(), down.cpu())
    assert out.dtype == x.dtype
    tolerance = {key: 2 * value for key, value in TOLERANCE[x.dtype].items()}  # what gate_up makes is rounded too
    torch.testing.assert_close(out.cpu(), expected, **tolerance)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([*range(21), 70]),
    st.sampled_from([(1, 1), (2, 1), (3, 3), (5, 2), (8, 8), (13, 4)]),
    st.sampled_from([(1, 1), (7, 3), (32, 64), (65, 33), (100, 130)]),
    st.sampled_from(DTYPES),
    st.sampled_from(["here", "some elsewhere", "all elsewhere", "all to one"]),
)
@example(70, (1, 1), (32, 64), torch.float32, "here")  # rows that fill no tile
@example(64, (2, 1), (32, 64), torch.float32, "all to one")  # exactly full tiles, and an expert without rows
def test_experts(rows, experts, sizes, dtype, where):
    (n, k), (hidden, width) = experts, sizes
    torch.manual_seed(rows + n)
    gate_up, down = some_experts(n, hidden, width, dtype)
    x = torch.full((rows, hidden + 3), float("nan"), dtype=dtype, device=DEVICE)[:, :hidden]
    x[:] = torch.randn(rows, hidden)
    numbers, weights = torch.rand(rows, n, device=DEVICE).topk(k, -1)[1], torch.randn(rows, k, device=DEVICE)
    if where == "some elsewhere":
        numbers[torch.rand(rows, k) < 0.4] = ELSEWHERE
    elif where == "all elsewhere":
        numbers[:] = ELSEWHERE
    elif where == "all to one":
        numbers[:] = n - 1
    close(TritonExperts(gate_up, down).forward(x, numbers, weights), x, numbers, weights, gate_up, down)


def test_experts_without_rows_are_not_read():
    gate_up, down = some_experts(4, 32, 16, torch.float32)
    gate_up[2], down[2] = float("nan"), float("nan")
    x, numbers = torch.randn(9, 32, device=DEVICE), torch.tensor([[0, 3]], device=DEVICE).repeat(9, 1)
    assert TritonExperts(gate_up, down).forward(x, numbers, torch.ones(9, 2, device=DEVICE)).isfinite().all()


def test_a_number_that_is_no_experts_stays_visible():
    gate_up, down = some_experts(2, 32, 16, torch.float32)
    x, numbers = torch.randn(3, 32, device=DEVICE), torch.tensor([[0, 1], [0, 2], [1, ELSEWHERE]], device=DEVICE)
    out = TritonExperts(gate_up, down).forward(x, numbers, torch.ones(3, 2, device=DEVICE))
    assert out.isnan().all(1).tolist() == [False, True, False]
    assert out.isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("experts", [1, 3, 64, 128])
def test_there_are_programs_for_every_division(experts):
    """As many tiles as the most unequal and the most equal division take, and rows that tensor cores have."""
    for assignments in (1, 2, 15, 16, 17, 130, 1024, 5000):
        rows = tile_rows(assignments, experts)
        assert rows in {16, 32, 64, 128}
        tiles = assignments // rows + min(experts, assignments)
        loads = torch.full((experts,), assignments // experts)
        loads[: assignments % experts] += 1
        lone = torch.ones(experts, dtype=torch.int64)
        lone[0] = max(1, assignments - experts + 1)
        for load in (loads, lone[: min(experts, assignments)]):
            assert load.sum() == assignments
            assert (-(-load // rows)).sum() <= tiles


def test_packed_for_triton():
    gate_up, down = some_experts(3, 32, 16, torch.float32)
    experts = pack_experts(gate_up, down, torch.bfloat16, Kernels("triton", DEVICE))
    assert experts.count == 3
    x, numbers = torch.randn(4, 32, device=DEVICE).bfloat16(), torch.tensor([[0, 2]], device=DEVICE).repeat(4, 1)
    weights = torch.rand(4, 2, device=DEVICE)
    close(experts.forward(x, numbers, weights), x, numbers, weights, gate_up.bfloat16(), down.bfloat16())
