"""A mixture's router, experts and counts against references that are computed one assignment after the other."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tercet.errors import UnsupportedModel
from tercet.kernels.kinds import CPU, Kernels
from tercet.kernels.moe import ELSEWHERE, Routing, experts_reference, pack_experts, route
from tercet.kernels.native import operations, trial
from tercet.kernels.native.library import library
from tercet.kernels.native.linear import NativeLinear
from tercet.kernels.native.moe import NativeExperts
from tercet.kernels.packing import activation_dtype
from tercet.kernels.routing_counts import RoutingCounts
from tests.few import few

DTYPES = (torch.float32, torch.bfloat16)
NATIVE = pytest.mark.skipif(trial.missing() is not None, reason=str(trial.missing()))
KINDS = ["torch", pytest.param("native", marks=NATIVE)]
SIZES = [(64, 96), (1, 1), (7, 3), (34, 50), (70, 16), (32, 33)]  # hidden, intermediate: whole vectors, odd, neither


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    library().set_threads(request.param)
    yield request.param
    library().set_threads(1)


# ---- the router

ROUTINGS = [
    Routing(8, 1),
    Routing(8, 3, normalise=True),
    Routing(8, 8, normalise=True, scale=2.5),
    Routing(1, 1, scale=0.5),
    Routing(12, 4, "sigmoid", normalise=True, scale=2.5, groups=3, top_groups=2, group_score="top2"),
    Routing(12, 4, "sigmoid", groups=3, top_groups=1, group_score="top2"),
    Routing(12, 3, groups=4, top_groups=2, scale=16.0),
    Routing(12, 5, "sigmoid", normalise=True, groups=6, top_groups=5),
    Routing(12, 12, groups=12, top_groups=12),
]


def chosen(logits, routing, bias):
    """One row's experts and weights, in Python's float64."""
    top = max(logits)
    raw = [math.exp(x - top) if routing.score == "softmax" else 1 / (1 + math.exp(-x)) for x in logits]
    scores = [x / sum(raw) for x in raw] if routing.score == "softmax" else raw
    wanted = [score + more for score, more in zip(scores, bias, strict=True)]
    size = routing.experts // routing.groups
    groups = [range(g * size, g * size + size) for g in range(routing.groups)]
    taken = 1 if routing.group_score == "max" else 2
    groups.sort(key=lambda group: -sum(sorted((wanted[e] for e in group), reverse=True)[:taken]))
    looked_at = [e for group in groups[: routing.top_groups] for e in group]
    experts = sorted(looked_at, key=lambda e: -wanted[e])[: routing.top_k]
    total = sum(scores[e] for e in experts) if routing.normalise else 1
    return experts, [scores[e] / total * routing.scale for e in experts]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("bias", [None, 0.0, -3.0])
def test_route(routing, bias):
    """Biases around 0 and below all scores, where 0 in place of a score that is not looked at would win."""
    torch.manual_seed(routing.top_k)
    biases = None if bias is None else torch.randn(routing.experts) / 4 + bias
    for rows in (0, 1, 2, 33):
        logits = torch.randn(rows, routing.experts) * 2
        experts, weights = route(logits, routing, biases)
        assert (experts.dtype, weights.dtype) == (torch.int64, torch.float32)
        assert experts.shape == weights.shape == (rows, routing.top_k)
        added = [0.0] * routing.experts if biases is None else biases.tolist()
        for row, numbers, shares in zip(logits.tolist(), experts.tolist(), weights, strict=True):
            expected_numbers, expected = chosen(row, routing, added)
            assert numbers == expected_numbers
            torch.testing.assert_close(shares.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)


def test_logits_are_widened_first():
    logits, routing = torch.randn(20, 8).bfloat16(), Routing(8, 2, normalise=True)
    for ours, wide in zip(route(logits, routing), route(logits.float(), routing), strict=True):
        assert torch.equal(ours, wide)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_scores_far_apart(score):
    logits = torch.tensor([[-500.0, -501.0, -502.0, -503.0], [1e4, -1e4, 0.0, 1.0]])
    experts, weights = route(logits, Routing(4, 2, score, normalise=True))
    assert weights.isfinite().all()
    assert experts[1].tolist() == [0, 3] or score == "softmax"
    assert experts[1, 0] == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"top_k": 0}, "0 experts of a token, where 8"),
        ({"top_k": 9}, "9 experts of a token, where 8"),
        ({"groups": 3}, "8 experts cannot be divided into 3 groups"),
        ({"groups": 0}, "cannot be divided into 0 groups"),
        ({"groups": 4, "top_groups": 5}, "5 of 4 groups"),
        ({"groups": 4, "top_groups": 0}, "0 of 4 groups"),
        ({"groups": 4, "top_groups": 1, "top_k": 3}, "3 experts of a token, where 2"),
        ({"groups": 8, "top_groups": 4, "group_score": "top2"}, "the best two of groups of one"),
    ],
)
def test_what_no_router_can_do(options, said):
    with pytest.raises(UnsupportedModel, match=said):
        Routing(**{"experts": 8, "top_k": 2} | options)


# ---- the experts


def weights_of(n, hidden, width, dtype):
    gate_up, down = torch.randn(n, 2 * width, hidden) / hidden**0.5, torch.randn(n, hidden, width) / width**0.5
    return gate_up.to(dtype), down.to(dtype)


def choices(n, k, rows):
    """Experts of each row: different ones, any with some elsewhere and some twice, all elsewhere, all to one."""
    different = torch.rand(rows, n).topk(k, -1)[1]
    lone = torch.full((rows, k), ELSEWHERE)
    lone[:, -1] = n - 1
    return [different, torch.randint(-1, n, (rows, k)), torch.full((rows, k), ELSEWHERE), lone]


COUNTS = [(5, 2), (1, 1), (5, 1), (4, 4)]  # of experts, and of those that a row takes
BOTH = sorted(itertools.product(SIZES, COUNTS), key=lambda both: both[0] != SIZES[0] and both[1] != COUNTS[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sizes", "counts"), few(BOTH, len(SIZES) + len(COUNTS) - 1))
def test_experts(kind, dtype, sizes, counts):
    n, k = counts
    torch.manual_seed(n + k)
    kernels = Kernels(kind)
    (hidden, width), activations = sizes, activation_dtype(dtype, kernels)
    gate_up, down = weights_of(n, hidden, width, dtype)
    experts = pack_experts(gate_up, down, dtype, kernels)
    assert experts.count == n
    tolerance = 2e-5 if dtype == torch.float32 else 6e-2  # bfloat16 rounds each product's inputs to 2^-8
    for rows in (*range(21), 150):
        x, weights = torch.randn(rows, hidden).to(activations), torch.randn(rows, k)
        for numbers in choices(n, k, rows):
            out = experts.forward(x, numbers, weights)
            assert out.dtype == activations
            expected = experts_reference(x, numbers, weights, gate_up, down)
            torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_without_rows_are_not_read(kind):
    gate_up, down = weights_of(3, 16, 16, torch.float32)
    gate_up[1], down[1] = float("nan"), float("nan")
    experts = pack_experts(gate_up, down, torch.float32, Kernels(kind))
    out = experts.forward(torch.randn(5, 16), torch.tensor([[2, 0]]).repeat(5, 1), torch.ones(5, 2))
    assert out.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_that_is_none_stays_visible(kind):
    gate_up, down = weights_of(3, 16, 16, torch.float32)
    x = torch.randn(4, 16)
    x[2, 5] = float("nan")
    numbers, weights = torch.tensor([[2, 0]]).repeat(4, 1), torch.ones(4, 2)
    out = pack_experts(gate_up, down, torch.float32, Kernels(kind)).forward(x, numbers, weights)
    assert out.isfinite().all(1).tolist() == [True, True, False, True]


@NATIVE
@pytest.mark.parametrize("wrong", [3, 1 << 40, -2])
def test_an_expert_that_there_is_not(wrong):
    experts = pack_experts(*weights_of(3, 16, 16, torch.float32), torch.float32, Kernels("native"))
    numbers = torch.tensor([[0, 1], [2, ELSEWHERE], [1, wrong]])
    with pytest.raises(IndexError, match=f"row 2 is for expert {wrong} of 3"):
        experts.forward(torch.randn(3, 16), numbers, torch.ones(3, 2))


@NATIVE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(64, 96), (70, 48), (48, 64), (7, 16)])
def test_a_lone_expert_is_an_mlp_of_native_layers(dtype, sizes, threads):
    """To the bit, however many rows it has."""
    hidden, width = sizes
    gate_up, down = weights_of(1, hidden, width, dtype)
    first, second = NativeLinear(gate_up[0], None), NativeLinear(down[0], None)
    experts = NativeExperts(gate_up, down)
    for rows in (1, 2, 5, 12, 13, 16, 17, 33, 100):
        x = torch.randn(rows, hidden)
        expected = second.linear(operations.silu_and_mul(first.linear(x)))
        out = experts.forward(x, torch.zeros(rows, 1, dtype=torch.int64), torch.ones(rows, 1))
        assert torch.equal(out, expected)


@NATIVE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(64, 96), (34, 50), (7, 3)])
def test_a_row_does_not_depend_on_the_others(dtype, sizes, threads):
    """The same to the bit alone, in batches of any size and any order, by any number of threads."""
    hidden, rows, k = sizes[0], 70, 3
    experts = NativeExperts(*weights_of(6, *sizes, dtype))
    x, numbers, weights = torch.randn(rows, hidden), torch.randint(-1, 6, (rows, k)), torch.rand(rows, k)
    library().set_threads(1)
    whole = experts.forward(x, numbers, weights)
    library().set_threads(threads)
    for some in (
        torch.arange(rows),
        torch.randperm(rows),
        torch.randint(rows, (400,)),
        *(torch.arange(count) for count in range(rows)),
        *torch.arange(rows).split(1),
        torch.full((90,), 5),
    ):
        assert torch.equal(experts.forward(x[some], numbers[some], weights[some]), whole[some])


@NATIVE
@pytest.mark.parametrize("dtype", DTYPES)
def test_more_rows_than_are_computed_at_once(dtype, threads):
    """Blocks of rows that the cache holds, and calls of more rows than the buffers are for."""
    experts = NativeExperts(*weights_of(2, 32, 2048, dtype))
    x, numbers = torch.randn(50, 32), torch.zeros(50, 1, dtype=torch.int64)
    numbers[::7] = 1
    few, many = experts.forward(x, numbers, torch.ones(50, 1)), torch.arange(2100) % 50
    assert torch.equal(experts.forward(x[many], numbers[many], torch.ones(2100, 1)), few[many])


@NATIVE
def test_experts_are_summed_in_the_order_of_their_weights():
    """Of numbers so far apart that another order gives another sum."""
    experts, shares = NativeExperts(torch.ones(3, 2, 1), torch.ones(3, 1, 1)), torch.tensor([2.0**30, -(2.0**30), 1.0])
    for order in ([0, 1, 2], [2, 0, 1]):
        out = experts.forward(torch.ones(1, 1), torch.tensor([order]), shares[order].unsqueeze(0))
        assert float(out) == pytest.approx(1 / (1 + math.exp(-1)) if order[-1] == 2 else 0.0)


# ---- the counts


@pytest.mark.parametrize(("layers", "n", "k"), [(1, 4, 2), (2, 5, 1), (4, 8, 3)])
@pytest.mark.parametrize("every", [1, 3])
def test_counts(layers, n, k, every):
    torch.manual_seed(n)
    counts, generator = RoutingCounts(layers, n, CPU, every), np.random.default_rng(n)
    load, pairs = np.zeros((layers, n), np.int64), np.zeros((layers - 1, n, n), np.int64)
    for step in range(7):
        experts = generator.integers(-1, n, (layers, step, k))  # -1 is ELSEWHERE; a step may have no rows
        for layer in range(layers):
            counts.count(layer, torch.from_numpy(experts[layer]))
        for layer, row, slot in np.argwhere(experts != ELSEWHERE):
            mine = experts[layer, row, slot]
            load[layer, mine] += 1
            for other in experts[layer + 1, row] if layer + 1 < layers and step % every == 0 else []:
                if other != ELSEWHERE:
                    pairs[layer, mine, other] += 1
        found = counts.read()
        assert np.array_equal(found.load, load)
        assert np.array_equal(found.pairs, pairs)
    assert (found.load.dtype, found.pairs.dtype) == (np.int64, np.int64)


def test_counts_are_of_whole_steps_and_copies():
    counts, experts = RoutingCounts(2, 3, CPU), torch.tensor([[1, 2]])
    counts.count(0, experts)
    counts.count(0, experts)  # the step before ended early
    assert not counts.read().load.any()
    counts.count(1, experts)
    before = counts.read()
    assert before.load.tolist() == [[0, 1, 1]] * 2
    before.load[:] = 9
    assert counts.read().load.max() == 1
    with pytest.raises(AssertionError, match="layer 1 comes after 0 layers"):
        counts.count(1, experts)


def test_threads_may_share_counts():
    """As they may share a model: each has steps of its own."""
    counts, experts = RoutingCounts(2, 3, CPU), torch.tensor([[1, 2]])
    counts.count(0, experts)
    with ThreadPoolExecutor(1) as other:
        other.submit(counts.count, 0, experts).result()
        counts.count(1, experts)
        assert counts.read().load.tolist() == [[0, 1, 1]] * 2
        other.submit(counts.count, 1, experts).result()
    assert counts.read().load.tolist() == [[0, 2, 2]] * 2
