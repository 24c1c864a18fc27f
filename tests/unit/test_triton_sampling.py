"""The sampling kernel draws the tokens that the host's sampler draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.core import SamplingParams, TokenEvent
from tercet.engine import sampler
from tercet.engine.device_sampler import DeviceDraws
from tercet.engine.inputs import Arrays
from tercet.engine.outputs import Outputs
from tercet.engine.plan import Draw
from tests.triton_interpreter import DEVICE

triton = pytest.importorskip("triton")

from tercet.kernels.triton import sampling  # noqa: E402 # after the helper

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of infinities that a GPU does not report


@pytest.fixture(scope="module", autouse=True)
def small_tiles():
    """So that a small vocabulary has several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "TILE", 128)
        yield


def floats(values):
    return torch.tensor(values, dtype=torch.float32, device=DEVICE)


def penalties_of(draws, vocab):
    params = [draw.params for draw in draws]
    times = [torch.bincount(torch.tensor(d.output, dtype=torch.int64), minlength=vocab) for d in draws]
    prompts = [torch.bincount(torch.tensor(d.prompt, dtype=torch.int64), minlength=vocab) for d in draws]
    return sampling.Penalties(
        floats([p.repetition_penalty for p in params]),
        floats([p.presence_penalty for p in params]),
        floats([p.frequency_penalty for p in params]),
        torch.stack(prompts).bool().to(DEVICE),
        torch.stack(times).int().to(DEVICE),
    )


def drawn(logits, draws):
    """As an engine draws: what it needs goes over with other arrays."""
    arrays, outputs = Arrays(), Outputs(DEVICE)
    arrays.add([1, 2, 3])
    made = DeviceDraws(arrays, draws, logits.shape[-1])
    made.launch(logits, arrays.views(arrays.packed().to(DEVICE)), outputs)
    outputs.close()
    return made.events(outputs.fetched())


def draw_on_device(logits, draws):
    return ids_of(drawn(logits, draws))


def draw_on_host(logits, draws):
    return ids_of(sampler.sample(logits.cpu(), draws))


def ids_of(events):
    return [event.token_id if isinstance(event, TokenEvent) else -1 for event in events]


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 10, 100, 10**6]),
    top_p=st.sampled_from([1.0, 0.99, 0.7, 0.31, 0.05, 0.0]),
    min_p=st.sampled_from([0.0, 0.013, 0.2, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, -0.3]),
    seed=st.integers(0, 2**40),
)
IDS = st.integers(0, 149)
BAD = st.sampled_from([float("nan"), float("inf"), None, None, None])


# derandomized: two tokens may tie within the rounding of a logarithm or a sum, and then either is right
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(PARAMS, BAD), max_size=5),
    st.sampled_from([1, 2, 127, 128, 129, 700]),
    st.sampled_from([None, 0.5]),
    st.sampled_from([1.0, 6.0]),
    st.booleans(),
    st.integers(0, 99),
)
def test_the_same_tokens(rows, vocab, step, scale, cut, seed):
    torch.manual_seed(seed)
    logits = torch.randn(len(rows), vocab + 3)[:, :vocab] * scale
    if step:
        logits = logits.div(step).round() * step + 0.1  # many tokens of equal score
    if cut:
        logits[:, : vocab // 3] = -torch.inf
    draws = []
    for row, (params, bad) in enumerate(rows):
        if bad is not None:
            logits[row, int(torch.randint(vocab, ()))] = bad
        seen = torch.randint(vocab, (2, 9)).tolist() if params.penalises else ([], [])
        draws.append(Draw(params, seed % 7, *seen))
    logits = logits.to(DEVICE)
    assert draw_on_device(logits, draws) == draw_on_host(logits, draws)


@settings(max_examples=10, deadline=None)
@given(
    st.lists(
        st.tuples(PARAMS, st.lists(IDS, min_size=1, max_size=9), st.lists(IDS, max_size=9)), min_size=1, max_size=4
    ),
    st.integers(1, 3),
)
def test_penalties(rows, repeats):
    logits = torch.randn(len(rows), 150 + 2, device=DEVICE)[:, :150]
    draws = [Draw(params, 0, prompt, output * repeats) for params, prompt, output in rows]
    expected = torch.stack([sampler.penalise(row.cpu(), draw) for row, draw in zip(logits, draws, strict=True)])
    scores = sampling.penalise(logits, penalties_of(draws, 150))
    torch.testing.assert_close(scores.cpu(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"top_p": 0.8}, {"top_k": 4}, {"min_p": 0.3}, {"min_p": 0.05, "top_k": 8, "top_p": 0.7}],
)
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_left_out_is_never_drawn(options, tied):
    """By many draws of one row: exactly the tokens that the host keeps come up."""
    torch.manual_seed(1)
    row = torch.randn(16)
    if tied:
        row = row.round()
    kept = sampler.truncated((row - row.max()) / 2, SamplingParams(**options)).isfinite().nonzero().flatten()
    draws = [Draw(SamplingParams(temperature=2.0, seed=seed, **options), 0) for seed in range(50)]
    tokens = draw_on_device(row.expand(50, -1).contiguous().to(DEVICE), draws)
    assert tokens == draw_on_host(row.expand(50, -1), draws)
    assert set(tokens) <= set(kept.tolist())
    assert len(set(tokens)) >= len(kept) - 2


def test_zeros_of_either_sign_are_equal():
    logits = torch.tensor([[-0.0, 0.0, -0.0, 0.0, -1.0]], device=DEVICE).repeat(20, 1)
    draws = [Draw(SamplingParams(seed=seed, top_p=0.4, top_k=4), 0) for seed in range(20)]
    assert draw_on_device(logits, draws) == draw_on_host(logits, draws)


def test_nothing_but_minus_infinity():
    assert draw_on_device(torch.full((1, 9), -torch.inf, device=DEVICE), [Draw(SamplingParams(seed=1), 0)]) == [-1]


def test_the_likeliest_of_near_equals():
    logits = torch.full((1, 300), 1.0, device=DEVICE)
    logits[0, 200] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    assert draw_on_device(logits, [Draw(SamplingParams(temperature=0), 0)]) == [200]
    logits[0, 250] = logits[0, 200]
    assert draw_on_device(logits, [Draw(SamplingParams(temperature=0), 0)]) == [200]


def test_the_variates_of_a_large_vocabulary(monkeypatch):
    monkeypatch.setattr(sampling, "TILE", 4096)
    logits = torch.zeros(3, 150_000, device=DEVICE)  # the race alone decides
    draws = [Draw(SamplingParams(seed=seed), 5) for seed in (0, 1, 2**63)]
    assert draw_on_device(logits, draws) == draw_on_host(logits, draws)


@pytest.mark.parametrize("count", [0, 3, 50])
def test_logprobs_are_the_hosts(count):
    logits = torch.randn(3, 40, device=DEVICE) * 3
    params = SamplingParams(seed=2, logprobs=count, repetition_penalty=1.2, top_k=2**40)
    draws = [Draw(params, 4, [1, 2], [3, 3]), Draw(SamplingParams(seed=2), 4), Draw(params, 5, [39], [])]
    for ours, theirs in zip(drawn(logits, draws), sampler.sample(logits.cpu(), draws), strict=True):
        assert (ours.token_id, ours.logprob) == (theirs.token_id, pytest.approx(theirs.logprob, abs=1e-5))
        assert [i for i, _ in ours.top_logprobs] == [i for i, _ in theirs.top_logprobs]
        assert [p for _, p in ours.top_logprobs] == pytest.approx([p for _, p in theirs.top_logprobs], abs=1e-5)
