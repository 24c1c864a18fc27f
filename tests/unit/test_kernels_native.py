"""The kernels in C++ against float64 references: sizes that fill no vector, every path of rows, and the same result
to the bit whatever shares the batch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.kernels.activation import silu_and_mul_reference
from tercet.kernels.attention import attention_reference
from tercet.kernels.linear import linear_reference
from tercet.kernels.native import operations, trial
from tercet.kernels.native.layers import NativeShape, NativeStep
from tercet.kernels.native.library import library
from tercet.kernels.native.linear import NativeLinear
from tercet.kernels.norm import rms_norm_reference
from tercet.kernels.rope import apply_rope_reference
from tests.few import few

pytestmark = pytest.mark.skipif(trial.missing() is not None, reason=str(trial.missing()))
DTYPES = (torch.float32, torch.bfloat16)
ROWS = [*range(1, 15), 24, 25, 48, 49, 200]


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    library().set_threads(request.param)
    yield request.param
    library().set_threads(1)


def narrow() -> bool:
    """Whether this CPU multiplies bfloat16, for which inputs are rounded."""
    return library().instructions() in {b"avx512_bf16", b"amx_bf16"}


def close(computed, expected, dtype):
    tolerance = 2e-2 if narrow() and dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(computed, expected, rtol=tolerance, atol=tolerance)


def tiled(dtype):
    """Whether attention goes by AMX, which rounds queries and weights to bfloat16; other ways are exact to float32."""
    return library().instructions() == b"amx_bf16" and dtype == torch.bfloat16


def attention_expected(query, content, window, dtype):
    """In float64, of queries as they are rounded."""
    scale = torch.tensor(math.log2(math.e)) / torch.tensor(query.shape[-1]).sqrt()  # scores are logarithms to base 2
    seen = (query * scale).bfloat16().double() / scale.double() if tiled(dtype) else query.double()
    return attention_reference(seen, *content.double().chunk(2, 1), window)


def close_attention(computed, expected, dtype):
    tolerance = 5e-3 if tiled(dtype) else 2e-5
    torch.testing.assert_close(computed.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(64, 64), (1, 2), (3, 7), (70, 34), (33, 576), (200, 130)])
@pytest.mark.parametrize("biased", [False, True])
def test_linear(dtype, n, k, biased, threads):
    torch.manual_seed(n)
    weight, bias = (torch.randn(n, k) / k**0.5).to(dtype), torch.randn(n).to(dtype) if biased else None
    linear, x = NativeLinear(weight, bias), torch.randn(max(ROWS), k)
    whole = linear.linear(x)
    close(whole, linear_reference(x, weight, None if bias is None else bias.float()), dtype)
    for rows in ROWS:
        assert torch.equal(linear.linear(x[:rows]), whole[:rows]), f"{rows} rows change the result of a row"
    assert linear.linear(x[:0]).shape == (0, n)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_that_is_none_stays_visible(bad, dtype):
    for inputs in (64, 40):
        x = torch.zeros(3, inputs)
        x[1, 7] = bad
        out = NativeLinear(torch.ones(9, inputs).to(dtype), None).linear(x)
        assert out.isfinite().all(1).tolist() == [True, False, True]
    assert not operations.silu_and_mul(x).isfinite()[1].all() or bad > 0  # silu(inf) * 0 is NaN, 0 * inf too
    assert operations.rms_norm(x, torch.ones(40), 1e-5)[1].isnan().any()


@pytest.mark.parametrize("n", [1, 7, 8, 16, 31, 70, 576])
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_norm_and_activation(n, rows, threads):
    x = torch.randn(rows, n) * 3
    weight = torch.randn(n)
    torch.testing.assert_close(operations.rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5))
    gates = torch.randn(rows, 2 * n) * 10
    expected = silu_and_mul_reference(gates.double()).float()
    torch.testing.assert_close(operations.silu_and_mul(gates), expected, rtol=1e-5, atol=1e-6)


def test_exponential_over_its_whole_range():
    """silu(x) / x = 1 / (1 + e^-x): at what is far below and above what float32 holds, too."""
    x = torch.cat((torch.linspace(-120, 120, 10001), torch.tensor([0.0, -0.0, 1e30, -1e30])))
    gates = torch.stack((x, torch.ones_like(x))).T.flatten().view(-1, 2)
    expected = x.double() / (1 + (-x.double()).exp())
    torch.testing.assert_close(operations.silu_and_mul(gates).flatten().double(), expected, rtol=2e-6, atol=1e-30)
    wide = torch.cat((x, torch.ones_like(x))).unsqueeze(0)  # by vectors
    torch.testing.assert_close(operations.silu_and_mul(wide).flatten().double(), expected, rtol=2e-6, atol=1e-30)


def paged(lengths, size, kv_heads, dim, dtype, seed=0):
    """-> cache full of NaN but for the sequences', block tables, and each one's keys and values [L, 2 Hkv, D]."""
    torch.manual_seed(seed)
    needed = [-(-length // size) for length in lengths]
    order = torch.randperm(sum(needed) + 2)[: sum(needed)].split(needed)
    cache = torch.full((sum(needed) + 2, 2, size, kv_heads, dim), float("nan"), dtype=dtype)
    contents = [torch.randn(length, 2 * kv_heads, dim).to(dtype) for length in lengths]
    for table, content in zip(order, contents, strict=True):
        for at, both in enumerate(content):
            cache[table[at // size], 0, at % size], cache[table[at // size], 1, at % size] = both.chunk(2)
    return cache, [table.contiguous() for table in order], contents


def attended(cache, tables, spans, query, heads, kv_heads, dim, window):
    """spans: (rows, context) of each sequence."""
    shape, firsts, first = NativeShape(heads, kv_heads, dim, 1e-5, query, query), [], 0
    for (rows, context), table in zip(spans, tables, strict=True):
        firsts.append((first, rows, context, table))
        first += rows
    step = NativeStep(torch.arange(first), torch.arange(first), operations.spans(firsts))
    return operations.attend(query, shape, step, cache, window)


SPANS = st.lists(
    st.tuples(st.sampled_from([1, 1, 1, 2, 5, 17, 40]), st.sampled_from([0, 1, 15, 16, 46, 62, 63, 64, 65, 127, 200])),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4, 7])
def test_attention_of_scores_far_apart(rows, dtype):
    """All equal, all but one negligible, beyond what exponentials hold; a query that is no number stays visible."""
    cache, tables, (content,) = paged([130], 16, 1, 16, dtype)
    content[:, 0] = 0
    content[:, 0, 0] = (torch.arange(130) % 7).to(dtype)
    for at, both in enumerate(content):
        cache[tables[0][at // 16], 0, at % 16] = both[:1]
    for size in (0.0, 1.0, 40.0, 4e3, 1e6, -1e6):
        query = torch.zeros(rows, 1, 16)
        query[:, 0, 0] = size
        out = attended(cache, tables, [(rows, 130)], query, 1, 1, 16, None)
        close_attention(out, attention_expected(query, content, None, dtype), dtype)
    query[rows // 2, 0, 3] = float("nan")
    finite = attended(cache, tables, [(rows, 130)], query, 1, 1, 16, None).isfinite().all(-1).flatten()
    assert finite.tolist() == [row != rows // 2 for row in range(rows)]


@given(
    SPANS,
    st.sampled_from([(4, 4), (6, 2), (9, 3), (8, 1)]),
    st.sampled_from([2, 6, 8, 16, 24, 64, 80, 128]),
    st.sampled_from([8, 16, 128]),
    st.sampled_from([None, 1, 5, 64, 100, 1000]),
    st.sampled_from(DTYPES),
    st.sampled_from([1, 2]),
)
@settings(max_examples=60, deadline=None)
def test_attention(given_spans, heads, dim, size, window, dtype, threads):
    """Rows and what is cached before them; strided queries; NaN in every slot that is nobody's."""
    library().set_threads(threads)
    spans = [(rows, rows + before) for rows, before in given_spans]
    (query_heads, kv_heads), total = heads, sum(rows for rows, _ in spans)
    cache, tables, contents = paged([context for _, context in spans], size, kv_heads, dim, dtype)
    query = torch.randn(total, query_heads + 3, dim)[:, :query_heads]
    out = attended(cache, tables, spans, query, query_heads, kv_heads, dim, window)
    first = 0
    for i, ((rows, context), content) in enumerate(zip(spans, contents, strict=True)):
        mine = query[first : first + rows]
        expected = attention_expected(mine, content, window, dtype)
        close_attention(out[first : first + rows], expected, dtype)
        for at in {0, rows // 2, rows - 1}:  # the same alone, as a decode: to the bit
            alone = [(1, context - rows + at + 1)]
            lone = attended(cache, [tables[i]], alone, mine[at : at + 1], query_heads, kv_heads, dim, window)
            assert torch.equal(lone[0], out[first + at])
        first += rows
    library().set_threads(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 70])
