"""What a request waits for, and whom it is sent to: real workers with a tiny model, real wires."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from dataclasses import replace

import pytest

from tercet.core import Role, TokenEvent
from tercet.errors import EngineFault, InvalidRequest, WorkerLost
from tercet.roles.router import decisions as decisions_module
from tercet.roles.router.planning import plan_for
from tercet.spec import ClusterSpec, SchedulerSpec
from tercet.transfer.transports.contract import Endpoint
from tests.helpers import LocalCluster, cluster, request_of, spec_of
from tests.tiny import VOCAB, tiny_model


def tiny(topology: str = "pd", **changes: object) -> ClusterSpec:
    return spec_of(topology, source=tiny_model(), **changes)


def prompt(length: int, first: int = 1) -> list[int]:
    return [(first + 7 * n) % VOCAB for n in range(length)]


async def tokens_of(made: LocalCluster, token_ids: list[int], **params: object) -> list[int]:
    events, _ = await made.generate(token_ids, **({"ignore_eos": True} | params))
    return [event.token_id for event in events]


async def test_a_long_prompt_does_not_starve_behind_short_ones():
    """It needs half of the decode worker's blocks, and short requests come without end and take each that is freed."""
    spec = tiny(decoders=1, kv__blocks=64, kv__prefix_cache=False, scheduler__max_running=16)
    async with cluster(spec) as made:
        over = asyncio.Event()

        async def short(number: int) -> None:
            while not over.is_set():
                await tokens_of(made, prompt(40, number), max_tokens=30)

        crowd = [asyncio.create_task(short(number)) for number in range(24)]
        await asyncio.sleep(0.5)
        link = next(link for link in made.router._links.values() if link.info.role is Role.DECODE)
        begun, start = [], link.start
        link.start = lambda leg: (begun.append(leg.ticket.request_id), start(leg))
        events, _ = await made.generate(prompt(900), max_tokens=3, timeout_s=20.0)
        over.set()
        await asyncio.gather(*crowd)
        assert len(events) == 3
        assert max(Counter(begun).values()) < 25  # times that one request was begun


async def test_a_prefill_worker_is_free_again_when_its_leg_is_over():
    """One request decodes for long; a prefill worker that takes one at a time serves the next one meanwhile."""
    spec = tiny(decoders=1)
    one = SchedulerSpec(max_running=1, max_waiting=1)
    roles = {role: wanted.model_copy(update={"scheduler": one}) if role is Role.PREFILL else wanted
             for role, wanted in spec.roles.items()}  # fmt: skip
    async with cluster(spec.model_copy(update={"roles": roles})) as made:
        streams = [made.router.generate(request_of(prompt(20, n), max_tokens=1500, ignore_eos=True)) for n in range(4)]
        for stream in streams:  # each has begun before the next one asks
            await anext(stream)
        [prefill] = made.router._directory.up(Role.PREFILL)
        async with asyncio.timeout(5):
            while prefill.legs:  # though nobody reads the streams
                await asyncio.sleep(0.01)
        assert prefill.tokens == 0
        assert await asyncio.wait_for(tokens_of(made, prompt(30), max_tokens=3), 5)
        for stream in streams:
            await stream.aclose()


@pytest.mark.parametrize("prefills", [1, 2])
async def test_a_decode_worker_that_cannot_be_reached_fails_nobody(prefills):
    async with cluster(tiny(prefills=prefills, limits__retries=2)) as made:
        infos = [view.info for view in made.router._directory.views.values()]
        lost = next(info for info in infos if info.worker_id == "decode-0")
        endpoint = Endpoint.decode(lost.transfer_endpoint)
        nowhere = replace(endpoint, unix="nobody", tcp=["127.0.0.1:1"]).encode()
        await made.router.set_workers([replace(i, transfer_endpoint=nowhere) if i is lost else i for i in infos])
        while len(made.router.loads()) < len(infos):
            await asyncio.sleep(0.01)
        results = await asyncio.gather(*(made.generate(prompt(40, n), max_tokens=4) for n in range(6)))
        assert {dict(done.workers)["decode"] for _, done in results} == {"decode-1"}
        async with asyncio.timeout(10):
            while not any(pair.fault for load in made.router.loads().values() for pair in load.pairs):
                await asyncio.sleep(0.05)
        _, done = await made.generate(prompt(50), max_tokens=4)
        assert done.attempts == 1  # it is known by now, and not even tried


