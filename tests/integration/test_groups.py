"""Workers of several ranks, alone and handing KV over between groups of different shapes: their tokens are those of
transformers' greedy `generate`, or of a worker of one rank."""

from __future__ import annotations

import asyncio
import functools
import gc
import itertools
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tercet.core import Done
from tests.group_clusters import (
    ALONE,
    BLOCK,
    HEAD_DIM,
    HEADS,
    LAYERS,
    aggregated,
    group_model,
    groups,
    handing_over,
    shapes,
)
from tests.helpers import LocalCluster, cluster
from tests.tiny import VOCAB

TOKENS = 6
rng = random.Random(3)
PROMPTS = [[rng.randrange(VOCAB) for _ in range(n)] for n in (1, 2, 15, 16, 17, 40, 90, 200)]


@functools.cache
def expected(kv_heads: int) -> list[list[int]]:
    reference = AutoModelForCausalLM.from_pretrained(group_model(kv_heads), dtype=torch.float32).eval()
    answers = []
    for prompt in PROMPTS:
        with torch.inference_mode():
            tokens = reference.generate(torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False)
        answers.append(tokens[0, len(prompt) :].tolist())
    return answers


async def answers(made: LocalCluster, **params: object) -> tuple[list[list[int]], list[Done]]:
    """To all prompts at once, so that steps have several pieces."""
    asked = {"max_tokens": TOKENS, "ignore_eos": True} | params
    found = await asyncio.gather(*(made.generate(prompt, **asked) for prompt in PROMPTS))
    return [[event.token_id for event in events] for events, _ in found], [done for _, done in found]


def kv_bytes(kv_heads: int, holders: int = 1) -> list[int]:
    """Of each prompt, every head of every layer once, in whole blocks, to each of its holders."""
    token = LAYERS * 2 * kv_heads * HEAD_DIM * 4
    return [math.ceil(len(prompt) / BLOCK) * BLOCK * token * holders for prompt in PROMPTS]


async def assert_alone(shape, kernels, kv_heads=HEADS) -> None:
    async with groups(aggregated(shape, kernels, kv_heads, scheduler__token_budget=64)) as made:
        assert (await answers(made))[0] == expected(kv_heads)
        assert (await answers(made))[0] == expected(kv_heads)  # from the prefix cache


async def assert_handed_over(prefill, decode, kernels, kv_heads=HEADS, **changes) -> None:
    async with groups(handing_over(prefill, decode, kernels, kv_heads, **changes)) as made:
        tokens, done = await answers(made)
        assert tokens == expected(kv_heads)
        wanted = kv_bytes(kv_heads, max(1, decode[0] // kv_heads))
        assert [each.times.kv_bytes for each in done] == wanted
        again, done = await answers(made)
        assert again == expected(kv_heads)
        assert [each.cached_tokens for each in done] == [(len(p) - 1) // BLOCK * BLOCK for p in PROMPTS]
        cached = [len(prompt) // BLOCK * wanted[0] for prompt in PROMPTS]  # whole blocks that the decode worker has
        assert [each.times.kv_bytes for each in done] == [all_ - its for all_, its in zip(wanted, cached, strict=True)]


@pytest.mark.parametrize(
    ("shape", "kernels", "kv_heads"),
    [
        ((2, 1), "native", 12),
        ((4, 1), "torch", 2),  # each head at two ranks
        ((1, 2), "native", 2),
        ((1, 3), "torch", 12),
        ((2, 2), "native", 12),
        ((3, 1), "native", 12),
    ],
)
async def test_a_group_gives_the_tokens_of_transformers(shape, kernels, kv_heads):
    await assert_alone(shape, kernels, kv_heads)


@pytest.mark.parametrize(
    ("prefill", "decode", "kernels", "kv_heads", "transport"),
    [
        ((2, 1), ALONE, "native", 12, "shm"),
        ((1, 2), (2, 1), "torch", 12, "tcp"),
        (ALONE, (4, 1), "native", 12, "tcp"),
        ((3, 1), (1, 3), "native", 12, "shm"),
        ((4, 1), (1, 2), "native", 2, "tcp"),  # of each head one rank sends
        ((2, 2), (1, 3), "native", 2, "shm"),
        ((1, 2), (4, 1), "torch", 2, "shm"),  # each head goes to two ranks
    ],
)
async def test_kv_is_handed_over_between_groups_of_any_shape(prefill, decode, kernels, kv_heads, transport):
    await assert_handed_over(prefill, decode, kernels, kv_heads, transfer__transport=transport)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("kv_heads", [12, 2])
async def test_every_shape_gives_the_tokens_of_transformers(kernels, kv_heads):
    for shape in shapes(4, 3):
        if kv_heads % shape[0] == 0 or shape[0] % kv_heads == 0:
            await assert_alone(shape, kernels, kv_heads)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kv_heads", [12, 2])
async def test_kv_is_handed_over_between_groups_of_all_shapes(kv_heads):
    possible = [shape for shape in shapes(4, 3) if kv_heads % shape[0] == 0 or shape[0] % kv_heads == 0]
    for number, (prefill, decode) in enumerate(itertools.product(possible, possible)):
        transport, kernels = ("shm", "tcp")[number % 2], ("native", "torch")[number // 2 % 2]
        await assert_handed_over(prefill, decode, kernels, kv_heads, transfer__transport=transport)


@pytest.fixture
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def sockets() -> int:
    return sum(fd.is_socket() for fd in Path("/proc/self/fd").iterdir())


@pytest.mark.usefixtures("_no_garbage_collection")
@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
async def test_a_group_that_has_stopped_holds_no_socket(shape):
    """Those of torch's process groups lay about until a collection of garbage, which ends a thread for each."""
    before, deadline = sockets(), time.monotonic() + 10
    async with groups(aggregated(shape, "torch")) as made:
        await made.generate(PROMPTS[0])
        assert sockets() > before
    del made
    while sockets() > before and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    assert sockets() == before


async def test_ranks_in_processes_of_their_own():
    async with cluster(handing_over((2, 1), (1, 2))) as made:
        tokens, done = await answers(made)
        assert tokens == expected(HEADS)
        assert [each.times.kv_bytes for each in done] == kv_bytes(HEADS)