def test_every_short_context(dtype, window, threads):
    """1 .. 200 tokens as one batch, and each of them alone: the same to the bit, however the batch is divided."""
    lengths = list(range(1, 201))
    cache, tables, contents = paged(lengths, 16, 1, 64, dtype)
    query = torch.randn(len(lengths), 3, 64)
    out = attended(cache, tables, [(1, length) for length in lengths], query, 3, 1, 64, window)
    for i, (length, content) in enumerate(zip(lengths, contents, strict=True)):
        expected = attention_expected(query[i : i + 1], content, window, dtype)
        close_attention(out[i : i + 1], expected, dtype)
        alone = attended(cache, [tables[i]], [(1, length)], query[i : i + 1], 3, 1, 64, window)
        assert torch.equal(alone[0], out[i]), f"{length} tokens alone give something else"


DIMS, HEADS = [64, 80, 96, 128, 256], [(9, 3), (5, 5), (7, 1), (14, 2), (13, 1)]
BOTH = sorted(itertools.product(DIMS, HEADS), key=lambda both: both[0] != DIMS[0] and both[1] != HEADS[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "both_heads"), few(BOTH, len(DIMS) + len(HEADS) - 1))
def test_long_contexts_of_many_shapes(dtype, dim, both_heads, threads):
    """Around the borders of tiles and blocks, a few and more query heads than are taken at once."""
    heads, kv_heads = both_heads
    contexts = [255, 256, 257, 1000]
    cache, tables, contents = paged(contexts, 32, kv_heads, dim, dtype, seed=dim)
    query = torch.randn(4, heads, dim)
    out = attended(cache, tables, [(1, context) for context in contexts], query, heads, kv_heads, dim, None)
    for i, content in enumerate(contents):
        expected = attention_expected(query[i : i + 1], content, None, dtype)
        close_attention(out[i : i + 1], expected, dtype)
    library().set_threads(1)
    assert torch.equal(out, attended(cache, tables, [(1, x) for x in contexts], query, heads, kv_heads, dim, None))


