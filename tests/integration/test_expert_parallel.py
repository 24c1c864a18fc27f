"""Attention replicas with experts spread over their ranks, each rank a process: the tokens of one process, whatever the
shape of the group, however many replicas are idle, and whichever requests are cancelled."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from examples import make_tiny_model
from examples.make_tiny_model import Family
from tercet.core import Leg, Outcome, Role, SamplingParams, Ticket
from tercet.distributed.expert_map import default_map
from tercet.distributed.routed import Routed
from tercet.errors import LeaseExpired
from tercet.placement.expert_counts import Counts
from tercet.placement.experts.weighing import Wish, served, weigh
from tercet.spec import ClusterSpec, ParallelSpec
from tercet.wire.worker_client import WorkerLink
from tests.helpers import TOKEN, LocalCluster, cluster, next_token, request_of, spec_of

TOKENS = 12
LENGTHS = (1, 2, 3, 15, 16, 17, 40, 64, 75, 100, 130, 300)
FAMILIES = (Family.MIXTRAL, Family.QWEN3_MOE, Family.DEEPSEEK_V3)
EXPERTS = 8  # of each of them
SINGLE = ParallelSpec()
REPLICAS = ParallelSpec(data=2, expert=2)
TENSOR = ParallelSpec(tensor=2, expert=2)
SHAPES = {  # one: an aggregated worker; two: prefill and decode
    "replicas": (REPLICAS,),
    "tensor": (TENSOR,),
    "every expert twice": (ParallelSpec(data=4, expert=4, expert_redundancy=EXPERTS),),
    "stages of replicas": (ParallelSpec(pipeline=2, data=2, expert=2),),
    "to replicas": (SINGLE, REPLICAS),
    "from replicas to tensor": (REPLICAS, TENSOR),
}
KERNELS = ("native", "torch")
EVERY = [(family, shape, kernels) for family in FAMILIES for shape in SHAPES for kernels in KERNELS]
FEW = [  # each shape, families and kernels by turns
    (FAMILIES[number % len(FAMILIES)], shape, KERNELS[number // len(FAMILIES) % 2])
    for number, shape in enumerate(SHAPES)
]
SAMPLINGS = (
    {"temperature": 0.9, "seed": 7, "top_p": 0.95},
    {"temperature": 1.3, "seed": 8, "top_k": 50, "min_p": 0.01},
    {"temperature": 0.7, "seed": 9, "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2},
)
_rng = random.Random(5)
PROMPTS = [[_rng.randrange(256) for _ in range(length)] for length in LENGTHS]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Family -> its directory, and the greedy tokens of transformers for each prompt; made once."""
    found = {}

    def make(family: Family):
        if family not in found:
            directory = tmp_path_factory.mktemp(family)
            model = make_tiny_model.make(family, directory, seed=3)
            found[family] = str(directory), [greedy(model, prompt) for prompt in PROMPTS]
        return found[family]

    return make


def greedy(model, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
    return out[0, len(prompt) :].tolist()


def shaped(source: str, shapes: Sequence[ParallelSpec], kernels: str = "native") -> ClusterSpec:
    """Chunks of 64 tokens, so that long prompts take several steps."""
    spec = spec_of("pd" if len(shapes) == 2 else "aggregated", 1, source=source, scheduler__token_budget=64)
    roles = {
        role: its.model_copy(update={"parallelism": shape, "kernels": kernels})
        for (role, its), shape in zip(spec.roles.items(), shapes, strict=True)
    }
    return spec.model_copy(update={"roles": roles})


async def tokens_of(workers: LocalCluster, prompts: Sequence[list[int]], **params: object) -> list[list[int]]:
    """All asked at once."""
    asked = [workers.generate(prompt, max_tokens=TOKENS, ignore_eos=True, **params) for prompt in prompts]
    return [[event.token_id for event in events] for events, _ in await asyncio.gather(*asked)]


async def check(made, family: Family, shape: str, kernels: str) -> None:
    source, expected = made(family)
    async with cluster(shaped(source, SHAPES[shape], kernels)) as workers:
        alone = await tokens_of(workers, PROMPTS[-2:-1])  # all replicas but one compute no rows
        assert alone == expected[-2:-1]
        assert await tokens_of(workers, PROMPTS) == expected
    assert len({token for answer in expected for token in answer}) > 20


@pytest.mark.parametrize(("family", "shape", "kernels"), FEW)
async def test_one_request_and_many_have_the_greedy_tokens_of_transformers(made, family, shape, kernels):
    await check(made, family, shape, kernels)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "shape", "kernels"), [case for case in EVERY if case not in FEW])
async def test_every_family_in_every_shape(made, family, shape, kernels):
    await check(made, family, shape, kernels)


