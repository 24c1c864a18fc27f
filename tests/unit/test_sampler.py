"""Sampling against independent references: transformers' logits processors, plain probabilities, and float64."""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter

import pytest
import torch
from transformers.generation import logits_process as hf

from tercet.core import SamplingParams
from tercet.engine import sampler
from tercet.engine.plan import Draw
from tercet.errors import EngineFault
from tercet.kernels.native import trial

VOCAB = 500


def draw_of(params, prompt=(3, 5, 5, 9), output=(7, 7, 7, 3)):
    return Draw(params, len(output), prompt, output)


def rows(count, seed=0, scale=3.0):
    return torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def sample(logits, draws):
    """By torch, and the same by the native kernels."""
    events = sampler.sample(logits, draws)
    if trial.missing() is None:
        assert sampler.sample(logits, draws, native=True) == events
    return events


def draw(row, params, output=(7, 7, 7, 3)):
    [event] = sample(row.unsqueeze(0), [draw_of(params, output=output)])
    assert not isinstance(event, EngineFault), event
    return event.token_id


def left_by_transformers(row, params):
    """Ids that transformers would sample from, in vLLM's order: min-p, top-k, top-p."""
    scores = hf.TemperatureLogitsWarper(params.temperature)(None, row.unsqueeze(0))
    if params.min_p:
        scores = hf.MinPLogitsWarper(params.min_p)(None, scores)
    if params.top_k:
        scores = hf.TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = hf.TopPLogitsWarper(params.top_p)(None, scores)
    return scores[0]


FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": VOCAB},
    {"top_p": 0.1},
    {"top_p": 0.9},
    {"top_p": 1e-9},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.8},
    {"min_p": 0.01, "top_k": 100, "top_p": 0.95},
    {"min_p": 0.3, "top_k": 2, "top_p": 0.5},
]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_what_is_left_to_draw_from(filters, temperature):
    params = SamplingParams(temperature=temperature, **filters)
    for row in rows(20):
        expected = left_by_transformers(row, params)
        got = sampler.truncated((row - row.max()) / temperature, params)
        assert (got.isfinite() == expected.isfinite()).all()
        torch.testing.assert_close(got.softmax(-1), expected.softmax(-1))


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 2.0])
def test_repetition_penalty(penalty):
    params = SamplingParams(repetition_penalty=penalty)
    wanted = draw_of(params)
    for row in rows(10):
        ids = torch.tensor([[*wanted.prompt, *wanted.output]])
        expected = hf.RepetitionPenaltyLogitsProcessor(penalty)(ids, row.unsqueeze(0).clone())[0]
        torch.testing.assert_close(sampler.penalise(row, wanted), expected)


def test_without_any_token_before_it_a_penalty_changes_nothing():
    [row], params = rows(1), SamplingParams(repetition_penalty=1.5, presence_penalty=1.0, temperature=0.0)
    assert sample(row.unsqueeze(0), [Draw(params, 0)])[0].token_id == int(row.argmax())


def test_presence_and_frequency_penalties_count_output_alone():
    """https://platform.openai.com/docs/api-reference: mu[j] - c[j] * frequency - float(c[j] > 0) * presence."""
    params = SamplingParams(presence_penalty=0.7, frequency_penalty=0.25)
    row = rows(1)[0]
    expected = row.clone()
    for token, count in Counter((7, 7, 7, 3)).items():
        expected[token] -= count * 0.25 + 0.7
    torch.testing.assert_close(sampler.penalise(row, draw_of(params)), expected)


def test_all_penalties_in_the_order_of_vllm():
    params = SamplingParams(temperature=0.0, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.5)
    for row in rows(20, scale=1.0):
        scores = hf.RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([[3, 5, 5, 9, 7, 7, 7, 3]]), row[None].clone())[
            0
        ]
        for token, count in Counter((7, 7, 7, 3)).items():
            scores[token] -= count * 0.5 + 0.5
        assert draw(row, params) == int(scores.argmax())


@pytest.mark.parametrize("temperature", [0.0, 1e-307, 1e-12, 9.9e-6])
def test_next_to_no_temperature_is_greedy(temperature):
    for row in rows(20):
        assert draw(row, SamplingParams(temperature=temperature, seed=1)) == int(row.argmax())