def test_a_key_that_is_no_number_stays_visible():
    cache, tables, _ = paged([70], 16, 2, 16, torch.float32)
    cache[tables[0][1], 0, 3, 0, 5] = float("nan")
    out = attended(cache, tables, [(1, 70)], torch.randn(1, 4, 16), 4, 2, 16, None)
    assert out[0].isnan().any(1).tolist() == [True, True, False, False]  # the heads of the first KV head


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 8, 16, 34, 64])
@pytest.mark.parametrize("normed", [False, True])
def test_rope_and_what_it_writes(dtype, dim, normed, threads):
    rows, heads, kv_heads, size = 37, 6, 2, 8
    qkv, weight = torch.randn(rows, heads + 2 * kv_heads, dim), torch.randn(heads + kv_heads, dim)
    positions = torch.randint(0, 100, (rows,))
    angles = torch.outer(torch.arange(100.0), torch.rand(dim // 2))
    shape = NativeShape(heads, kv_heads, dim, 1e-5, angles.cos(), angles.sin())
    slots = torch.randperm(8 * size)[:rows]
    cache = torch.full((8, 2, size, kv_heads, dim), 7.0, dtype=dtype)
    rotary = qkv[:, : heads + kv_heads]
    rotary = rms_norm_reference(rotary, weight, 1e-5) if normed else rotary
    expected = apply_rope_reference(rotary, angles[positions].cos(), angles[positions].sin())
    value = qkv[:, heads + kv_heads :].clone()
    operations.rotate_and_write(
        qkv, weight if normed else None, shape, NativeStep(positions, slots, operations.spans([])), cache
    )
    torch.testing.assert_close(qkv[:, : heads + kv_heads], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(cache[slots // size, 0, slots % size], qkv[:, heads : heads + kv_heads].to(dtype))
    assert torch.equal(cache[slots // size, 1, slots % size], value.to(dtype))
    others = torch.ones(8, size, dtype=torch.bool)
    others[slots // size, slots % size] = False
    assert (cache.transpose(1, 2)[others] == 7).all()


def test_bfloat16_is_rounded_as_torch_does():
    bits = torch.cat((torch.randint(-(2**31), 2**31 - 1, (4096,)), torch.tensor([0x7F800000, 0x7F7FFFFF, -(2**31)])))
    values = bits.to(torch.int32).view(torch.float32).clone()
    values = values[: len(values) // 2 * 2].view(1, 1, -1)
    dim = values.shape[-1]
    qkv = torch.cat((torch.zeros(1, 2, dim), values), 1)  # one query head, one key, and the values
    shape = NativeShape(1, 1, dim, 1e-5, torch.ones(1, dim // 2), torch.zeros(1, dim // 2))
    cache, zero = torch.zeros(1, 2, 8, 1, dim, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int64)
    operations.rotate_and_write(qkv, None, shape, NativeStep(zero, zero, operations.spans([])), cache)
    torch.testing.assert_close(cache[0, 1, 0, 0], values.flatten().bfloat16(), rtol=0, atol=0, equal_nan=True)
