"""Real worker processes, really killed and stopped, while requests run through them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from tercet.core import Done, Role, TokenEvent, WorkerInfo
from tercet.errors import NoWorkers
from tercet.roles.router.router import Router
from tests.helpers import TOKEN, LocalCluster, next_token, request_of, spec_of

PROMPT = [(7 * n) % 30000 + 100 for n in range(40)]
LONG = [(11 * n) % 30000 + 100 for n in range(800)]


class Processes(LocalCluster):
    """The cluster of tests/helpers.py with each worker in its own process."""

    async def start(self) -> None:
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        self.infos: dict[str, WorkerInfo] = {}
        names = [(role, n) for role, spec in self.spec.roles.items() for n in range(spec.replicas)]
        await asyncio.gather(*(self.launch(role, n) for role, n in names))
        await self.announce()

    async def launch(self, role: Role, number: int, epoch: int = 1) -> None:
        worker_id = f"{role.value}-{number}"
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.worker_process",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        order = [worker_id, role.value, epoch, self.spec.model_dump_json(), TOKEN]
        process.stdin.write(json.dumps(order).encode() + b"\n")
        line = await asyncio.wait_for(process.stdout.readline(), 150)
        info = json.loads(line)
        self.processes[worker_id] = process
        self.infos[worker_id] = WorkerInfo(**(info | {"role": Role(info["role"])}))

    async def announce(self) -> None:
        await self.router.set_workers(list(self.infos.values()))
        async with asyncio.timeout(20):
            while self.router.missing_roles() or len(self.router.loads()) < len(self.infos):
                await asyncio.sleep(0.01)

    def signal(self, worker_id: str, number: int) -> None:
        os.kill(self.infos[worker_id].pid, number)

    async def stop(self) -> None:
        await self.router.close()
        for process in self.processes.values():
            if process.returncode is None:
                process.send_signal(signal.SIGCONT)
                assert process.stdin is not None
                process.stdin.close()
        await asyncio.gather(*(asyncio.wait_for(p.wait(), 30) for p in self.processes.values()))

    async def all_free(self, *, timeout_s: float = 15.0) -> None:
        """Every worker that lives reports all its blocks free."""
        loads = {}
        async with asyncio.timeout(timeout_s):
            while True:
                loads = self.router.loads()
                if loads and all(
                    load.blocks_free == load.blocks_total and load.embedding_blocks_free == load.embedding_blocks_total
                    for load in loads.values()
                ):
                    return
                await asyncio.sleep(0.1)


@pytest.fixture(params=["shm", "tcp"])
async def made(request) -> AsyncIterator[Processes]:
    lease = {"transfer__lease_s": 2.0, "transfer__heartbeat_s": 0.5}
    made = Processes(spec_of("pd", prefills=2, transfer__transport=request.param, **lease))
    await made.start()
    yield made
    await made.stop()


async def collect(stream) -> tuple[list[int], Done]:
    events = [e async for e in stream]
    return [e.token_id for e in events if isinstance(e, TokenEvent)], events[-1]


async def kill_in_mid_stream(made: Processes, expected: list[int]) -> None:
    """SIGKILL the worker that decodes; the stream goes on elsewhere without a lost or repeated token."""
    stream = made.router.generate(request_of(PROMPT, max_tokens=24, ignore_eos=True, temperature=0.8, seed=3))
    tokens = [await next_token(stream) for _ in range(6)]
    attempt = next(iter(made.router._decisions._running.values())).attempt
    victim = attempt.plan.decode.info.worker_id
    made.signal(victim, signal.SIGKILL)
    rest, done = await collect(stream)
    assert tokens + rest == expected
    assert done.attempts == 2
    assert dict(done.workers)["decode"] != victim
    await made.launch(Role.DECODE, int(victim[-1]), epoch=2)


async def under_way(made) -> None:
    """Until a handover has blocks at its decode worker, and some time for its prompt to be computed."""
    while not any(load.blocks_leased for load in made.router.loads().values()):
        await asyncio.sleep(0.02)
    await asyncio.sleep(0.3)


async def test_workers_die_and_requests_live(made):
    """One set of processes goes through every death in turn, as a long-lived cluster does."""
    options = {"max_tokens": 24, "ignore_eos": True, "temperature": 0.8, "seed": 3}
    expected, _ = await collect(made.router.generate(request_of(PROMPT, **options)))
    await kill_in_mid_stream(made, expected)
    await made.announce()
    await made.all_free()

    # SIGKILL of a prefill worker in the middle of a long prompt: retried on the other one.
    task = asyncio.create_task(collect(made.router.generate(request_of(LONG[5:], max_tokens=4))))
    await under_way(made)
    attempt = next(iter(made.router._decisions._running.values())).attempt
    victim = attempt.plan.prefill.info.worker_id
    made.signal(victim, signal.SIGKILL)
    tokens, done = await task
    assert len(tokens) == 4
    assert done.attempts == 2
    assert dict(done.workers)["prefill"] != victim
    del made.infos[victim]
    await made.announce()
    await made.all_free()

    # SIGSTOP of the last prefill worker while it writes: the blocks that it may still write into are not reused until
    # it is proven harmless. Continued, it answers the ABORT, and nothing leaks.
    survivor = next(w for w in made.infos if w.startswith("prefill"))
    stream = made.router.generate(request_of(LONG[9:], max_tokens=4))
    task = asyncio.create_task(collect(stream))
    await under_way(made)
    made.signal(survivor, signal.SIGSTOP)
    await asyncio.sleep(3.5)  # longer than the lease
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    if made.spec.transfer.transport == "shm":
        quarantined = [load.blocks_quarantined for load in made.router.loads().values()]
        assert sum(quarantined) > 0
    made.signal(survivor, signal.SIGCONT)
    await asyncio.sleep(1.0)
    await made.announce()
    await made.all_free()
    assert (await collect(made.router.generate(request_of(PROMPT, **options))))[0] == expected


async def test_a_stopped_writer_that_dies_frees_its_quarantine():
    lease = {"transfer__lease_s": 1.0, "transfer__heartbeat_s": 0.3}
    made = Processes(spec_of("pd", decoders=1, transfer__transport="shm", **lease))
    await made.start()
    try:
        task = asyncio.create_task(collect(made.router.generate(request_of(LONG, max_tokens=4))))
        await under_way(made)
        made.signal("prefill-0", signal.SIGSTOP)
        await asyncio.sleep(2.5)
        assert made.router.loads()["decode-0"].blocks_quarantined > 0
        made.signal("prefill-0", signal.SIGKILL)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await made.all_free()
        # The survivor serves a new incarnation without a restart of its own.
        await made.launch(Role.PREFILL, 0, epoch=2)
        await made.announce()
        tokens, _ = await collect(made.router.generate(request_of(PROMPT, max_tokens=3, ignore_eos=True)))
        assert len(tokens) == 3
    finally:
        await made.stop()


async def test_a_request_without_workers_ends_in_an_error():
    spec = spec_of("pd")
    spec = spec.model_copy(update={"limits": spec.limits.model_copy(update={"worker_wait_s": 0.5})})
    router = Router(spec, TOKEN)
    started = time.monotonic()
    with pytest.raises(NoWorkers, match="prefill, decode"):
        await collect(router.generate(request_of(PROMPT)))
    assert time.monotonic() - started < 30
    unreachable = WorkerInfo("decode-0", Role.DECODE, 1, "127.0.0.1:1", "", "")
    await router.set_workers([unreachable, replace(unreachable, worker_id="prefill-0", role=Role.PREFILL)])
    with pytest.raises(NoWorkers):
        await collect(router.generate(request_of(PROMPT)))
    await router.close()
