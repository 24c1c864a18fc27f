"""A group of ranks on a real Ray: one placement group, an actor per rank, one life. Its model is a fake one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group_table

from tercet.cluster import launcher, ray_runtime
from tercet.cluster.actors import RankActor, WorkerActor
from tercet.cluster.group import GroupActor
from tercet.cluster.members import Target
from tercet.core import Role, WorkerInfo
from tercet.errors import ClusterError, WorkerLost
from tercet.placement.roles import plan
from tercet.spec import ClusterSpec, ParallelSpec, RoleSpec
from tests.machine import Machine, answers, free_port, new_machine, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]


class FakeWorker:
    """In place of `tercet.roles.worker.Worker`. A token other than "" is what goes wrong with rank 1."""

    def __init__(
        self, worker_id: str, role: Role, epoch: int, spec: ClusterSpec, host: str, token: str, cores: object
    ) -> None:
        self.info = WorkerInfo(worker_id, role, epoch, "127.0.0.1:1", "", "same", os.getpid(), "here")
        self.joins_s = 60 if token else 0

    async def listen(self) -> str:
        return f"{self.info.worker_id} listens"

    async def start(self) -> WorkerInfo:
        await asyncio.sleep(self.joins_s)
        return self.info

    async def health(self) -> str:
        return "its load"

    def lost_ranks(self) -> list[int]:
        return []

    async def stop(self) -> None:
        pass


class FakeRank:
    """In place of `tercet.roles.rank.Rank`."""

    def __init__(self, worker_id: str, rank: int, *rest: object) -> None:
        self.worker_id, self.fault = worker_id, rest[4] if rank == 1 else ""

    async def start(self, endpoint: str) -> None:
        assert endpoint == f"{self.worker_id} listens"
        if self.fault == "cannot start":
            raise ClusterError("no room for 1")
        if self.fault == "dies once it has joined":
            asyncio.get_running_loop().call_later(0.3, os._exit, 1)

    async def stop(self) -> None:
        pass


class FakedWorkerActor(WorkerActor):
    def __init__(self, *args: Any) -> None:
        sys.modules["tercet.roles.worker"] = SimpleNamespace(Worker=FakeWorker)
        super().__init__(*args)


class FakedRankActor(RankActor):
    def __init__(self, *args: Any) -> None:
        sys.modules["tercet.roles.rank"] = SimpleNamespace(Rank=FakeRank)
        super().__init__(*args)


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    made = new_machine(PYTHONPATH=str(Path(__file__).parents[2]))
    yield made
    made.clear()


@pytest.fixture(scope="module")
def joined(machine: Machine) -> Iterator[None]:
    """This process in a Ray of two nodes: 2 CPUs and 4."""
    gcs = f"127.0.0.1:{free_port()}"
    both = ["--block", "--node-ip-address=127.0.0.1", "--object-store-memory=80000000"]
    head = machine.start(
        "ray", "start", "--head", f"--port={gcs.partition(':')[2]}", "--num-cpus=2", *both,
        "--include-dashboard=false", f"--temp-dir={machine.folder / 'ray'}",
    )  # fmt: skip
    until(lambda: answers(gcs))
    own = f"--temp-dir={machine.folder / 'node'}"
    node = machine.start("ray", "start", f"--address={gcs}", "--num-cpus=4", own, *both)
    ray_runtime.connect(gcs)
    until(lambda: len(ray_runtime.nodes()) == 2)
    yield
    ray_runtime.disconnect()
    for process in (node, head):
        process.terminate()
        process.wait(40)


def target_of(tensor: int, pipeline: int = 1) -> Target:
    decode = RoleSpec(parallelism=ParallelSpec(tensor=tensor, pipeline=pipeline), cpus=1.0)
    spec = ClusterSpec(roles={Role.PREFILL: RoleSpec(cpus=0.5), Role.DECODE: decode})
    return Target(spec, plan(spec, ray_runtime.nodes()))


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(launcher, "WorkerActor", FakedWorkerActor)
    monkeypatch.setattr(launcher, "RankActor", FakedRankActor)
    here = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(here)  # Ray's processes do not see this file
    yield
    ray.cloudpickle.unregister_pickle_by_value(here)


@contextlib.asynccontextmanager
async def launched(target: Target, fault: str = "") -> AsyncIterator[GroupActor]:
    group = await launcher.Launcher("groups", fault, SimpleNamespace()).launch("worker-1", 1, target)
    try:
        yield group
    finally:
        await group.kill()


def bundles() -> list[str]:
    """The node of each bundle of the one placement group that there is."""
    groups = [g for g in placement_group_table().values() if g["state"] == "CREATED"]
    assert len(groups) == 1
    return list(groups[0]["bundles_to_node_id"].values())


async def watch_health(group: GroupActor) -> None:
    while True:
        await group.call("health", timeout_s=5.0)


async def test_a_group_is_one_placement_group_on_one_node_and_lives_and_dies_as_one(joined, faked):
    target = target_of(2, 2)
    async with launched(target) as group:
        info = await group.call("start", timeout_s=60.0)
        assert (info.worker_id, info.epoch) == ("worker-1", 1)
        pids = [info.pid, *(place["pid"] for place in group.others)]
        assert len({*pids}) == 4
        assert bundles() == [target.worker("worker-1").node.node_id] * 4
        assert await group.call("health", timeout_s=5.0) == "its load"
        os.kill(pids[2], signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises(WorkerLost, match="worker-1 rank 2 died"):
            await watch_health(group)
        assert time.monotonic() - killed < 1.0
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 10)
    until(lambda: not ray.util.list_named_actors(all_namespaces=True), 10)
    until(lambda: {g["state"] for g in placement_group_table().values()} <= {"REMOVED"}, 10)


async def test_a_group_that_no_node_holds_is_over_few(joined, faked):
    target = target_of(5)
    async with launched(target) as group:
        await group.call("start", timeout_s=60.0)
        assert bundles() == [node.node_id for node in target.worker("worker-1").nodes]
        assert len({*bundles()}) == 2
        await group.call("stop", timeout_s=5.0)


@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [
        ("cannot start", ClusterError, "no room for 1"),
        ("dies once it has joined", WorkerLost, "worker-1 rank 1 died"),
    ],
)
async def test_a_rank_that_fails_fails_the_start_at_once(joined, faked, fault, error, said):
    async with launched(target_of(2), fault) as group:
        begun = time.monotonic()
        with pytest.raises(error, match=said):
            await group.call("start", timeout_s=50.0)
        assert time.monotonic() - begun < 30
