"""Every prompt length under every token budget, alone and in company: disaggregated = aggregated, and nothing hangs.

How a prompt is cut into chunks decides which blocks leave with which chunk, and whether what is left is one token, a
block or nothing. Two engines by themselves go through all lengths; a cluster with all its wires through those that
leave 0, 1 or 2 tokens behind whole chunks.
"""

from __future__ import annotations

import asyncio
import random

import pytest

from tercet.kernels.kinds import choose_kernels
from tests.engines import Handover, Running, load_tiny
from tests.few import few
from tests.helpers import LocalCluster, cluster, spec_of
from tests.tiny import VOCAB, tiny_model

LONGEST = 1100
TOKENS = 2  # the first is sampled where the prompt is computed, the second where its KV has gone


def prompt_of(length: int) -> list[int]:
    rng = random.Random(length)
    return [rng.randrange(VOCAB) for _ in range(length)]


PROMPTS = {length: prompt_of(length) for length in range(1, LONGEST + 3)}
FEW, MANY = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33), (63, 64, 65, 100, 127, 128, 255, 256, 257, 511, 512)
BUDGETS = FEW + MANY


def lengths_of(budget: int) -> list[int]:
    """Each budget is tried with all short prompts and those around its multiples, each long one with some."""
    lengths = set(range(1, 36)) | around_multiples(budget, min(LONGEST, 8 * budget))
    if budget in MANY:
        lengths |= {n for n in range(36, LONGEST + 1) if n % len(MANY) == MANY.index(budget)}
    return sorted(n for n in lengths if n <= LONGEST)


def around_multiples(budget: int, longest: int) -> set[int]:
    return {n + more for n in range(budget, longest + 1, budget) for more in (0, 1, 2)}


@pytest.fixture(scope="module")
def expected() -> dict[int, list[int]]:
    """What one engine says by torch's kernels, each prompt in one chunk. The others have the best of this machine."""
    running = Running(load_tiny(), budget=2048)
    for length, prompt in PROMPTS.items():
        running.add(length, prompt)
        _, tokens = running.done.get(timeout=30)
        assert isinstance(tokens, list)
    running.stop()
    return {sequence.num_prompt: tokens for sequence, tokens in running.outputs.items()}


def test_each_length_is_tried(expected):
    assert {length for budget in BUDGETS for length in lengths_of(budget)} >= set(range(1, LONGEST + 1))
    assert len({tuple(tokens) for tokens in expected.values()}) > 400  # the model does not say the same to all


@pytest.mark.parametrize(
    ("at_once", "budgets"), few([(1, BUDGETS[::2]), (8, BUDGETS[1::2]), (1, BUDGETS[1::2]), (8, BUDGETS[::2])], 2)
)
def test_two_engines(at_once, budgets, expected):
    loaded = load_tiny(choose_kernels())
    for budget in budgets:
        lengths = lengths_of(budget)
        handover = Handover(loaded, budget)
        got = handover.run([PROMPTS[length] for length in lengths], at_once)
        handover.stop()
        wrong = {n: (tokens, expected[n]) for n, tokens in zip(lengths, got, strict=True) if tokens != expected[n]}
        assert not wrong, (budget, wrong)


def test_one_engine(expected):
    """Prompts in chunks beside decodes, in one engine."""
    loaded = load_tiny(choose_kernels())
    for budget in BUDGETS:
        running, lengths = Running(loaded, budget, max_running=8), lengths_of(budget)
        for length in lengths:
            running.add(length, PROMPTS[length])
        for _ in lengths:
            sequence, tokens = running.done.get(timeout=30)
            assert tokens == expected[sequence.num_prompt], (budget, sequence.num_prompt)
        running.stop()


async def answers(made: LocalCluster, lengths: list[int], at_once: int) -> dict[int, list[int]]:
    gate = asyncio.Semaphore(at_once)

    async def one(length: int) -> list[int]:
        async with gate:
            events, _ = await made.generate(PROMPTS[length], max_tokens=TOKENS, ignore_eos=True, timeout_s=30.0)
            return [event.token_id for event in events]

    return dict(zip(lengths, await asyncio.gather(*map(one, lengths)), strict=True))


@pytest.mark.parametrize("topology", ["pd", "aggregated"])
@pytest.mark.parametrize("at_once", [1, 8])
async def test_a_cluster(topology, at_once, expected):
    async with cluster(spec_of(topology, decoders=1, source=tiny_model())) as made:
        for budget in (1, 16, 100, 512):
            for worker in made.workers.values():
                worker.engine._state._scheduler.policy._token_budget = budget
            lengths = sorted(around_multiples(budget, min(LONGEST, 8 * budget)))
            got = await answers(made, lengths, at_once)
            assert got == {length: expected[length] for length in lengths}, budget