@pytest.mark.parametrize("temperature", [1e-5, 1e-3, 100.0])
def test_any_other_temperature_draws_a_token(temperature):
    for seed, row in enumerate(rows(50, scale=30.0)):
        token = draw(row, SamplingParams(temperature=temperature, seed=seed))
        assert 0 <= token < VOCAB
        if temperature <= 1e-3:
            assert token == int(row.argmax())


@pytest.mark.parametrize(
    "filters",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"top_k": 3}, marks=pytest.mark.slow),
        {"top_p": 0.7},
        {"min_p": 0.15},
    ],
    ids=str,
)
def test_draws_follow_the_probabilities(filters):
    """5,000 draws of a row of 12 tokens; each count within 4.5 standard deviations."""
    row = torch.tensor([2.0, 1.5, 1.0, 1.0, 0.5, 0.0, 0.0, -0.5, -1.0, -2.0, -3.0, 2.2])
    params = SamplingParams(temperature=0.9, **filters)
    expected = left_by_transformers(row, params).softmax(-1)
    draws = 20_000
    counts = Counter(
        draw(row, SamplingParams(temperature=0.9, seed=n % 700, **filters), output=(1,) * (n // 700))
        for n in range(draws)
    )
    for token, probability in enumerate(expected.tolist()):
        assert abs(counts[token] - draws * probability) <= 4.5 * (draws * probability * (1 - probability)) ** 0.5, token


def test_neighbouring_seeds_and_positions_are_independent():
    drawn = torch.stack([sampler.exponentials(seed, position, 4000) for seed in (7, 8) for position in (0, 1)])
    correlation = torch.corrcoef(drawn)
    assert (correlation - torch.eye(4)).abs().max() < 0.06
    assert abs(float(drawn.mean()) - 1) < 0.03
    assert abs(float(drawn.var()) - 1) < 0.06
    assert drawn.min() > 0
    assert drawn.isfinite().all()


def test_the_random_numbers_are_these():
    """They are part of what a seed promises, on every machine."""
    drawn = sampler.exponentials(7, 3, 4)
    expected = torch.tensor(REFERENCE)
    torch.testing.assert_close(drawn, expected, rtol=1e-6, atol=0)


def reference(seed, position, count):
    """The same in plain integers."""

    def mix(x):
        x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
        x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
        return x ^ (x >> 16)

    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    before, between = int.from_bytes(digest[:4]), int.from_bytes(digest[4:])
    values = []
    for token in range(1, count + 1):
        bits = mix((mix(token * 0x9E3779B9 & 0xFFFFFFFF ^ before) + between) & 0xFFFFFFFF)
        values.append(-math.log1p(-((bits & 0x7FFFFFFF) + 0.5) * (1 - 2**-22) * 2**-31))
    return values


REFERENCE = reference(7, 3, 4)


@pytest.mark.parametrize("seed", [0, 1, -(2**63), 2**63 - 1, None])
def test_every_seed_draws(seed):
    params = SamplingParams(temperature=1.0, seed=seed)
    assert draw(rows(1)[0], params) == draw(rows(1)[0], params)


def test_a_draw_hardly_depends_on_rounding():
    """Logits as bfloat16 products round them: an inverse CDF over the vocabulary flips several times as often."""
    flips, cdf_flips, total = 0, 0, 0
    for seed in range(400):
        row = torch.randn(5000, generator=torch.Generator().manual_seed(seed)) * 2
        noisy = row + torch.randn(5000, generator=torch.Generator().manual_seed(seed + 9999)) * 0.01
        params = SamplingParams(temperature=1.0, seed=seed)
        flips += draw(row, params) != draw(noisy, params)
        point = random.Random(seed).random()
        cdf_flips += len({int(torch.searchsorted(r.double().softmax(-1).cumsum(0), point)) for r in (row, noisy)}) - 1
        total += 1
    assert flips / total < 0.03
    assert cdf_flips > 2 * flips


BAD = [
    torch.full((VOCAB,), float("nan")),
    torch.full((VOCAB,), -torch.inf),
    rows(1)[0].index_fill(0, torch.tensor([77]), float("nan")),
    rows(1)[0].index_fill(0, torch.tensor([77]), float("inf")),
]


@pytest.mark.parametrize("params", [{}, {"temperature": 0.0}, {"top_k": 5, "top_p": 0.5}, {"logprobs": 3}], ids=str)
@pytest.mark.parametrize("bad", BAD, ids=["nan", "-inf", "one nan", "one inf"])
def test_logits_that_are_no_numbers_are_a_fault_of_their_row_alone(bad, params):
    good = rows(1)[0]
    wanted = SamplingParams(**({"temperature": 1.0, "seed": 5} | params))
    events = sample(torch.stack([good, bad, good]), [draw_of(wanted) for _ in range(3)])
    assert isinstance(events[1], EngineFault)
    assert not isinstance(events[0], EngineFault)
    assert events[0].token_id == events[2].token_id == draw(good, wanted)


@pytest.mark.parametrize(
    "params",
    [{"top_p": p} | more for p in (1e-46, 5e-324, 1e-9) for more in ({}, {"top_k": 1}, {"temperature": 100.0})],
)
def test_the_likeliest_token_is_left_whatever_top_p_is(params):
    """Below 7e-46 it is 0 in float32."""
    for row in rows(20):
        assert draw(row, SamplingParams(**({"temperature": 1.0, "seed": 1} | params))) == int(row.argmax())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_penalty_beyond_float32_is_a_fault(temperature):
    row = rows(1)[0] * 1e37
    wanted = draw_of(SamplingParams(temperature=temperature, repetition_penalty=0.01, seed=1))
    wanted = wanted._replace(prompt=[int(row.argmax())])
    [event] = sample(row.unsqueeze(0), [wanted])
    assert isinstance(event, EngineFault)


def test_more_logprobs_than_the_vocabulary_has():
    row = torch.tensor([[1.0, 2.0, 0.5]])
    [event] = sample(row, [draw_of(SamplingParams(temperature=0.0, logprobs=20), (0,), ())])
    assert [i for i, _ in event.top_logprobs] == [1, 0, 2]
    assert len(sampler.top_logprobs(*sampler.logprobs_of(row, torch.tensor([0]), 20))[0][1]) == 3


def test_a_masked_token_is_never_drawn():
    """Minus infinity for one token is no fault: models mask with it."""
    row = torch.full((VOCAB,), -torch.inf)
    row[[3, 9]] = torch.tensor([0.0, 1.0])
    assert {draw(row, SamplingParams(temperature=1.0, seed=seed)) for seed in range(60)} == {3, 9}


@pytest.mark.parametrize("count", [0, 1, 20])
def test_logprobs_are_those_of_the_raw_logits(count):
    params = SamplingParams(temperature=0.5, top_k=3, repetition_penalty=1.5, seed=4, logprobs=count)
    for row in rows(10):
        [event] = sample(row.unsqueeze(0), [draw_of(params)])
        expected = row.double().log_softmax(-1)
        assert event.logprob == pytest.approx(float(expected[event.token_id]), abs=1e-4)
        top = expected.topk(count)
        assert [i for i, _ in event.top_logprobs] == top.indices.tolist()
        assert [p for _, p in event.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-4)


def test_a_row_does_not_depend_on_its_batch():
    params = [
        SamplingParams(temperature=t, seed=s, top_p=p) for s, (t, p) in enumerate([(0.7, 0.9), (1.0, 1.0), (0.0, 1.0)])
    ]
    together = sample(rows(3), [draw_of(p) for p in params])
    alone = [sample(row.unsqueeze(0), [draw_of(p)])[0] for row, p in zip(rows(3), params, strict=True)]
    assert [e.token_id for e in together] == [e.token_id for e in alone]


@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 9, 63, 64, 65, 500, 4097, 49152])
def test_both_kernels_draw_the_same_tokens(vocab):
    """Of all bounds together; many equal scores, and tokens that are masked."""
    rng, generator = random.Random(vocab), torch.Generator().manual_seed(vocab)
    logits = torch.randn(48, vocab, generator=generator) * torch.tensor([0.5, 3, 8]).repeat(16).unsqueeze(1)
    logits[::5] = logits[::5].round()
    logits[::7, 1:] = logits[::7, 1:].masked_fill(logits[::7, 1:] < 0, -torch.inf)
    draws = []
    for _ in range(len(logits)):
        bounds = {"top_k": rng.choice([0, 1, 5, 50]), "top_p": rng.choice([1.0, 0.95, 0.5, 0.1])}
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.3, 1.0, 2.0]),
            min_p=rng.choice([0.0, 0.05]),
            seed=rng.randrange(9**9),
            **bounds,
        )
        draws.append(draw_of(params, output=[0] * rng.randrange(9)))
    assert not any(isinstance(event, EngineFault) for event in sample(logits, draws))
