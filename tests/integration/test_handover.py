"""Real workers, the real model, real sockets: what a request goes through between router and workers."""

from __future__ import annotations

import asyncio
import itertools
import random
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tercet.core import FinishReason, Role, Ticket
from tercet.errors import DeadlineExceeded, PeerDown, WorkerLost
from tercet.roles.router.decisions import Decisions
from tercet.spec import ClusterSpec
from tercet.transfer.mover.parcels import Loader
from tercet.transfer.transports.table import ALL
from tests.helpers import cluster, request_of, spec_of
from tests.tiny import VOCAB, tiny_model

rng = random.Random(1)
PROMPTS = [[rng.randrange(100, 40000) for _ in range(n)] for n in (1, 5, 16, 17, 48, 100)]


async def tokens_of(made, prompts, **params):
    results = await asyncio.gather(*(made.generate(p, **params) for p in prompts))
    return [[e.token_id for e in events] for events, _ in results]


SAMPLINGS = [
    {},
    {"temperature": 0.9, "seed": 7, "top_p": 0.95},
    {"temperature": 1.3, "seed": 8, "top_k": 50, "min_p": 0.01},
    {"temperature": 0.7, "seed": 9, "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2},
]


async def test_every_topology_and_transport_gives_the_same_tokens():
    expected = [[] for _ in SAMPLINGS]
    prompts = [[token % VOCAB for token in prompt] for prompt in PROMPTS]
    async with cluster(spec_of("aggregated", decoders=1, source=tiny_model())) as made:
        for rows, sampling in zip(expected, SAMPLINGS, strict=True):
            for prompt in prompts:  # one at a time, so that nothing depends on the batch
                rows += await tokens_of(made, [prompt], max_tokens=8, ignore_eos=True, **sampling)
    for transport in [cls.name for cls in ALL if not cls.in_device_memory]:
        async with cluster(spec_of("pd", source=tiny_model(), transfer__transport=transport)) as made:
            for sampling, wanted in zip(SAMPLINGS, expected, strict=True):
                got = await tokens_of(made, prompts, max_tokens=8, ignore_eos=True, **sampling)
                assert got == wanted, (transport, sampling)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_kv_bytes_are_those_that_prefill_computed(transport):
    spec = spec_of("pd", decoders=1, transfer__transport=transport, scheduler__token_budget=40)
    async with cluster(spec) as made:
        prompt = PROMPTS[-1]
        await made.generate(prompt, max_tokens=1)
        source = made.workers["prefill-0"].engine
        destination = made.workers["decode-0"].engine
        full = len(prompt) // 16
        hashes = list(source._state._index._block_of)[:full]
        assert set(hashes) <= set(destination._state._index._block_of)
        assert len(hashes) == full
        for digest in hashes:
            ours = source._executor._runner.kv_cache[:, source._state._index._block_of[digest]]
            theirs = destination._executor._runner.kv_cache[:, destination._state._index._block_of[digest]]
            assert ours.view(dtype=ours.dtype).equal(theirs)
            assert ours.abs().sum() > 0


async def test_only_missing_blocks_are_sent():
    async with cluster(spec_of("pd", decoders=1)) as made:
        prompt = [rng.randrange(100, 40000) for _ in range(64)]
        block = made.workers["decode-0"].engine._executor._runner.kv_cache[0, 0].nbytes * 30
        first = (await made.generate(prompt, max_tokens=2))[1]
        assert first.times.kv_bytes == 4 * block
        assert first.times.transport == "shm"
        again = (await made.generate(prompt, max_tokens=2))[1]
        assert (again.times.kv_bytes, again.cached_tokens) == (0, 48)
        longer = (await made.generate(prompt + prompt[:20], max_tokens=2))[1]
        assert (longer.times.kv_bytes, longer.cached_tokens) == (2 * block, 64)


async def test_closing_the_stream_frees_every_block_on_both_sides():
    async with cluster(spec_of("pd")) as made:
        for stop_after in (0, 1, 3):
            stream = made.router.generate(request_of(PROMPTS[-1], max_tokens=200, ignore_eos=True))
            if stop_after == 0:
                first = asyncio.create_task(anext(stream))
                await asyncio.sleep(0.05)
                first.cancel()
                await asyncio.gather(first, return_exceptions=True)
            for _ in range(stop_after):
                await anext(stream)
            await stream.aclose()
            await made.settled()


async def test_a_deadline_ends_the_request_and_frees_its_blocks():
    async with cluster(spec_of("pd")) as made:
        with pytest.raises(DeadlineExceeded):
            async for _ in made.router.generate(request_of(PROMPTS[-1], 0.5, max_tokens=2000, ignore_eos=True)):
                pass
        await made.settled()


async def test_more_requests_than_fit_all_finish():
    spec = spec_of("pd", scheduler__max_running=3, scheduler__max_waiting=2)
    async with cluster(spec) as made:
        results = await asyncio.gather(*(made.generate(p, max_tokens=5, ignore_eos=True) for p in PROMPTS * 4))
        assert all(len(events) == 5 for events, _ in results)
        assert {done.finish_reason for _, done in results} == {FinishReason.LENGTH}
        assert {dict(done.workers)["decode"] for _, done in results} == {"decode-0", "decode-1"}


@pytest.mark.parametrize("topology", ["aggregated", "pd"])
async def test_preemption_changes_no_token(topology):
    prompts = [[token % VOCAB for token in p[:10]] for p in PROMPTS[2:]]
    async with cluster(spec_of(topology, decoders=1, source=tiny_model())) as made:
        expected = await tokens_of(made, prompts, max_tokens=60, ignore_eos=True)
    async with cluster(spec_of(topology, decoders=1, source=tiny_model(), kv__blocks=12)) as made:
        assert await tokens_of(made, prompts, max_tokens=60, ignore_eos=True) == expected
        decoding = next(worker for name, worker in made.workers.items() if not name.startswith("prefill"))
        assert decoding.engine.load().preemptions > 0


async def test_a_broken_worker_is_passed_over():
    async with cluster(spec_of("pd", limits__retries=1)) as made:
        expected = await tokens_of(made, [PROMPTS[2]])
        made.workers["decode-0"].legs.die(WorkerLost("broken on purpose"))
        for _ in range(3):
            events, done = await made.generate(PROMPTS[2])
            assert [e.token_id for e in events] == expected[0]
            assert dict(done.workers)["decode"] == "decode-1"


async def test_a_client_may_use_a_request_id_again_at_once():
    async with cluster(spec_of("pd", decoders=1)) as made:
        for _ in range(5):
            again = replace(request_of(PROMPTS[-1], max_tokens=50, ignore_eos=True), request_id="mine")
            stream = made.router.generate(again)
            await anext(stream)
            await stream.aclose()


async def test_the_first_token_may_be_the_last():
    async with cluster(spec_of("pd")) as made:
        events, done = await made.generate(PROMPTS[3], max_tokens=1)
        assert len(events) == 1
        assert done.finish_reason is FinishReason.LENGTH
        events, done = await made.generate(PROMPTS[3], stop_token_ids=(events[0].token_id,))
        assert (done.finish_reason, done.stop_token_id) == (FinishReason.STOP, events[0].token_id)


async def test_logprobs_are_the_same_from_prefill_and_decode():
    """The token behind a prompt is the prefill worker's, those behind it are the decode worker's. So each position is
    asked of both: as the first one behind a longer prompt, and in the middle of an answer."""
    prompt = [token % VOCAB for token in PROMPTS[4]]
    async with cluster(spec_of("pd", source=tiny_model())) as made:
        decoded, _ = await made.generate(prompt, max_tokens=12, logprobs=4, ignore_eos=True)
        tokens = [event.token_id for event in decoded]
        for number, event in enumerate(decoded):
            [prefilled], _ = await made.generate(prompt + tokens[:number], max_tokens=1, logprobs=4)
            assert prefilled.token_id == event.token_id
            assert prefilled.logprob == pytest.approx(event.logprob, abs=1e-3)
            for (ours, mine), (theirs, yours) in zip(prefilled.top_logprobs, event.top_logprobs, strict=True):
                assert ours == theirs
                assert mine == pytest.approx(yours, abs=1e-3)
    assert_transformers_says(prompt, decoded)


def assert_transformers_says(prompt, events):
    reference = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32).eval()
    ids = torch.tensor([prompt + [event.token_id for event in events[:-1]]])
    with torch.inference_mode():
        logprobs = reference(ids, logits_to_keep=len(events)).logits[0].log_softmax(-1)
    for event, row in zip(events, logprobs, strict=True):
        top = row.topk(len(event.top_logprobs))
        assert [token for token, _ in event.top_logprobs] == top.indices.tolist()
        assert [p for _, p in event.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-3)
        assert event.logprob == pytest.approx(float(row[event.token_id]), abs=1e-3)