@pytest.mark.parametrize("shape", ["every expert twice", "from replicas to tensor"])
async def test_sampled_tokens_are_those_of_a_single_process(made, shape):
    source, _ = made(Family.QWEN3_MOE)
    async with cluster(shaped(source, (SINGLE,))) as workers:
        expected = [await tokens_of(workers, PROMPTS, **sampling) for sampling in SAMPLINGS]
    async with cluster(shaped(source, SHAPES[shape])) as workers:
        for sampling, wanted in zip(SAMPLINGS, expected, strict=True):
            assert await tokens_of(workers, PROMPTS, **sampling) == wanted, sampling
    assert len({str(rows) for rows in expected}) == len(SAMPLINGS)


async def test_a_prompt_that_no_decode_worker_takes_ends(made):
    """The prefill worker alone knows of it, and it has no place in a replica yet."""
    spec = shaped(made(Family.QWEN3_MOE)[0], (REPLICAS, SINGLE))
    spec = spec.model_copy(update={"transfer": spec.transfer.model_copy(update={"lease_s": 2.0, "heartbeat_s": 0.5})})
    ends, up = list[Outcome](), asyncio.Event()
    async with cluster(spec) as workers:
        link = WorkerLink(
            workers.infos["prefill-0"],
            TOKEN,
            lambda reports: ends.extend(outcome for _, outcome in reports),
            lambda load: None,
            lambda fault: up.set(),
        )
        await asyncio.wait_for(up.wait(), 10)
        peer = workers.infos["decode-0"].transfer_endpoint
        for number in range(4):  # at both replicas
            link.start(Leg(Ticket(f"r{number}", 0, 1), Role.PREFILL, (1, 2, 3), 3, SamplingParams(), 30.0, peer=peer))
        async with asyncio.timeout(15):
            while len(ends) < 4:
                await asyncio.sleep(0.02)
        await link.close()
    assert {type(end) for end in ends} == {LeaseExpired}


@pytest.mark.parametrize("shape", ["replicas", "from replicas to tensor"])
async def test_requests_that_are_cancelled_leave_nothing(made, shape):
    """Before their first token or behind any, some while others go on; `cluster` checks for leaks at the end."""
    source, expected = made(Family.DEEPSEEK_V3)
    rng = random.Random(shape)

    async def cancelled(workers: LocalCluster) -> None:
        request = request_of(rng.choice(PROMPTS), max_tokens=200, ignore_eos=True)
        stream = workers.router.generate(request)
        try:
            async with asyncio.timeout(rng.random() * 0.3):
                for _ in range(rng.randrange(1, 20)):
                    await next_token(stream)
        except TimeoutError:
            pass
        finally:
            await stream.aclose()

    async with cluster(shaped(source, SHAPES[shape])) as workers:
        for _ in range(3):
            whole = asyncio.create_task(tokens_of(workers, PROMPTS[:4]))
            await asyncio.gather(*(cancelled(workers) for _ in range(8)))
            assert await whole == expected[:4]
        await workers.settled()
        assert await tokens_of(workers, PROMPTS) == expected


async def told(workers: LocalCluster, shape: ParallelSpec) -> tuple[Counter[int], Counter[int]]:
    """Rows that were computed by each expert, and that were routed to it, of all ranks that have told."""
    rows, routed = Counter[int](), Counter[int]()
    for rank in (await workers.workers["aggregated-0"].health()).experts:
        for expert, count in zip(rank.experts, rank.rows, strict=True):
            rows[expert] += count
        if rank.rank % shape.tensor == 0:
            routed.update(dict(enumerate(rank.routed)))
    return rows, routed


@pytest.mark.parametrize("shape", ["tensor", "stages of replicas"])
async def test_a_worker_says_how_much_each_rank_has_computed_of_which_experts(made, shape):
    source, _ = made(Family.MIXTRAL)
    layers, k, found = 4, 2, []
    wanted = (sum(LENGTHS) + len(LENGTHS) * (TOKENS - 1)) * layers * k
    for parallel in (SINGLE, SHAPES[shape][0]):
        async with cluster(shaped(source, (parallel,))) as workers:
            before, _ = await told(workers, parallel)  # by a model that an earlier test in this process has used
            await tokens_of(workers, PROMPTS)
            async with asyncio.timeout(20):
                rows, routed = await told(workers, parallel)
                while rows.total() - before.total() < wanted or rows != routed:
                    await asyncio.sleep(0.1)
                    rows, routed = await told(workers, parallel)
            found.append({expert: rows[expert] - before[expert] for expert in range(EXPERTS)})
    assert found[0] == found[1]
    assert sum(found[0].values()) == wanted


async def test_ranks_that_share_every_expert_say_nothing_of_them(made):
    source, _ = made(Family.MIXTRAL)
    async with cluster(shaped(source, (ParallelSpec(tensor=2),))) as workers:
        await tokens_of(workers, PROMPTS[:3])
        assert (await workers.workers["aggregated-0"].health()).experts == ()


