"""Real workers change their roles under load: every answer is the one from before, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import pytest

from tercet.core import Role, SamplingParams, Ticket
from tercet.engine.sequence import Sequence
from tercet.errors import UnsupportedSpec, WorkerLost
from tercet.models.vision.prompt import image_digest
from tercet.roles import computing, worker
from tercet.spec import KvSpec
from tests.helpers import TOKEN, LocalCluster, cluster, spec_of
from tests.integration.test_images import answered, asked
from tests.tiny import VOCAB, tiny_model
from tests.unit.test_engine_images import Model

rng = random.Random(19)
PROMPTS = [[rng.randrange(VOCAB) for _ in range(n)] for n in (1, 15, 16, 17, 40, 64, 90, 120)]
TOKENS = 40


class Load:
    """Clients that ask again and again. ask(number) raises unless the answer is right; -> attempts, workers."""

    def __init__(self, ask: Callable[[int], Awaitable[tuple[int, set[str]]]], clients: int = 24) -> None:
        self._ask, self._clients = ask, clients
        self.answers = self.moved = 0
        self.used: set[str] = set()

    async def __aenter__(self) -> Load:
        self._tasks = [asyncio.create_task(self._go_on(n)) for n in range(self._clients)]
        await self.some()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._raise_faults()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _go_on(self, number: int) -> None:
        while True:
            number += 1
            attempts, workers = await self._ask(number)
            self.answers += 1
            self.moved += attempts > 1
            self.used |= workers

    async def some(self, more: int = 48) -> None:
        """Let so many requests end."""
        until = self.answers + more
        while self.answers < until:
            self._raise_faults()
            await asyncio.sleep(0.01)

    async def uses(self, name: str) -> None:
        self.used.clear()
        while name not in self.used:
            await self.some(4)

    def _raise_faults(self) -> None:
        for task in self._tasks:
            if task.done():
                task.result()


_wanted: list[list[int]] = []


async def wanted() -> list[list[int]]:
    """What one worker alone answers."""
    if not _wanted:
        async with cluster(spec_of("aggregated", decoders=1, source=tiny_model())) as made:
            for prompt in PROMPTS:
                tokens, _ = await made.generate(prompt, max_tokens=TOKENS, ignore_eos=True)
                _wanted.append([token.token_id for token in tokens])
    return _wanted


async def text_load(made: LocalCluster) -> Load:
    expected = await wanted()

    async def ask(number: int) -> tuple[int, set[str]]:
        number %= len(PROMPTS)
        tokens, done = await made.generate(PROMPTS[number], max_tokens=TOKENS, ignore_eos=True)
        assert [token.token_id for token in tokens] == expected[number]
        return done.attempts, {worker_id for _, worker_id in done.workers}

    return Load(ask)


def ends_with_legs(made: LocalCluster) -> list[str]:
    """Workers whose streams end before the router has heard of the end of each leg there."""
    found, decisions = [], made.router._decisions
    real = decisions.on_down

    def on_down(view, fault, now):
        found.extend([view.info.worker_id] * view.legs)
        return real(view, fault, now)

    decisions.on_down = on_down
    return found


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_prefill_and_decode_workers_change_sides_under_load(transport):
    """What has not ended when a worker drains goes on elsewhere, and is taken for nobody's fault."""
    spec = spec_of("pd", prefills=2, decoders=2, source=tiny_model(), transfer__transport=transport)
    changes = ("prefill-0", Role.DECODE), ("decode-0", Role.PREFILL), ("prefill-0", Role.PREFILL)
    async with cluster(spec) as made, await text_load(made) as load:
        cut_off = ends_with_legs(made)
        for name, role in (*changes, ("decode-0", Role.DECODE), *changes):
            epoch = made.infos[name].epoch
            info = await made.switch(name, role, drain_s=0.0)
            assert (info.role, info.epoch, info.pid) == (role, epoch + 1, os.getpid())
            await load.uses(name)
        assert load.moved > 8
        assert cut_off == []
        assert [info.role for _, info in sorted(made.infos.items())] == ["prefill", "decode", "prefill", "prefill"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Model("idefics3", tmp_path_factory.mktemp("model"))


async def test_encode_and_prefill_workers_change_sides_under_load(model):
    """The weights that a worker lacks are read in its process; those that it has are kept."""
    pictures = [asked(model, chosen, seed) for seed, chosen in enumerate(([0], [1, 3, 0], [2], [0, 2], [3, 3]))]
    spec = spec_of("epd", encoders=2, prefills=2, decoders=1, source=str(model.directory), kv__block_size=8)

    async with cluster(spec) as made:

        async def ask(number: int) -> tuple[int, set[str]]:
            request, answer = pictures[number % len(pictures)]
            salt = f"{number // 2}"  # or every picture would be at some worker, and go to no other one
            images = tuple(replace(image, digest=image_digest(image.content, salt)) for image in request.images)
            tokens, done = await answered(made, replace(request, images=images, deadline=time.monotonic() + 60))
            assert tokens == answer
            return done.attempts, {worker_id for _, worker_id in done.workers}

        async with Load(ask) as load:
            for name, role in (("encode-0", Role.PREFILL), ("prefill-0", Role.ENCODE), ("encode-0", Role.ENCODE)):
                await made.switch(name, role, drain_s=0.0)
                await load.uses(name)
            assert load.moved > 0


@contextlib.asynccontextmanager
async def alone(role: Role, cores: tuple[int, ...] = (), **decode: object) -> AsyncIterator[worker.Worker]:
    """One worker, started. decode: what the spec says of the other role."""
    spec = spec_of(source=tiny_model())
    roles = spec.roles | {Role.DECODE: spec.roles[Role.DECODE].model_copy(update=decode)}
    made = worker.Worker("w", role, 1, spec.model_copy(update={"roles": roles}), "127.0.0.1", TOKEN, cores=cores)
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


async def test_nothing_of_the_old_role_is_left(monkeypatch):
    """Memory before the new role's is taken, threads and files; and the weights are read once."""
    loads, caches, counts = [], [], []
    real_load, real_region = worker.load_model, computing.region_of
    monkeypatch.setattr(worker, "load_model", lambda *args, **more: loads.append(args) or real_load(*args, **more))

    def region_of(*args):
        assert sum(os.fstat(cache).st_blocks for cache in caches) == 0, "two caches at once"
        made = real_region(*args)
        caches.append(os.dup(made.fd))
        assert os.fstat(made.fd).st_blocks > 0
        return made

    monkeypatch.setattr(computing, "region_of", region_of)
    async with alone(Role.PREFILL, kv=KvSpec(blocks=300)) as made:
        for epoch in range(2, 8):
            gc.disable()
            before, role = weakref.ref(made.engine), Role.DECODE if epoch % 2 else Role.PREFILL
            info = await made.switch(role, epoch)
            assert (info.epoch, info.role, list(made.legs.handlers)) == (epoch, role, [role])
            assert made.engine.load().blocks_total == (300 if role is Role.DECODE else 256)
            assert before() is None, "on a device it would hold the cache"
            gc.enable()
            gc.collect()
            pooled = [thread for thread in threading.enumerate() if thread.name.startswith("asyncio_")]  # bounded
            files = len(os.listdir("/proc/self/fd")) - len(caches)
            counts.append((files, threading.active_count() - len(pooled)))
    assert counts[-2:] == counts[:2], counts
    assert len(loads) == 1
    for cache in caches:
        os.close(cache)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
async def test_who_computes_moves_to_the_cores_of_the_new_role():
    one, other = sorted(os.sched_getaffinity(0))[:2]
    async with alone(Role.PREFILL, (one,), threads=2) as made:
        for epoch, core, gone in ((2, one, other), (3, other, one)):
            await made.switch(Role.DECODE, epoch, [core])
            async with asyncio.timeout(5):  # each engine does it as it begins
                while _pinned_to(gone) or _pinned_to(core) < 2:  # itself and a helper
                    await asyncio.sleep(0.01)


def _pinned_to(core: int) -> int:
    """Threads of this process."""
    found = 0
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it ends while we look
            found += os.sched_getaffinity(int(thread)) == {core}
    return found


async def test_a_role_that_does_not_fit_is_refused_by_name():
    async with alone(Role.PREFILL, kv=KvSpec(blocks=2**40)) as made:
        with pytest.raises(UnsupportedSpec, match=r"the model does not fit: .* \(kv.blocks 1099511627776\)"):
            await made.switch(Role.DECODE, 2)


async def test_memory_that_others_may_write_to_is_not_given_up(monkeypatch):
    monkeypatch.setattr(worker, "QUIET_S", 0.1)
    async with alone(Role.DECODE) as made:
        sequence = Sequence(Ticket("r", 0, 1), [1] * 20, 20, SamplingParams())
        made.engine.reserve(sequence)
        made.engine.quarantine(sequence)
        with pytest.raises(WorkerLost, match="w: peers may still write to its memory"):
            await made.switch(Role.PREFILL, 2)
        made.engine.release(sequence)
        made._server._service.streams += 1
        with pytest.raises(WorkerLost, match="w: the gateway may still wait for the ends of legs"):
            await made.switch(Role.PREFILL, 2)
        made._server._service.streams -= 1
        await made.switch(Role.PREFILL, 2)
    monkeypatch.setattr(worker, "in_device_memory", lambda transport: True)
    async with alone(Role.DECODE) as made:
        with pytest.raises(WorkerLost, match="w: its KV is in memory of a GPU that ends with the process"):
            await made.switch(Role.PREFILL, 2)
