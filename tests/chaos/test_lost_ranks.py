"""A rank whose experts have replicas is killed or stopped while it serves: no request fails or gets another answer, and
a new process takes its place."""

from __future__ import annotations

import asyncio
import functools
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from examples.make_tiny_model import Family, make
from tercet.core import Role
from tercet.spec import ParallelSpec
from tests.helpers import LocalCluster, cluster, spec_of, start_rank
from tests.tiny import VOCAB

LENGTHS, TOKENS, CLIENTS = (1, 2, 5, 17, 40, 64, 100, 130), 16, 5
NOTICED_S = {signal.SIGKILL: 3.0, signal.SIGSTOP: 6.5}


@functools.cache
def model(family: str) -> str:
    directory = Path(tempfile.mkdtemp(prefix="tercet-lost-"))
    make(Family(family), directory)
    return str(directory)


@functools.cache
def answers(family: str) -> list[tuple[list[int], list[int]]]:
    """Prompts, and what transformers generates."""
    oracle = AutoModelForCausalLM.from_pretrained(model(family), dtype=torch.float32).eval()
    made = []
    for length in LENGTHS:
        prompt = [(7 * i * i + 3 * i + length) % (VOCAB - 1) for i in range(length)]
        given = {"attention_mask": torch.ones(1, length, dtype=torch.int64), "max_new_tokens": TOKENS}
        out = oracle.generate(torch.tensor([prompt]), **given, do_sample=False, eos_token_id=None, pad_token_id=0)
        made.append((prompt, out[0, length:].tolist()))
    return made


class Clients:
    """They ask, one question after the other, until they are told to stop; whoever is not answered rightly raises."""

    def __init__(self, made: LocalCluster, family: str) -> None:
        self.answered, self._stop = 0, False
        self._tasks = [asyncio.create_task(self._ask(made, answers(family), number)) for number in range(CLIENTS)]

    async def _ask(self, made: LocalCluster, known: list[tuple[list[int], list[int]]], number: int) -> None:
        while not self._stop:
            prompt, wanted = known[number % len(known)]
            events, _ = await made.generate(prompt, max_tokens=TOKENS, ignore_eos=True, timeout_s=30.0)
            assert [event.token_id for event in events] == wanted
            self.answered, number = self.answered + 1, number + 3

    async def go_on(self, seconds: float, *, answered: bool = True) -> None:
        """answered: until something has been meanwhile, however slow the machine is."""
        before, deadline = self.answered, time.monotonic() + 30
        while True:
            await asyncio.wait(self._tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
            for task in self._tasks:
                if task.done():
                    task.result()
            if self.answered > before or not answered:
                return
            assert time.monotonic() < deadline, "no request was answered"

    async def stop(self) -> None:
        self._stop = True
        await asyncio.gather(*self._tasks)


async def attempts(made: LocalCluster, family: str) -> int:
    prompt, wanted = answers(family)[3]
    events, done = await made.generate(prompt, max_tokens=TOKENS, ignore_eos=True)
    assert [event.token_id for event in events] == wanted
    return done.attempts


@pytest.mark.parametrize(
    ("role", "family", "degrees", "number", "victims"),
    [
        (Role.AGGREGATED, "qwen3-moe", {"data": 3, "expert": 3, "expert_redundancy": 10}, signal.SIGKILL, (1, 2)),
        pytest.param(
            *(Role.PREFILL, "deepseek-v3", {"data": 2, "expert": 2, "expert_redundancy": 8}, signal.SIGSTOP, (1,)),
            marks=pytest.mark.slow,
        ),
        (Role.DECODE, "deepseek-v3", {"data": 3, "expert": 3, "expert_redundancy": 10}, signal.SIGKILL, (2,)),
        pytest.param(
            *(Role.DECODE, "qwen3-moe", {"data": 2, "expert": 2, "expert_redundancy": 8}, signal.SIGSTOP, (1,)),
            marks=pytest.mark.slow,
        ),
    ],
)
async def test_the_others_go_on_and_it_comes_back(role, family, degrees, number, victims):
    spec = spec_of("aggregated" if role is Role.AGGREGATED else "pd", decoders=1, source=model(family))
    grouped = spec.roles[role].model_copy(update={"parallelism": ParallelSpec(**degrees)})
    spec = spec.model_copy(update={"roles": spec.roles | {role: grouped}})
    name = f"{role.value}-0"
    async with cluster(spec) as made:
        worker, clients = made.workers[name], Clients(made, family)
        await clients.go_on(1.0)
        for victim in victims:
            process = made.ranks[name, victim]
            process.send_signal(number)
            await clients.go_on(NOTICED_S[number])
            assert worker.lost_ranks() == [victim]
            await made.announce(name)
            await clients.go_on(0.5)
            process.kill()
            process.wait()
            process.stdin.close()
            made.ranks[name, victim] = start_rank(name, victim, role, 1, spec, worker._group.endpoint)
            deadline = time.monotonic() + 60
            while worker.lost_ranks() and time.monotonic() < deadline:
                await clients.go_on(0.5, answered=False)
            assert worker.lost_ranks() == []
            await made.announce(name)
            await clients.go_on(1.0)
        await clients.stop()
        assert [await attempts(made, family) for _ in range(12)] == [1] * 12  # also those that go to a new rank


async def test_without_replicas_the_group_ends():
    spec = spec_of("aggregated", decoders=1, source=model("qwen3-moe"))
    grouped = spec.roles[Role.AGGREGATED].model_copy(update={"parallelism": ParallelSpec(data=2, expert=2)})
    spec = spec.model_copy(update={"roles": {Role.AGGREGATED: grouped}})
    made = LocalCluster(spec)
    await made.start()
    worker = made.workers["aggregated-0"]
    made.ranks["aggregated-0", 1].kill()
    deadline = time.monotonic() + 15
    while worker._group.broken is None and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    assert "rank 1 of the group is gone" in str(worker._group.broken)
    assert worker.lost_ranks() == []
    await made.stop()
