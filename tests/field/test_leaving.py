"""A worker that is taken away: what runs there ends there, or goes on elsewhere; no request fails for it."""

from __future__ import annotations

import asyncio
import logging

import pytest

from tercet.core import Done
from tests.field.test_routing import prompt, tiny
from tests.helpers import LocalCluster, cluster

TOKENS = 150


async def leave(made: LocalCluster, name: str) -> None:
    """As the controller says it: the gateway first."""
    views = made.router._directory.views
    await made.router.set_workers([view.info for worker_id, view in views.items() if worker_id != name])


async def started(made: LocalCluster, count: int) -> None:
    async with asyncio.timeout(20):
        while sum(len(worker.legs._active) for worker in made.workers.values()) < count:
            await asyncio.sleep(0.005)


async def parted(made: LocalCluster) -> None:
    async with asyncio.timeout(20):
        while len(made.router._links) > len(made.router._directory.views):
            await asyncio.sleep(0.01)


def asked(made: LocalCluster, count: int) -> list[asyncio.Task]:
    return [
        asyncio.create_task(made.generate(prompt(20 + n), max_tokens=TOKENS, ignore_eos=True)) for n in range(count)
    ]


@pytest.mark.parametrize("leaving", ["decode-0", "prefill-0"])
async def test_what_runs_on_a_leaving_worker_ends_there_and_nothing_new_comes(leaving, caplog):
    role = leaving.partition("-")[0]
    async with cluster(tiny(decoders=2, prefills=2)) as made:
        alone = [await made.generate(prompt(20 + n), max_tokens=TOKENS, ignore_eos=True) for n in range(4)]
        with caplog.at_level(logging.WARNING):
            running = asked(made, 4)
            await started(made, 4)
            assert made.workers[leaving].legs._active
            await leave(made, leaving)
            draining = asyncio.create_task(made.workers[leaving].drain(60))
            later = [await made.generate(prompt(30), max_tokens=5) for _ in range(4)]
            together = [await task for task in running]
            await draining
            await parted(made)
        assert [[e.token_id for e in tokens] for tokens, _ in together] == [
            [e.token_id for e in tokens] for tokens, _ in alone
        ]
        assert {done.attempts for _, done in together} == {1}
        assert leaving in {dict(done.workers)[role] for _, done in together}
        assert {dict(done.workers)[role] for _, done in later} == {f"{role}-1"}
        assert caplog.text == ""


@pytest.mark.parametrize(("topology", "leaving"), [("pd", "decode-0"), ("aggregated", "aggregated-0")])
async def test_what_does_not_end_in_time_goes_on_elsewhere_and_is_no_failure(topology, leaving):
    async with cluster(tiny(topology, decoders=2, limits__retries=0)) as made:
        alone = [await made.generate(prompt(20 + n), max_tokens=TOKENS, ignore_eos=True) for n in range(4)]
        running = asked(made, 4)
        await started(made, 4)
        await leave(made, leaving)
        await made.workers[leaving].drain(0.05)
        assert not made.workers[leaving].legs._active
        together = [await task for task in running]
        assert [[e.token_id for e in tokens] for tokens, _ in together] == [
            [e.token_id for e in tokens] for tokens, _ in alone
        ]
        assert {done.attempts for _, done in together} == {1, 2}
        await parted(made)


async def test_a_leaving_worker_that_dies_is_a_death():
    async with cluster(tiny(decoders=2)) as made:
        running = asked(made, 4)
        await started(made, 4)
        await leave(made, "decode-0")
        await made.workers["decode-0"]._server.stop()
        results = [await task for task in running]
        assert all(isinstance(done, Done) and len(tokens) == TOKENS for tokens, done in results)
        assert {dict(done.workers)["decode"] for _, done in results} == {"decode-1"}
        await parted(made)