async def test_who_sends_little_does_not_wait_behind_who_sends_much():
    async with cluster(tiny(decoders=1, scheduler__max_running=4)) as made:
        ended: list[str] = []

        async def ask(client: str, number: int) -> None:
            request = replace(request_of(prompt(40, number), max_tokens=20, ignore_eos=True), client=client)
            async for _ in made.router.generate(request):
                pass
            ended.append(client)

        heavy = [asyncio.create_task(ask("heavy", number)) for number in range(100)]
        while not ended:
            await asyncio.sleep(0.01)
        began = len(ended)
        await ask("light", 7)
        assert len(ended) - began < 20  # its turn came with the next place or the one behind it
        await asyncio.gather(*heavy)


async def test_a_request_that_ends_in_line_leaves_its_place():
    """Cancelled, out of time or turned away: nobody behind it waits for it."""
    async with cluster(tiny(decoders=1, scheduler__max_running=1)) as made:
        first = made.router.generate(request_of(prompt(20), max_tokens=2000, ignore_eos=True))
        await anext(first)
        waiting = [asyncio.create_task(tokens_of(made, prompt(30, n), max_tokens=2)) for n in range(6)]
        late = asyncio.create_task(tokens_of(made, prompt(9), max_tokens=2, timeout_s=0.3))
        await asyncio.sleep(0.1)
        for task in waiting[:3]:
            task.cancel()
        assert isinstance((await asyncio.gather(late, return_exceptions=True))[0], Exception)
        await first.aclose()
        async with asyncio.timeout(10):
            assert all(len(tokens) == 2 for tokens in await asyncio.gather(*waiting[3:]))
        assert not any(line.head() for line in made.router._decisions._waiting._lines)


@pytest.mark.parametrize("topology", ["pd", "aggregated"])
@pytest.mark.parametrize("ids", [[5, VOCAB], [VOCAB + 5] * 40, [2**31]])
async def test_a_token_that_the_model_does_not_have_ends_its_request_only(topology, ids):
    async with cluster(tiny(topology, decoders=1)) as made:
        running = asyncio.create_task(tokens_of(made, prompt(20), max_tokens=60))
        with pytest.raises(InvalidRequest, match=f"outside the model's vocabulary .0 to {VOCAB - 1}."):
            await tokens_of(made, ids)
        assert len(await running) == 60
        assert len(await tokens_of(made, prompt(20), max_tokens=5)) == 5


@pytest.mark.parametrize("where", ["prefill-0", "decode-0"])
async def test_a_fault_of_one_sequence_ends_that_sequence(where, monkeypatch):
    """The forward pass raises whenever a marked token is in the batch; all others go on, in the same batch too."""
    async with cluster(tiny(decoders=1)) as made:
        alone = [await tokens_of(made, prompt(40, n), max_tokens=30) for n in range(6)]
        model = made.workers[where].engine._executor._runner._model
        hidden, marked = type(model).hidden, prompt(33, 111)

        def fails(self, batch, cache, on_layer=None):
            if self is model and _has(batch, marked, decoding=where == "decode-0"):
                raise RuntimeError("a kernel that cannot do this")
            return hidden(self, batch, cache, on_layer)

        monkeypatch.setattr(type(model), "hidden", fails)
        answers = [asyncio.create_task(tokens_of(made, prompt(40, n), max_tokens=30)) for n in range(6)]
        with pytest.raises(EngineFault, match="a kernel that cannot do this"):
            await tokens_of(made, marked, max_tokens=30)
        assert await asyncio.gather(*answers) == alone
        assert await tokens_of(made, prompt(40, 0), max_tokens=30) == alone[0]


def _has(batch, marked: list[int], *, decoding: bool) -> bool:
    if decoding:
        return bool((batch.decode_context_lens == len(marked) + 1).any())
    return marked[5] in batch.token_ids.tolist() and len(marked) in [chunk.context for chunk in batch.chunks]


