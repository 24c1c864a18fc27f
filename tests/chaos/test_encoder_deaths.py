"""Encode workers in processes of their own, killed, stopped and cut off while they encode: each request ends in the
right answer, and no block of an embedding leaks."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
import signal
import time

import pytest

from tercet.core import Role
from tercet.errors import TercetError
from tests.chaos.test_deaths import Processes
from tests.helpers import spec_of
from tests.integration.test_images import answered, asked
from tests.unit.test_engine_images import Model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Model("qwen3-vl", tmp_path_factory.mktemp("model"))


@pytest.fixture(params=["shm", pytest.param("tcp", marks=pytest.mark.slow)])
async def made(request, model):
    changes = {"transfer__lease_s": 1.0, "transfer__heartbeat_s": 0.3, "transfer__transport": request.param}
    images = {"blocks": 128, "cache_bytes": 0}  # so that each image is encoded again
    source = str(model.directory)
    made = Processes(spec_of("epd", decoders=1, encoders=2, source=source, images=images, **changes))
    await made.start()
    yield made
    await made.stop()


numbers = itertools.count()


async def ask(made, request, answer):
    """-> whether it was answered; the answer is the right one."""
    try:
        fresh = dataclasses.replace(request, request_id=f"r{next(numbers)}", deadline=time.monotonic() + 60)
        tokens, done = await answered(made, fresh)
    except TercetError:
        return False
    assert tokens == answer
    assert dict(done.workers)["encode"]
    return True


async def restart(made, worker_id):
    """As the controller does with one that is dead."""
    await made.processes[worker_id].wait()
    await made.launch(Role.ENCODE, int(worker_id[-1]), epoch=made.infos[worker_id].epoch + 1)
    await made.announce()


async def test_encode_workers_die_and_requests_live(made, model):
    """One set of processes goes through all of it, as a long-lived cluster does."""
    await they_are_killed(made, model)
    await one_is_stopped_and_goes_on(made, model)
    await clients_go(made, model)
    await none_is_left(made, model)


async def they_are_killed(made, model):
    rng = random.Random(5)
    prompts = [asked(model, chosen, seed) for seed, chosen in enumerate(([0, 1], [2], [3, 1, 0], [1], [0, 2, 3, 1]))]
    for turn in range(4):
        victim = f"encode-{rng.randrange(2)}"
        running = [asyncio.create_task(ask(made, *rng.choice(prompts))) for _ in range(12)]
        await asyncio.sleep(rng.choice([0.0, 0.002, 0.01, 0.03, 0.06]))
        made.signal(victim, [signal.SIGKILL, signal.SIGSTOP][turn % 2])
        if turn % 2:  # what is not heard of for a lease is taken for dead, and killed by the controller
            await asyncio.sleep(1.5)
            made.signal(victim, signal.SIGKILL)
        assert all(await asyncio.gather(*running)), "another encode worker was there"
        await restart(made, victim)
        await made.all_free()


async def one_is_stopped_and_goes_on(made, model):
    """What it writes late lands nowhere that was given to another image meanwhile."""
    request, answer = asked(model, [0, 1, 2, 3], 7)
    for _ in range(2):
        running = [asyncio.create_task(ask(made, request, answer)) for _ in range(6)]
        await asyncio.sleep(0.01)
        made.signal("encode-0", signal.SIGSTOP)
        await asyncio.sleep(1.5)
        made.signal("encode-0", signal.SIGCONT)
        assert all(await asyncio.gather(*running))
        await made.announce()
    await made.all_free()


async def clients_go(made, model):
    request, answer = asked(model, [0, 1, 2], 3)
    for delay in (0.0, 0.001, 0.004, 0.01, 0.02, 0.04):
        task = asyncio.create_task(ask(made, request, answer))
        await asyncio.sleep(delay)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await made.all_free()


async def none_is_left(made, model):
    """Text goes on, and an image waits for one that comes."""
    for worker_id in ("encode-0", "encode-1"):
        made.signal(worker_id, signal.SIGKILL)
    waiting = asyncio.create_task(ask(made, *asked(model, [3, 2], 11)))  # which no prefix cache has
    await asyncio.sleep(0.5)
    request, _ = asked(model, [0])
    text = dataclasses.replace(request, images=(), request_id=f"r{next(numbers)}", token_ids=request.token_ids[:3])
    assert (await asyncio.wait_for(answered(made, text), 10))[0]  # which needs none, and does not wait
    assert not waiting.done()
    del made.infos["encode-1"]
    await restart(made, "encode-0")
    assert await waiting
    await made.all_free()
