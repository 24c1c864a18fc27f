"""What a request may ask for, asked of groups: the answer is that of workers of one rank."""

from __future__ import annotations

import asyncio
import math
import random

import pytest

from tercet.core import Done, Progress, PromptLogprobs, TokenEvent
from tests.group_clusters import ALONE, aggregated, groups, handing_over, shaped
from tests.helpers import request_of, spec_of
from tests.tiny import CONTEXT, VOCAB

rng = random.Random(5)
PROMPTS = [[rng.randrange(VOCAB) for _ in range(n)] for n in (1, 3, 16, 31, 100)]
SAMPLINGS = [
    {"temperature": 0.9, "seed": 7, "top_p": 0.95},
    {"temperature": 1.3, "seed": 8, "top_k": 50, "min_p": 0.01},
    {"temperature": 0.7, "seed": 9, "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2},
    {"temperature": 0.0, "repetition_penalty": 1.5},
    {"temperature": 0.0, "logprobs": 4, "prompt_logprobs": 3},
    {"temperature": 1.0, "seed": 3, "logprobs": 0, "prompt_logprobs": 0},
]
GROUPS = {
    "P(TP2) to D(PP2)": lambda: handing_over((2, 1), (1, 2), scheduler__token_budget=48),
    "P(PP2) to D(TP3)": lambda: handing_over((1, 2), (3, 1), scheduler__token_budget=48),
    "TP2 PP2": lambda: aggregated((2, 2), scheduler__token_budget=48),
}


async def asked(made, prompt, sampling) -> tuple[list[TokenEvent], list[PromptLogprobs]]:
    params = {"max_tokens": 8, "ignore_eos": True} | sampling
    events = [event async for event in made.router.generate(request_of(prompt, **params))]
    assert isinstance(events[-1], Done)
    assert all(isinstance(event, TokenEvent | PromptLogprobs | Progress) for event in events[:-1])
    return [e for e in events if isinstance(e, TokenEvent)], [e for e in events if isinstance(e, PromptLogprobs)]


async def all_asked(made) -> list[tuple[list[TokenEvent], list[PromptLogprobs]]]:
    """All at once."""
    return list(await asyncio.gather(*(asked(made, p, s) for s in SAMPLINGS for p in PROMPTS)))


def numbers(scored) -> list[float]:
    """All logprobs, in order."""
    tokens, prompts = scored
    found = [token.logprob for token in tokens if token.logprob is not None]
    found += [logprob for token in tokens for _, logprob in token.top_logprobs]
    for prompt in prompts:
        found += [value for logprob, top in prompt.entries for value in (logprob, *(p for _, p in top))]
    return found


@pytest.fixture(scope="module")
def alone():
    async def run():
        async with groups(handing_over(ALONE, ALONE)) as made:
            return await all_asked(made)

    return asyncio.run(run())


@pytest.mark.parametrize("name", GROUPS)
async def test_sampled_penalised_and_scored_requests(name, alone):
    async with groups(GROUPS[name]()) as made:
        found = await all_asked(made)
    for ours, theirs in zip(found, alone, strict=True):
        assert [token.token_id for token in ours[0]] == [token.token_id for token in theirs[0]]
        assert numbers(ours) == pytest.approx(numbers(theirs), abs=1e-4)
        assert [[i for i, _ in token.top_logprobs] for token in ours[0]] == [
            [i for i, _ in token.top_logprobs] for token in theirs[0]
        ]
    assert sum(len(numbers(each)) for each in found) > 900


@pytest.mark.parametrize("name", GROUPS)
async def test_a_prompt_of_the_whole_context_and_one_that_ends_it(name):
    prompts = [[rng.randrange(VOCAB) for _ in range(n)] for n in (CONTEXT - 1, CONTEXT - 5)]
    found = []
    for each in (handing_over(ALONE, ALONE), GROUPS[name]()):
        async with groups(each) as made:
            got = await asyncio.gather(
                *(made.generate(p, max_tokens=CONTEXT - len(p), ignore_eos=True) for p in prompts)
            )
            found.append([[event.token_id for event in events] for events, _ in got])
    assert found[0] == found[1]
    assert [len(tokens) for tokens in found[0]] == [1, 5]


@pytest.mark.parametrize("kernels", ["native", "torch"])
async def test_in_bfloat16_tokens_come_and_are_finite(kernels):
    spec = handing_over((2, 1), (1, 2), kernels)
    spec = spec.model_copy(update={"model": spec.model.model_copy(update={"dtype": "bfloat16"})})
    async with groups(spec) as made:
        for tokens, prompts in await asyncio.gather(*(asked(made, p, SAMPLINGS[4]) for p in PROMPTS)):
            assert len(tokens) == 8
            assert all(math.isfinite(value) for value in numbers((tokens, prompts)))


async def test_blocks_run_short_and_requests_are_preempted_on_every_rank():
    """Sixteen answers of 100 tokens do not fit at once: some are computed again."""
    prompts = [[rng.randrange(VOCAB) for _ in range(30)] for _ in range(16)]
    found = []
    for shape in (ALONE, (2, 2)):
        async with groups(aggregated(shape, kv__blocks=40)) as made:
            got = await asyncio.gather(*(made.generate(p, max_tokens=100, ignore_eos=True) for p in prompts))
            found.append([[event.token_id for event in events] for events, _ in got])
    assert found[0] == found[1]


# ---- the package's model: 9 heads, 3 of KV


@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", ["float32", "gguf"])
async def test_the_package_model_by_three_ranks(dtype):
    prompts = [[rng.randrange(3, 49000) for _ in range(n)] for n in (1, 20, 130)]
    found = []
    for shape in (ALONE, (3, 1)):
        spec = shaped(spec_of("aggregated", decoders=1), "native", aggregated=shape)
        spec = spec.model_copy(update={"model": spec.model.model_copy(update={"dtype": dtype})})
        async with groups(spec) as made:
            got = await asyncio.gather(*(made.generate(p, max_tokens=8, ignore_eos=True, logprobs=0) for p in prompts))
            found.append([events for events, _ in got])
    tokens = [[[event.token_id for event in events] for events in each] for each in found]
    first = [[events[0].logprob for events in each] for each in found]
    assert first[0] == pytest.approx(first[1], abs=1e-3 if dtype == "float32" else 0.3)
    if dtype == "float32":
        assert tokens[0] == tokens[1]