async def test_logits_that_are_no_numbers_end_their_request(monkeypatch):
    async with cluster(tiny(decoders=1)) as made:
        alone = await tokens_of(made, prompt(40), max_tokens=20)
        model = made.workers["decode-0"].engine._executor._runner._model
        hidden = type(model).hidden

        def poisoned(self, batch, cache, on_layer=None):
            rows = hidden(self, batch, cache, on_layer)
            if self is model:
                rows[: batch.num_decodes][batch.decode_context_lens == 35] = float("nan")
            return rows

        monkeypatch.setattr(type(model), "hidden", poisoned)
        other = asyncio.create_task(tokens_of(made, prompt(40), max_tokens=20))
        with pytest.raises(EngineFault, match="not finite"):
            await tokens_of(made, prompt(33, 9), max_tokens=20)
        assert await other == alone


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the engines that die
async def test_a_request_that_kills_workers_is_not_carried_to_a_third(caplog, monkeypatch):
    async with cluster(tiny(prefills=3, decoders=1, limits__retries=9)) as made:
        deadly = prompt(21, 77)
        for name, worker in made.workers.items():
            if name.startswith("prefill"):
                executor = worker.engine._executor
                run = executor.launch
                monkeypatch.setattr(executor, "launch", lambda plan, run=run: _die_of(plan, deadly, run))
        with caplog.at_level(logging.ERROR), pytest.raises(WorkerLost, match="2 workers that died"):
            await tokens_of(made, deadly)
        assert "was on board when these died: prefill-" in caplog.text
        dead = [name for name, worker in made.workers.items() if worker.legs._dead is not None]
        assert len(dead) == 2
        assert len(await tokens_of(made, prompt(20), max_tokens=4)) == 4
        for name in dead:
            await made.workers.pop(name).stop()  # for the leak oracle: what is dead owes nothing


def _die_of(plan, deadly, run):
    if any(list(piece.token_ids) == deadly for piece in plan.pieces):
        raise SystemExit("the process is gone")
    return run(plan)


async def test_workers_that_are_set_at_once_end_as_the_last_word_says(monkeypatch):
    """Closing a link takes a while; what a later call has set meanwhile stays."""
    async with cluster(tiny()) as made:
        infos = {name: view.info for name, view in made.router._directory.views.items()}
        without = [info for name, info in infos.items() if name != "decode-0"]
        await asyncio.gather(made.router.set_workers(without), made.router.set_workers(list(infos.values())))
        assert set(made.router._directory.views) == set(infos)
        assert {view.info.worker_id for view in made.router._links} == set(infos)
        async with asyncio.timeout(5):
            while len(made.router.loads()) < len(infos):
                await asyncio.sleep(0.01)
        started = time.monotonic()
        stream = made.router.generate(request_of(prompt(20), max_tokens=3))
        assert [isinstance(event, TokenEvent) async for event in stream].count(True) == 3
        assert time.monotonic() - started < 20


async def test_a_client_pays_once_for_each_token_however_often_it_is_begun(monkeypatch):
    async with cluster(tiny("aggregated", decoders=2)) as made:
        router, charged = made.router, []
        monkeypatch.setattr(router._decisions._waiting, "charge", lambda ongoing, tokens: charged.append(tokens))
        stream = router.generate(request_of(prompt(20), max_tokens=60, ignore_eos=True))
        told = 0
        async for event in stream:
            told += isinstance(event, TokenEvent)
            if told == 10 and len(charged) == 0:
                decode = next(iter(router._decisions._running.values())).attempt.plan.decode
                router._carry_out(router._decisions.on_down(decode, "", time.monotonic()))
                router._carry_out(router._decisions.on_up(decode, time.monotonic()))
        assert len(charged) > 1
        assert sum(charged) == told == 60


@pytest.mark.parametrize("turns", range(4))
async def test_a_cancelled_request_is_not_planned_as_room_comes(monkeypatch, turns):
    async with cluster(tiny("aggregated", decoders=1, scheduler__max_running=1)) as made:
        router, planned = made.router, []
        decisions = router._decisions
        monkeypatch.setattr(decisions_module, "plan_for", lambda *_: None)
        waiting = asyncio.create_task(anext(router.generate(request_of(prompt(5), max_tokens=2))))
        await asyncio.sleep(0.05)
        monkeypatch.setattr(decisions_module, "plan_for", lambda *told: planned.append(1) or plan_for(*told))
        decisions._waiting.reconsider()
        router._carry_out(decisions._plan(time.monotonic()))
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.cancel()
        before = len(planned)
        await asyncio.wait([waiting], timeout=5)
        assert waiting.cancelled()
        assert len(planned) == before