@pytest.mark.parametrize("prefills", [1, 2])  # the next attempt passes over the one that failed, if there is another
@pytest.mark.parametrize("transport", ["tcp", "torch"])  # shm has no link that breaks while its writer lives
async def test_a_transfer_that_dies_half_way_resumes_behind_the_last_whole_block(transport, prefills, monkeypatch):
    """The link breaks in the prompt's third chunk; what had landed before is not sent again."""
    prompt = [rng.randrange(100, 40000) for _ in range(112)]
    spec = spec_of("pd", prefills=prefills, transfer__transport=transport, scheduler__token_budget=32)
    async with cluster(spec) as made:
        real, broken, senders = Loader.parcel, [], set()

        def parcel(self, way, pair, write):
            senders.add(id(self._memory))
            if write.index >= 4 and write.layer + write.layers > 10 and not broken:
                broken.append(write)
                raise PeerDown("the link broke")
            return real(self, way, pair, write)

        monkeypatch.setattr(Loader, "parcel", parcel)
        events, done = await made.generate(prompt, max_tokens=4, ignore_eos=True)
        assert (len(broken), done.attempts, len(senders)) == (1, 2, prefills)
        block = made.workers["decode-0"].engine._executor._runner.kv_cache[0, 0].nbytes * 30
        assert done.times.kv_bytes == 3 * block  # of 7: four had landed
        again, _ = await made.generate(prompt, max_tokens=4, ignore_eos=True)
        assert [e.token_id for e in events] == [e.token_id for e in again]


