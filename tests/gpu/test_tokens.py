"""The tokens of a small random model: the GPU's are the CPU's and those of transformers, whoever computes what."""

from __future__ import annotations

import asyncio

import pytest

from tests.gpu.small import GREEDY, ON_GPU, PROMPTS, expected, spec_of
from tests.helpers import LocalCluster, cluster

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]  # kernels are compiled meanwhile
POOLS = [("cpu", "cpu", "auto")]
if ON_GPU:
    POOLS += [("gpu", "gpu", "torch"), ("gpu", "gpu", "triton"), ("cpu", "gpu", "triton"), ("gpu", "cpu", "triton")]


async def tokens_of(made: LocalCluster) -> list[list[int]]:
    """Of all prompts at once."""
    answers = await asyncio.gather(*(made.generate(prompt, **GREEDY) for prompt in PROMPTS))
    return [[event.token_id for event in events] for events, _ in answers]


@pytest.mark.parametrize(("prefill", "decode", "kernels"), POOLS)
async def test_they_are_those_of_transformers(prefill, decode, kernels):
    """Twice, so that the second time prefix caches serve what was computed, and what has landed."""
    async with cluster(spec_of(prefill, decode, kernels=kernels)) as made:
        assert await tokens_of(made) == expected()
        assert await tokens_of(made) == expected()


@pytest.mark.skipif(not ON_GPU, reason="graphs are captured on a GPU")
async def test_with_graphs_they_are_those_without():
    """Batches of 1 to 12 go through graphs of other sizes, which are padded, and one is larger than any graph."""
    found = []
    for graphs in ("off", [1, 2, 4, 8]):
        async with cluster(spec_of(cuda_graphs=graphs)) as made:
            alone = [[event.token_id for event in (await made.generate(p, **GREEDY))[0]] for p in PROMPTS[:3]]
            found.append((alone, await tokens_of(made)))
    assert found[0] == found[1] == (expected()[:3], expected())