@pytest.mark.parametrize(
    "shape",
    [
        *(pytest.param(shape, marks=pytest.mark.slow) for shape in ("replicas", "every expert twice")),
        *("tensor", "stages of replicas"),
    ],
)
async def test_all_shapes_count_the_routing_of_one_process(made, shape):
    """Each replica counts its own requests, each stage its own layers; who reads gets them of all ranks."""
    source, expected = made(Family.DEEPSEEK_V3)

    async def counted(spec: ClusterSpec) -> Routed:
        async with cluster(spec) as workers:
            before = await workers.workers["aggregated-0"].routed()
            assert await tokens_of(workers, PROMPTS) == expected
            after = await workers.workers["aggregated-0"].routed(pairs=True)
            # The difference, since a model of one process is loaded once for all tests.
            return replace(after, load=after.load - before.load, computed=after.computed - before.computed)

    alone, spread = await counted(shaped(source, (SINGLE,))), await counted(shaped(source, SHAPES[shape]))
    (wanted,) = SHAPES[shape]
    tokens = sum(len(prompt) + TOKENS - 1 for prompt in PROMPTS)
    assert (alone.load.sum(axis=(0, 2)) == tokens * alone.top_k).all()
    assert (spread.load.sum(axis=0) == alone.load[0]).all()
    assert spread.load.shape[0] == wanted.data
    assert (spread.load.sum(axis=(1, 2)) > 0).all()
    placed = default_map(EXPERTS, wanted.expert_redundancy, wanted.expert)
    assert (spread.ranks, spread.top_k, spread.expert_bytes) == (wanted.expert, alone.top_k, alone.expert_bytes)
    assert (spread.phy2log == placed.phy2log.numpy()).all()
    assert len(spread.phy2log) == spread.load.shape[1]
    assert (spread.computed.sum(axis=1) == alone.load[0].sum(axis=1)).all()
    assert (spread.computed > 0).all()
    assert (alone.computed[:, 0] == alone.load[0].sum(axis=1)).all()
    rows, layers = (each.astype(float) for each in (spread.load, spread.computed))
    sent = np.repeat(rows, wanted.tensor, axis=0) / wanted.tensor
    expected = served(spread.phy2log, sent).reshape(len(layers), spread.ranks, -1).sum(axis=2)
    assert expected == pytest.approx(layers, rel=0.1)  # what placements are judged by is what ranks do
    for counted_pairs in (alone.pairs, spread.pairs):
        assert counted_pairs is not None
        assert counted_pairs.shape == (len(layers) - 1, EXPERTS, EXPERTS)
    ends = {stage * len(layers) // wanted.pipeline for stage in range(1, wanted.pipeline)}
    stays = [layer for layer in range(len(layers) - 1) if layer + 1 not in ends]
    assert [layer for layer, pairs in enumerate(spread.pairs) if pairs.any()] == stays
    for layer in stays:  # of the same tokens in both: each of its experts here is paired with each of the next layer's
        assert spread.pairs[layer].sum() % alone.top_k**2 == 0
        if layer + 1 in stays:
            assert (spread.pairs[layer].sum(axis=0) == spread.pairs[layer + 1].sum(axis=1)).all()


@pytest.mark.parametrize(
    "wanted",
    [
        *(pytest.param(shape, marks=pytest.mark.slow) for shape in (REPLICAS, TENSOR)),
        ParallelSpec(data=2, expert=2, expert_redundancy=4),
    ],
)
async def test_experts_lie_where_recorded_counts_say(made, tmp_path, wanted):
    """From counts to a plan to a group that is started with it: the same tokens, more evenly computed."""
    source, expected = made(Family.DEEPSEEK_V3)

    async def served_by(shape: ParallelSpec) -> Routed:
        async with cluster(shaped(source, (shape,))) as workers:
            assert await tokens_of(workers, PROMPTS) == expected
            return await workers.workers["aggregated-0"].routed()

    before = await served_by(wanted)
    counts = Counts(
        before.load[None], before.computed[None], before.phy2log, 1, before.top_k, before.expert_bytes, 1.0, "w"
    )
    found = weigh(counts, Wish())
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"ranks": before.ranks, "phy2log": found.placement.phy2log.tolist()}))
    after = await served_by(wanted.model_copy(update={"expert_plan": str(plan)}))
    assert (after.phy2log == found.placement.phy2log).all()
    assert not (after.phy2log == before.phy2log).all()
    assert (after.load.sum(axis=0) == before.load.sum(axis=0)).all()
    assert after.computed.astype(float) == pytest.approx(found.after, rel=0.1)
    assert after.computed.max(axis=1).sum() < before.computed.max(axis=1).sum()
