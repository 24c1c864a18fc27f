"""Members of a cluster die in every order of events, in hundreds of seeded runs; the gateway must know who lives."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from tercet.cluster.controller import Controller
from tercet.cluster.members import Target
from tercet.cluster.reconcile import GATEWAY
from tercet.core import Role
from tercet.errors import WorkerLost
from tercet.placement.roles import Node, plan
from tercet.spec import ClusterSpec, RoleSpec

WORKERS = ("worker-0", "worker-1", "worker-2")
NODE = Node("a", "10.0.0.1", {}, {"CPU": 9.0})
TURNS = 400  # of the event loop, for one run


class Process:
    """A member that answers after a random number of turns and dies at a random one."""

    others = ()

    def __init__(self, world: World, member_id: str, epoch: int) -> None:
        self._world = world
        self._gateway = member_id == GATEWAY
        self.name = f"{member_id}@{epoch}"
        self.told: frozenset[str] = frozenset()
        self.dead = False

    async def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        await self._world.some_turns()
        if self.dead:
            raise WorkerLost(f"{self.name} died")
        if method == "set_workers":
            self.told = frozenset(args[0])
            self._world.perhaps_strike(self)
            await self._world.some_turns(40)
        await self._world.some_turns()  # the answer is on its way, and comes even from one who has died since
        return {"health": {"ready": True}, "loading": None}.get(method, self.name)

    async def kill(self) -> None:
        await self._world.some_turns()
        self.dead = True


class World:
    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.members: dict[str, Process] = {}
        self.striking = False

    async def some_turns(self, most: int = 8) -> None:
        for _ in range(self._random.randrange(most)):
            await asyncio.sleep(0)

    def perhaps_strike(self, process: Process) -> None:
        """Each name may die once: then it is replaced at once."""
        if self.striking and process.name.endswith("@1") and self._random.random() < 0.5:
            process.dead = True

    async def launch(self, member_id: str, epoch: int, target: Target) -> Process:
        await self.some_turns()
        self.members[member_id] = Process(self, member_id, epoch)
        return self.members[member_id]

    async def ask_ports(self, info: Any, timeout_s: float) -> None:
        await self.some_turns()

    async def watch_home(self) -> None:
        await asyncio.Event().wait()

    async def strike(self) -> None:
        self.striking = True
        for member_id in self._random.sample(WORKERS, self._random.randint(1, 3)):
            await self.some_turns()
            self.members[member_id].dead = True
        await self.some_turns(40)
        self.perhaps_strike(self.members[GATEWAY])

    def knows(self) -> bool:
        gateway = self.members[GATEWAY]
        return not gateway.dead and gateway.told == {self.members[m].name for m in WORKERS}


@pytest.fixture(autouse=True)
def _without_a_clock(monkeypatch):
    monkeypatch.setattr("tercet.cluster.controller.LOOK_EVERY_S", 0.0)
    monkeypatch.setattr("tercet.cluster.members.ASK_PORTS_EVERY_S", 0.0)


async def run(seed: int) -> bool:
    """Whether the gateway knew who lives, some turns after everyone had come back."""
    world = World(seed)
    spec = ClusterSpec(roles={Role.PREFILL: RoleSpec(), Role.DECODE: RoleSpec(replicas=2)})
    controller = Controller(Target(spec, plan(spec, [NODE])), world, lambda _: None)
    await controller.bring_up()
    running = asyncio.create_task(controller.run(asyncio.Event()))
    await world.strike()
    for _ in range(TURNS):
        await asyncio.sleep(0)
    knows = world.knows()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await controller.end_now()
    return knows


@pytest.mark.parametrize("block", range(4))
async def test_a_new_gateway_is_told_whatever_the_order_of_deaths(block):
    seeds = range(block * 60, (block + 1) * 60)
    assert [seed for seed in seeds if not await run(seed)] == []
