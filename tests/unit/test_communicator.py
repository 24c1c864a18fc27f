"""Sums and gathers between processes that share memory: right, with the same bits everywhere, and never stuck."""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as done
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tercet.distributed.collectives import Alone, Collectives, HostCollectives, TorchCollectives
from tercet.distributed.place import Place
from tercet.distributed.stages import Stages
from tercet.errors import WorkerLost
from tercet.kernels.native.communicator import CAPACITY, SPINS, NativeCommunicator, communicator_bytes
from tests.machine import free_port

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12
MOST = CAPACITY // 4  # float32 values of one round
SIZES = (0, 1, 2, 7, 64, 1001, MOST - 1, MOST, MOST + 1, 2 * MOST + 3)
FORK = multiprocessing.get_context("fork")  # the children inherit the memory

Work = Callable[[int, Collectives, Connection], Any]


def memory_of(size: int) -> memoryview:
    """Zeros that forked processes share."""
    return memoryview(mmap.mmap(-1, communicator_bytes(size)))


def native(memory: memoryview, rank: int, size: int, *, timeout_s: float = 20.0, spins: int = 0) -> HostCollectives:
    return HostCollectives(NativeCommunicator(memory, rank, size, timeout_s, spins=spins), rank, size)


@contextlib.contextmanager
def ranks(size: int, work: Work, made: Callable[[int], Collectives]) -> Iterator[list[tuple[Any, Connection]]]:
    """Run `work` in a process for each rank. -> (process, connection) of each; what is left in the end is killed."""

    def run(rank: int, here: Connection) -> None:
        try:
            here.send(work(rank, made(rank), here))
        except WorkerLost as error:
            here.send(error)
        os._exit(0)

    started = []
    for rank in range(size):
        here, there = FORK.Pipe()
        process = FORK.Process(target=run, args=(rank, there), daemon=True)
        process.start()
        there.close()
        started.append((process, here))
    try:
        yield started
    finally:
        for process, here in started:
            process.kill()
            process.join()
            here.close()


def results(size: int, work: Work, made: Callable[[int], Collectives]) -> list[Any]:
    with ranks(size, work, made) as started:
        return [told(here) for _, here in started]


def told(here: Connection, within_s: float = 30.0) -> Any:
    assert here.poll(within_s), "a rank is stuck"
    return here.recv()


def values(rank: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(1000 * seed + rank)) * 10.0**rank


def summed(size: int, count: int, seed: int = 0) -> torch.Tensor:
    """In float32, in the order of the ranks."""
    total = values(0, count, seed)
    for rank in range(1, size):
        total = total + values(rank, count, seed)
    return total


@pytest.mark.parametrize("spins", [0, SPINS])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_sizes_are_summed_and_gathered(size, spins):
    memory = memory_of(size)

    def work(rank: int, collectives: Collectives, _: Connection) -> list[Any]:
        found = []
        for count in SIZES:
            gathered = collectives.gather(values(rank, count).view(1, -1))
            found.append((collectives.all_reduce(values(rank, count)).numpy(), gathered is not None))
            if gathered is not None:
                assert gathered.equal(torch.stack([values(each, count).view(1, -1) for each in range(size)]))
        return found

    # Seldom more processes than cores, but then whoever spins keeps the others from what is spun for.
    for rank, found in enumerate(results(size, work, lambda rank: native(memory, rank, size, spins=spins))):
        for count, (total, was_gathered) in zip(SIZES, found, strict=True):
            assert torch.from_numpy(total).equal(summed(size, count)), (rank, count)
            assert was_gathered == (rank == 0)


@pytest.mark.parametrize(("size", "spins", "rounds"), [(2, 0, 3000), (3, SPINS, 1000), (4, 0, 1500)])
def test_thousands_of_rounds_of_random_sizes_with_ranks_that_sleep(size, spins, rounds):
    memory = memory_of(size)

    def work(rank: int, collectives: Collectives, _: Connection) -> int:
        same, own = random.Random(7), random.Random(rank)  # what all ranks do, what each does by itself
        for number in range(rounds):
            count = 2 * MOST + 1 if same.random() < 0.005 else same.randrange(40)
            if own.random() < 0.02:
                time.sleep(own.random() * 0.002)
            mine = torch.full((count,), float(rank + number))
            if same.random() < 0.3:
                gathered = collectives.gather(mine)
                right = gathered is None or gathered.tolist() == [[float(r + number)] * count for r in range(size)]
            else:
                right = collectives.all_reduce(mine).eq(float(sum(range(size)) + size * number)).all().item()
            if not right:
                return number
        return rounds

    assert results(size, work, lambda rank: native(memory, rank, size, spins=spins)) == [rounds] * size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_values_are_added_up_in_float32(dtype):
    memory = memory_of(3)

    def work(rank: int, collectives: Collectives, _: Connection) -> list[float]:
        return collectives.all_reduce(torch.tensor([256.0, 1.0, 1.0][rank], dtype=dtype).view(1)).tolist()

    assert results(3, work, lambda rank: native(memory, rank, 3)) == [[258.0]] * 3  # 257 is no bfloat16


def stuck(rank: int, collectives: Collectives, here: Connection) -> float:
    """Sums with the others, then waits for the last rank in vain. -> when it was let go."""
    collectives.all_reduce(torch.ones(3))
    here.send("waits")
    try:
        collectives.all_reduce(torch.ones(3))
    except WorkerLost as error:
        here.send(error)
    return time.monotonic()


