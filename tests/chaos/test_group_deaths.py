"""Ranks in processes of their own, killed and stopped in each phase of a request: it ends in the right answer on the
other group or in a named error, the group ends as one, and the other groups leak no block."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator

import pytest

from tercet.core import Done, Role, TokenEvent, WorkerInfo
from tercet.errors import TercetError
from tests.chaos.test_deaths import Processes
from tests.group_clusters import ALONE, aggregated, groups, handing_over
from tests.group_process import LINGER_S
from tests.helpers import TOKEN, request_of, start_rank
from tests.tiny import VOCAB

rng = random.Random(9)
LONG = 1200  # tokens of a prompt that takes some tenths of a second
TOKENS = 60
LEASE = {"transfer__lease_s": 2.0, "transfer__heartbeat_s": 0.5}
ENDS_S = {signal.SIGKILL: 5.0, signal.SIGSTOP: 8.0}  # at once, and after 3 s of silence; generous, for a busy machine


class GroupProcesses(Processes):
    """Of workers of two ranks each."""

    async def launch(self, role: Role, number: int, epoch: int = 1) -> None:
        worker_id = f"{role.value}-{number}"
        process = self.processes[worker_id] = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.group_process",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        order = [worker_id, role.value, epoch, self.spec.model_dump_json(), TOKEN]
        process.stdin.write(json.dumps(order).encode() + b"\n")
        endpoint = json.loads(await asyncio.wait_for(process.stdout.readline(), 60))
        self.ranks[worker_id, 1] = start_rank(worker_id, 1, role, epoch, self.spec, endpoint)
        info = json.loads(await asyncio.wait_for(process.stdout.readline(), 60))
        self.infos[worker_id] = WorkerInfo(**(info | {"role": Role(info["role"])}))

    def signal_rank(self, worker_id: str, rank: int, number: int) -> None:
        (self.processes[worker_id] if rank == 0 else self.ranks[worker_id, rank]).send_signal(number)

    async def ended(self, worker_id: str) -> None:
        """Both ranks' processes; one that is stopped is killed, as the controller does."""
        for number in (signal.SIGKILL, signal.SIGCONT):
            for rank in (0, 1):
                if self.alive(worker_id, rank):
                    self.signal_rank(worker_id, rank, number)
        await self.processes[worker_id].wait()
        await self._forget(worker_id)

    async def _forget(self, worker_id: str) -> None:
        process = self.ranks.pop((worker_id, 1))
        await asyncio.to_thread(process.wait, 10)
        process.stdin.close()

    def alive(self, worker_id: str, rank: int) -> bool:
        if rank == 0:
            return self.processes[worker_id].returncode is None
        return self.ranks[worker_id, rank].poll() is None

    async def restart(self, worker_id: str) -> None:
        """As the controller does with a group of which a rank is dead."""
        await self.ended(worker_id)
        info = self.infos[worker_id]
        await self.launch(info.role, int(worker_id[-1]), info.epoch + 1)
        await self.announce()

    async def stop(self) -> None:
        await super().stop()
        for (worker_id, _), process in list(self.ranks.items()):
            process.kill()
            await self._forget(worker_id)


def prompt_of(length: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(length)]


@pytest.fixture(scope="module")
def answered() -> dict[tuple[int, ...], list[int]]:
    """Prompt -> its answer, by one worker of one rank."""

    async def run() -> dict[tuple[int, ...], list[int]]:
        prompts = [prompt_of(length) for length in (LONG, 30, 500, 2) * 16]
        async with groups(aggregated(ALONE, kv__blocks=512)) as made:
            found = await asyncio.gather(*(made.generate(p, max_tokens=TOKENS, ignore_eos=True) for p in prompts))
        return {tuple(p): [e.token_id for e in events] for p, (events, _) in zip(prompts, found, strict=True)}

    return asyncio.run(run())


@pytest.fixture(params=[("shm", 3), pytest.param(("tcp", 0), marks=pytest.mark.slow)], ids=["shm, retried", "tcp"])
async def made(request) -> AsyncIterator[GroupProcesses]:
    transport, retries = request.param
    changes = {"decoders": 2, "scheduler__token_budget": 32, "transfer__transport": transport}
    made = GroupProcesses(handing_over((2, 1), (2, 1), limits__retries=retries, **changes, **LEASE))
    await made.start()
    yield made
    await made.stop()