SIZES = (8, 16, 32, 128)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_prefill_and_decode_may_have_different_block_sizes(transport):
    """As a spec says it; lengths around both sizes, twice, so that a part comes from the prefix caches."""
    prompts = [
        [rng.randrange(VOCAB) for _ in range(n)] for n in (1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200)
    ]
    async with cluster(spec_of("aggregated", decoders=1, source=tiny_model())) as made:
        expected = await tokens_of(made, prompts, max_tokens=6, ignore_eos=True)
    for ours, theirs in itertools.permutations(SIZES, 2):
        spec = spec_of("pd", decoders=1, source=tiny_model(), transfer__transport=transport).model_dump()
        for role, size in ((Role.PREFILL, ours), (Role.DECODE, theirs)):
            spec["roles"][role]["kv"] |= {"block_size": size, "blocks": 4096 // size}
        async with cluster(ClusterSpec.model_validate(spec)) as made:
            for again in (False, True):
                got = await tokens_of(made, prompts, max_tokens=6, ignore_eos=True)
                assert got == expected, (ours, theirs, again)


async def test_a_pair_below_the_floor_is_not_ready_and_is_named():
    async with cluster(spec_of("pd", decoders=1, transfer__min_bandwidth=1e15)) as made:
        await made.generate(PROMPTS[0])
        assert not made.router.is_ready()
        for _ in range(100):
            if "bytes/s by shm" in made.router.slow_pair():
                break
            await asyncio.sleep(0.05)
        assert made.router.slow_pair().startswith("prefill-0 to decode-0: ")
        assert "transfer.min_bandwidth is 1,000,000,000,000,000 bytes/s" in made.router.slow_pair()


async def test_pairs_are_measured_before_the_first_request():
    async with cluster(spec_of("pd", transfer__min_bandwidth=1000.0)) as made:
        for _ in range(100):
            if not made.router.slow_pair():
                break
            await asyncio.sleep(0.05)
        assert made.router.slow_pair() == ""
        pairs = made.router.loads()["prefill-0"].pairs
        assert {(p.worker_id, p.transport) for p in pairs} == {("decode-0", "shm"), ("decode-1", "shm")}


async def test_a_report_that_cannot_be_taken_loses_no_token_of_those_before_it(monkeypatch):
    """Two reports of one message, told by their time: the second one raises, so the stream is opened anew."""
    prompts = [[token % VOCAB for token in prompt] for prompt in PROMPTS[2:]]
    on_report, times = Decisions.on_report, []

    def stumbles(self, worker, ticket, outcome, now):
        times.append(now)
        if times.count(now) == 2 and len(times) > 40 and not fallen:
            fallen.append(ticket)
            raise ValueError("cannot be taken")
        return on_report(self, worker, ticket, outcome, now)

    fallen: list[Ticket] = []
    async with cluster(spec_of("aggregated", decoders=1, source=tiny_model())) as made:
        expected = await tokens_of(made, prompts, max_tokens=60, ignore_eos=True)
        monkeypatch.setattr(Decisions, "on_report", stumbles)
        assert await tokens_of(made, prompts, max_tokens=60, ignore_eos=True) == expected
    assert fallen
