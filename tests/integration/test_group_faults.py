"""A group in which one rank errs: the group breaks, and says why."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tercet.core import Role
from tercet.distributed.line import Line, Rendezvous, join
from tercet.engine.runner import Runner
from tercet.errors import PeerMismatch, TercetError, WorkerLost
from tercet.roles import computing, group, rank
from tercet.roles.rank import Rank
from tercet.roles.worker import Worker
from tercet.spec import ClusterSpec
from tests.group_clusters import HEADS, Groups, aggregated, group_model, handing_over
from tests.helpers import TOKEN

# The engine's thread ends with what broke the group.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def _short_meetings(monkeypatch):
    """A meeting by gloo ends with a process, or after its time limit; here a process is that of all ranks."""
    monkeypatch.setattr(group, "COLLECTIVE_S", 2.0)


@contextlib.asynccontextmanager
async def broken(spec: ClusterSpec, kind: type[Groups] = Groups) -> AsyncIterator[Groups]:
    """What a dead worker holds is not looked at."""
    made = kind(spec)
    try:
        yield made
    finally:
        await made.stop()


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


@pytest.mark.usefixtures("_short_meetings")
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


@contextlib.contextmanager
def held(steps: Runner, monkeypatch) -> Iterator[threading.Event]:
    """What this runner launches waits until the end. -> set once it does."""
    waits, end, launch = threading.Event(), threading.Event(), steps.launch

    def hold(plan):
        waits.set()
        end.wait()
        return launch(plan)

    monkeypatch.setattr(steps, "launch", hold)
    yield waits
    end.set()


@pytest.mark.parametrize(("shape", "kernels"), [((2, 1), "native"), ((2, 1), "torch"), ((1, 2), "torch")])
async def test_rank_0_stops_though_a_rank_dies_that_its_step_waits_for(shape, kernels, monkeypatch):
    monkeypatch.setattr(computing, "STOP_S", 60.0)
    async with broken(aggregated(shape, kernels, limits__retries=0)) as made:
        await made.start()
        other, worker = made.members[0], made.workers["aggregated-0"]
        with held(other._runner, monkeypatch) as waits:
            asking = asyncio.create_task(made.generate([1, 2, 3], max_tokens=4))
            await asyncio.to_thread(waits.wait)
            stopping = asyncio.create_task(worker.stop())
            while not worker._group._closing:
                await asyncio.sleep(0.01)
            other._stopped.set()
            other._talk.close()
            async with asyncio.timeout(20):
                await stopping
        await asyncio.gather(asking, return_exceptions=True)


@pytest.mark.parametrize(("shape", "kernels"), [((2, 1), "native"), ((2, 1), "torch"), ((1, 2), "torch")])
async def test_a_rank_stops_though_its_step_waits_for_rank_0(shape, kernels, monkeypatch):
    monkeypatch.setattr(rank, "STOP_S", 60.0)
    async with broken(aggregated(shape, kernels, limits__retries=0)) as made:
        await made.start()
        with held(made.workers["aggregated-0"].engine._executor._runner, monkeypatch) as waits:
            asking = asyncio.create_task(made.generate([1, 2, 3], max_tokens=4))
            await asyncio.to_thread(waits.wait)
            async with asyncio.timeout(20):
                await made.members.pop().stop()
        await asyncio.gather(asking, return_exceptions=True)


def shared() -> int:
    """Descriptors of memory for ranks."""
    return sum("tercet-ranks" in os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink())


async def test_a_start_that_fails_holds_no_memory_for_ranks(monkeypatch):
    def gone(*_):
        raise WorkerLost("rank 1 of the group is gone")

    monkeypatch.setattr(Line, "send_fd", gone)
    worker, before = Worker("aggregated-0", Role.AGGREGATED, 1, aggregated((2, 1)), "127.0.0.1", TOKEN), shared()
    endpoint = await worker.listen()
    starting = asyncio.create_task(worker.start())
    line = await asyncio.to_thread(join, endpoint, 1, TOKEN, 10.0)
    line.send("here", "")
    with pytest.raises(WorkerLost, match="rank 1 of the group is gone"):
        await starting
    assert shared() == before
    line.dispose()
    worker._group.close()


@pytest.mark.usefixtures("_short_meetings")
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
        lines[1].send("placed", 0, b"", [])
    lines[1].dispose()
    meeting.close()
    async with asyncio.timeout(10):
        with pytest.raises(WorkerLost):
            await starting
    assert bool(ended) == (at == "set up")