def dead(rank: int, collectives: Collectives, here: Connection) -> float:
    if rank < 2:
        return stuck(rank, collectives, here)
    collectives.all_reduce(torch.ones(3))
    here.send("waits")
    time.sleep(60.0)  # until it is killed
    return 0.0


@pytest.mark.parametrize("spins", [0, SPINS])
def test_stop_wakes_who_waits_for_a_rank_that_was_killed(spins):
    memory = memory_of(3)
    with ranks(3, dead, lambda rank: native(memory, rank, 3, spins=spins)) as started:
        for _, here in started:
            assert told(here) == "waits"
        os.kill(started[2][0].pid, signal.SIGKILL)
        assert not started[0][1].poll(0.2)  # nobody tells them
        began = time.monotonic()
        native(memory, 0, 3).stop()
        for _, here in started[:2]:
            error = told(here)
            assert isinstance(error, WorkerLost)
            assert "rank 2 of the group: the group is broken" in str(error)
            assert told(here) - began < 0.1


def test_a_stopped_group_stays_stopped():
    memory = memory_of(2)
    collectives = native(memory, 0, 2)
    collectives.stop()
    for _ in range(3):
        with pytest.raises(WorkerLost, match="rank 1 of the group: the group is broken"):
            collectives.all_reduce(torch.ones(1))
        with pytest.raises(WorkerLost, match="rank 1 of the group: the group is broken"):
            collectives.gather(torch.ones(1))


def test_who_does_not_come_in_time_is_named():
    memory, began = memory_of(3), time.monotonic()

    def work(rank: int, collectives: Collectives, _: Connection) -> None:
        if rank != 1:
            collectives.all_reduce(torch.ones(1))

    first, missing, last = results(3, work, lambda rank: native(memory, rank, 3, timeout_s=0.3))
    assert missing is None
    for error in (first, last):
        assert "waited for rank 1 of the group: it did not come in time" in str(error)
    assert 0.3 <= time.monotonic() - began < 3.0


# ---- torch.distributed


def gloo(port: int, rank: int, size: int) -> TorchCollectives:
    """Rank 0 has the store, so that nobody is forked beside its thread, who might get no further."""
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(seconds=20)
    there = dist.TCPStore("127.0.0.1", port, is_master=not rank, use_libuv=False, wait_for_workers=False)
    return TorchCollectives(dist.ProcessGroupGloo(there, rank, size, options))


@pytest.mark.parametrize("size", [2, 3])
def test_gloo_gives_the_same(size):
    port = free_port()

    def work(rank: int, collectives: Collectives, _: Connection) -> list[Any]:
        found = []
        for count in SIZES[1:]:
            total = collectives.all_reduce(values(rank, count))
            gathered = collectives.gather(values(rank, count))
            found.append((total.numpy(), None if gathered is None else gathered.numpy()))
        return found

    everywhere = results(size, work, lambda rank: gloo(port, rank, size))
    for at, count in enumerate(SIZES[1:]):
        totals = [torch.from_numpy(found[at][0]) for found in everywhere]
        assert all(total.equal(totals[0]) for total in totals)
        torch.testing.assert_close(totals[0], summed(size, count), rtol=1e-5, atol=1e-4)  # its order is its own
        assert torch.from_numpy(everywhere[0][at][1]).equal(torch.stack([values(r, count) for r in range(size)]))
        assert all(found[at][1] is None for found in everywhere[1:])


def test_a_rank_that_dies_ends_a_sum_by_gloo_at_once():
    port = free_port()
    with ranks(2, lambda rank, *rest: dead(2 * rank, *rest), lambda rank: gloo(port, rank, 2)) as started:
        for _, here in started:
            assert told(here) == "waits"
        began = time.monotonic()
        os.kill(started[1][0].pid, signal.SIGKILL)
        assert "a rank of the group is gone" in str(told(started[0][1]))
        assert told(started[0][1]) - began < 1.0


@pytest.mark.parametrize("waits", ["to sum", "to receive"])
def test_stop_wakes_who_waits_by_gloo(waits):
    """For a rank that is there, but does not come."""
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda rank: gloo(port, rank, 2), range(2)))
        stages = Stages(Place(1, pipeline=2), made[1]._group)
        waiting = {
            "to sum": (made[1], lambda: made[1].all_reduce(torch.ones(1))),
            "to receive": (stages, lambda: stages.receive(1, 4, torch.float32, torch.device("cpu"))),
        }
        who, wait = waiting[waits]
        stuck = pool.submit(wait)
        assert not done([stuck], timeout=0.2).done
        who.stop()
        with pytest.raises(WorkerLost, match="a rank of the group is gone"):
            stuck.result(10)
        who.stop()  # again
        who.close()


def test_alone_there_is_nothing_to_add():
    x = torch.randn(3, 2)
    assert Alone().all_reduce(x) is x
    assert Alone().gather(x).equal(x.unsqueeze(0))
    assert Alone().traffic.calls == 0


def test_traffic_is_counted():
    memory = memory_of(2)

    def work(rank: int, collectives: Collectives, _: Connection) -> tuple[int, int, bool]:
        collectives.all_reduce(torch.ones(5))
        collectives.gather(torch.ones(2, 3, dtype=torch.float64))
        return collectives.traffic.calls, collectives.traffic.num_bytes, collectives.traffic.seconds > 0

    assert results(2, work, lambda rank: native(memory, rank, 2)) == [(2, 20 + 48, True)] * 2
