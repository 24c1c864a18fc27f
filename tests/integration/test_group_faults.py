"""A group in which one rank errs: the group breaks, and says why."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator

import pytest

from tercet.core import Role
from tercet.distributed.line import Line, Rendezvous, join
from tercet.errors import PeerMismatch, TercetError, WorkerLost
from tercet.roles import group, rank
from tercet.roles.rank import Rank
from tercet.roles.worker import Worker
from tercet.spec import ClusterSpec
from tests.group_clusters import HEADS, Groups, aggregated, group_model, handing_over
from tests.helpers import TOKEN

# The engine's thread ends with what broke the group.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture(autouse=True)
def _short_collectives(monkeypatch):
    """A sum by gloo ends with a process, or after its time limit; here all ranks share a process, which lives on."""
    monkeypatch.setattr(group, "COLLECTIVE_S", 2.0)


@contextlib.asynccontextmanager
async def broken(spec: ClusterSpec, kind: type[Groups] = Groups) -> AsyncIterator[Groups]:
    """What a dead worker holds is not looked at."""
    made = kind(spec)
    try:
        yield made
    finally:
        await made.stop()
        for thread in threading.enumerate():
            if thread.name == "rank-steps":  # inside a library it would not survive the end of this process
                thread.join(5)


async def assert_ends(made: Groups, match: str) -> None:
    """A request under way at once, and with it the worker."""
    began = time.monotonic()
    with pytest.raises(WorkerLost, match=match):
        await made.generate([1, 2, 3], max_tokens=4, ignore_eos=True, timeout_s=10.0)
    assert time.monotonic() - began < 2.0
    with pytest.raises(TercetError, match=match):
        await made.workers["aggregated-0"].health()


SHAPES = [(2, 1), (1, 2), (2, 2)]


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_step_out_of_order_breaks_the_group_with_both_numbers(shape):
    async with broken(aggregated(shape, limits__retries=0)) as made:
        await made.start()
        await made.generate([5, 6], max_tokens=1, ignore_eos=True)
        made.workers["aggregated-0"].engine._executor._number += 1  # as if a step had been lost
        await assert_ends(made, r"rank \d is behind step 1, and rank 0 sent step 3")


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("shape", SHAPES)
async def test_a_step_that_raises_on_another_rank_breaks_the_group(shape, kernels):
    def launch(_):
        raise ArithmeticError("no such number")

    async with broken(aggregated(shape, kernels, limits__retries=0)) as made:
        await made.start()
        made.members[-1]._runner.launch = launch
        last = shape[0] * shape[1] - 1
        await assert_ends(made, f"step 1 failed on rank {last}: ArithmeticError: no such number")


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_step_that_raises_on_rank_0_breaks_the_group(shape):
    def launch(_):
        raise ArithmeticError("no such number")

    async with broken(aggregated(shape, limits__retries=0)) as made:
        await made.start()
        made.workers["aggregated-0"].engine._executor._runner.launch = launch
        await assert_ends(made, "no such number")


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_group_that_breaks_while_it_hands_over_frees_the_blocks_of_its_peer(role):
    async with broken(handing_over((2, 1), (2, 1), limits__retries=0)) as made:
        await made.start()
        await made.generate([5, 6], max_tokens=2, ignore_eos=True)
        made.workers[f"{role}-0"].engine._executor._number += 1
        with pytest.raises(TercetError, match="behind step"):
            await made.generate(range(40, 140), max_tokens=4, ignore_eos=True, timeout_s=10.0)
        other = made.workers["decode-0" if role == "prefill" else "prefill-0"].legs
        async with asyncio.timeout(5):
            while other.load().blocks_free < other.load().blocks_total:
                await asyncio.sleep(0.02)


class OfOtherWeights(Groups):
    def _start_rank(self, name: str, number: int, role: Role, endpoint: str) -> None:
        model = self.spec.model.model_copy(update={"source": group_model(HEADS, seed=12)})
        spec = self.spec.model_copy(update={"model": model})
        member = Rank(name, number, role, 1, spec, "127.0.0.1", TOKEN, (), lambda _: None)
        self.members.append(member)
        self.joining.append(asyncio.create_task(member.start(endpoint)))


async def test_other_weights_at_a_rank_are_refused_at_the_start():
    made = OfOtherWeights(aggregated((2, 1)))
    with pytest.raises(PeerMismatch, match=r"rank 1 has other weights \(\w{12}\) than rank 0 \(\w{12}\)"):
        await made.start()
    made.workers["aggregated-0"]._group.close()
    await made.members[0].stop()
    await made.router.close()


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
async def test_a_rank_that_dies_while_the_group_starts_ends_the_start(shape):
    spec = aggregated(shape)
    worker = Worker("aggregated-0", Role.AGGREGATED, 1, spec, "127.0.0.1", TOKEN)
    endpoint = await worker.listen()
    starting = asyncio.create_task(worker.start())
    line = await asyncio.to_thread(join, endpoint, 1, TOKEN, 10.0)
    line.send("here", "")
    assert (await asyncio.to_thread(line.receive))[0] == "setup"
    line.dispose()
    async with asyncio.timeout(5):
        with pytest.raises(WorkerLost, match=r"rank 1 of the group is gone|did not meet the others"):
            await starting
    worker._group.close()


def assert_let_go(line: Line) -> None:
    line.settimeout(5)
    with pytest.raises(WorkerLost, match=r"closed|reset"):
        line.receive()
    line.dispose()


async def test_a_start_that_fails_lets_every_rank_go():
    """Also those that have done nothing wrong."""
    worker = Worker("aggregated-0", Role.AGGREGATED, 1, aggregated((1, 3)), "127.0.0.1", TOKEN)
    endpoint = await worker.listen()
    starting = asyncio.create_task(worker.start())
    lines = [await asyncio.to_thread(join, endpoint, rank, TOKEN, 10.0) for rank in (1, 2)]
    lines[0].send("here", "")
    lines[1].send("there")
    async with asyncio.timeout(5):
        with pytest.raises(WorkerLost, match=r"rank 2 said .*there.* where it should say that it is here"):
            await starting
    for line in lines:
        await asyncio.to_thread(assert_let_go, line)
    worker._group.close()


async def test_a_rank_that_cannot_set_up_lets_rank_0_go(monkeypatch):
    def no_setup(*_):
        raise WorkerLost("no socket is left")

    monkeypatch.setattr(rank, "setup_of", no_setup)
    made = Rank("aggregated-0", 1, Role.AGGREGATED, 1, aggregated((1, 2)), "127.0.0.1", TOKEN, (), lambda _: None)
    meeting = Rendezvous("127.0.0.1", TOKEN)
    starting = asyncio.create_task(made.start(meeting.endpoint))
    lines = await asyncio.to_thread(meeting.joined, [1], time.monotonic() + 10, lambda: False)
    with pytest.raises(WorkerLost, match="no socket is left"):
        await starting
    await asyncio.to_thread(assert_let_go, lines[1])
    meeting.close()


@pytest.mark.parametrize("at", ["joined", "set up"])
async def test_rank_0_that_dies_while_the_group_starts_ends_the_start_of_the_others(at):
    ended: list[WorkerLost] = []
    spec = aggregated((1, 2))
    made = Rank("aggregated-0", 1, Role.AGGREGATED, 1, spec, "127.0.0.1", TOKEN, (), ended.append)
    meeting = Rendezvous("127.0.0.1", TOKEN)
    starting = asyncio.create_task(made.start(meeting.endpoint))
    lines = await asyncio.to_thread(meeting.joined, [1], time.monotonic() + 10, lambda: False)
    if at == "set up":
        lines[1].send("setup", "127.0.0.1:1", (0, 1), 2, (), False)
    lines[1].dispose()
    meeting.close()
    async with asyncio.timeout(10):
        with pytest.raises(WorkerLost):
            await starting
    assert bool(ended) == (at == "set up")