class Asking:
    """Requests under way, and what came of each."""

    def __init__(self, made: GroupProcesses, prompts: list[tuple[int, ...]]) -> None:
        self.made, self.drawn = made, 0
        self.tasks = {prompt: asyncio.create_task(self._ask(prompt)) for prompt in prompts}

    async def _ask(self, prompt: tuple[int, ...]) -> tuple[list[int], Done] | TercetError:
        request, tokens = request_of(prompt, max_tokens=TOKENS, ignore_eos=True, timeout_s=25.0), []
        try:
            async for event in self.made.router.generate(request):
                if isinstance(event, TokenEvent):
                    tokens.append(event.token_id)
                    self.drawn += 1
        except TercetError as error:
            return error
        assert isinstance(event, Done)
        return tokens, event

    async def reach(self, phase: str) -> None:
        """computing, writing: some steps of a long prompt are done. decoding: tokens come."""
        if phase == "decoding":
            async with asyncio.timeout(20):
                while self.drawn < 4 * len(self.tasks):
                    await asyncio.sleep(0.002)
        else:
            await asyncio.sleep({"computing": 0.04, "writing": 0.15}[phase])

    def victim(self, role: str) -> str:
        """A worker of that role that has a request, if any has."""
        for running in self.made.router._decisions._running.values():
            if (attempt := running.attempt) is not None:
                return (attempt.plan.prefill if role == "prefill" else attempt.plan.decode).info.worker_id
        return f"{role}-0"


DEATHS = {  # by transport: role, rank, signal, phase
    "shm": [
        ("decode", 1, signal.SIGKILL, "decoding"),
        ("prefill", 1, signal.SIGSTOP, "writing"),
        ("decode", 0, signal.SIGSTOP, "writing"),
        ("prefill", 0, signal.SIGKILL, "computing"),
    ],
    "tcp": [
        ("prefill", 1, signal.SIGKILL, "computing"),
        ("decode", 1, signal.SIGSTOP, "decoding"),
        ("prefill", 0, signal.SIGSTOP, "writing"),
        ("decode", 0, signal.SIGKILL, "writing"),
    ],
}


async def dies(made: GroupProcesses, answered, prompts, role, rank, number, phase) -> None:
    asking = Asking(made, prompts)
    await asking.reach(phase)
    victim, began = asking.victim(role), time.monotonic()
    made.signal_rank(victim, rank, number)
    most = 11.0 if (rank, number) == (0, signal.SIGSTOP) else ENDS_S[number]  # then the router notices its silence
    if made.spec.limits.retries == 0:
        hurt = [task for task in asking.tasks.values() if not task.done()]
        await asyncio.wait(hurt, timeout=most + 0.5)
        assert all(task.done() for task in hurt), f"{victim} rank {rank}, {number!r} while {phase}"
    while made.alive(victim, 1 - rank) and time.monotonic() < began + most + LINGER_S + 1:
        await asyncio.sleep(0.05)
    assert not made.alive(victim, 1 - rank), "the other rank outlives its group"
    await made.restart(victim)
    results = await asyncio.gather(*asking.tasks.values())
    for prompt, result in zip(asking.tasks, results, strict=True):
        assert isinstance(result, TercetError) or result[0] == answered[prompt]
    if made.spec.limits.retries and role == "decode":
        assert not [result for result in results if isinstance(result, TercetError)], "another group was there"
    await made.all_free()


async def clients_go(made: GroupProcesses, prompts) -> None:
    for prompt in prompts:
        asking = Asking(made, [prompt])
        await asyncio.sleep(rng.random() * 0.3)
        asking.tasks[prompt].cancel()
        await asyncio.gather(asking.tasks[prompt], return_exceptions=True)
    await made.all_free()


@pytest.mark.timeout(300)
async def test_ranks_die_and_requests_live(made, answered):
    """One set of processes goes through all of it, as a long-lived cluster does."""
    prompts = list(answered)
    for at, death in enumerate(DEATHS[made.spec.transfer.transport]):
        await dies(made, answered, prompts[4 * at : 4 * at + 4], *death)
    await clients_go(made, prompts[40:56])
    last = Asking(made, prompts[60:])
    assert [(await task)[0] for task in last.tasks.values()] == [answered[prompt] for prompt in prompts[60:]]
    await made.all_free()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_rank_dies_in_every_phase(made, answered, role, rank):
    prompts = list(answered)
    deaths = itertools.product((signal.SIGKILL, signal.SIGSTOP), ("computing", "writing", "decoding"))
    for at, (number, phase) in enumerate(deaths):
        await dies(made, answered, prompts[4 * at : 4 * at + 4], role, rank, number, phase)
