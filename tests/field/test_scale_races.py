"""The target changes at any moment, by numbers and by roles, while members die, hang in their start or their switch,
refuse a role, or drain for longer or shorter; hundreds of seeded runs over processes without a clock. Whatever happens,
the cluster ends as the last target says."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import pytest

from tercet.cluster.controller import Controller
from tercet.cluster.members import Target
from tercet.cluster.reconcile import GATEWAY
from tercet.core import Role
from tercet.errors import UnsupportedSpec, WorkerLost
from tercet.placement.roles import Node, Placement, plan
from tercet.spec import ClusterSpec, RoleSpec

NODE = Node("a", "10.0.0.1", {}, {"CPU": 9.0})
TURNS = 4000  # of the event loop, within which all must come to rest


class Process:
    """A member. It answers after a random number of turns."""

    others = ()

    def __init__(self, world: World, member_id: str, epoch: int, role: str) -> None:
        self._world = world
        self._member_id, self.role = member_id, role
        self._is_gateway = member_id == GATEWAY
        self.name = f"{member_id}@{epoch}"
        self.told: frozenset[str] = frozenset()
        self.noted: dict[str, Any] = {}
        self.drain_ended = self.dead = False

    async def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        await self._world.some_turns()
        if self.dead:
            raise WorkerLost(f"{self.name} died")
        await self._do(method, *args)
        await self._world.some_turns()  # the answer is on its way, and comes even from one who has died since
        if method == "health":
            return {"ready": True, "asked": self._world.asked} if self._is_gateway else {}
        return None if method == "loading" else self.name

    async def _do(self, method: str, *args: Any) -> None:
        world = self._world
        if method == "set_workers":
            assert not set(args[0]) & world.draining, "a draining worker is published"
            self.told = frozenset(args[0])
        if method == "note":
            self.noted = args[0]
        if method == "drain":
            gateway = world.members[GATEWAY]
            assert gateway.dead or self.name not in gateway.told, "it drains before the gateway was told"
            world.draining.add(self.name)
            await world.some_turns(60)
            self.drain_ended = not self.dead
        if method == "switch":
            await self._switch(*args)
        if method == "stop":
            assert self.drain_ended or not world.up, "stopped before its drain ended"

    async def _switch(self, role: Role, epoch: int, cores: Any) -> None:
        assert self.drain_ended, "it switches before its drain has ended"
        await self._world.some_turns(60)
        if self._world.random.random() < 0.2:
            raise UnsupportedSpec("too large")
        if self.dead:
            raise WorkerLost(f"{self.name} died")
        self.name, self.role, self.drain_ended = f"{self._member_id}@{epoch}", role.value, False

    async def kill(self) -> None:
        self._world.killed[self.name] += 1
        await self._world.some_turns()
        self.dead = True


class World:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.members: dict[str, Process] = {}
        self.all: list[Process] = []
        self.draining: set[str] = set()  # ever
        self.killed: Counter[str] = Counter()
        self.asked: list[dict[str, Any]] = []
        self.up = False

    async def some_turns(self, most: int = 8) -> None:
        for _ in range(self.random.randrange(most)):
            await asyncio.sleep(0)

    async def place(self, target: Target, spec: ClusterSpec, taken: Any) -> Placement:
        await self.some_turns()
        return plan(spec, [NODE], target.placement.workers, taken)

    async def launch(self, member_id: str, epoch: int, target: Target) -> Process:
        await self.some_turns(60 if self.up else 8)
        before = self.members.get(member_id)
        assert before is None or epoch > int(before.name.partition("@")[2]), "an epoch goes back"
        assert before is None or self.killed[before.name], "two incarnations at once"
        self.members[member_id] = Process(self, member_id, epoch, target.members[member_id])
        self.all.append(self.members[member_id])
        return self.members[member_id]

    async def ask_ports(self, info: Any, timeout_s: float) -> None:
        await self.some_turns()

    async def watch_home(self) -> None:
        await asyncio.Event().wait()

    def scale(self) -> None:
        role, replicas = self.random.choice(["prefill", "decode"]), self.random.randint(1, 4)
        self.asked = [{"id": f"ask-{self.random.random()}", "role": role, "replicas": replicas}]

    def set_role(self) -> None:
        worker, role = f"worker-{self.random.randrange(4)}", self.random.choice(["prefill", "decode"])
        self.asked = [{"id": f"ask-{self.random.random()}", "worker": worker, "role": role}]

    def kill_one(self) -> None:
        """Each name may die once: then it is replaced at once."""
        mortal = [process for process in self.members.values() if not process.dead and process.name.endswith("@1")]
        if mortal:
            self.random.choice(mortal).dead = True

    def rests(self, controller: Controller) -> bool:
        """The gateway knows exactly those whom the target wants, they live, and nobody else does."""
        gateway, wanted = self.members[GATEWAY], controller._target.members
        roles = Counter(member["role"] for member in gateway.noted.get("members", {}).values())
        return (
            not gateway.dead
            and bool(gateway.noted)
            and not controller._changes._under_way  # or somebody would wait for a role for ever
            and all(not self.members[m].dead for m in wanted if m in self.members)
            and all(self.members[m].role == role for m, role in wanted.items() if m in self.members)
            and gateway.told == {self.members[m].name for m in wanted if m != GATEWAY and m in self.members}
            and roles == Counter(gateway.noted["target"])
            and all(process.dead for process in self.all if process not in map(self.members.get, wanted))
        )


@pytest.fixture(autouse=True)
def _without_a_clock(monkeypatch):
    monkeypatch.setattr("tercet.cluster.controller.LOOK_EVERY_S", 0.0)
    monkeypatch.setattr("tercet.cluster.members.ASK_PORTS_EVERY_S", 0.0)


async def run(seed: int) -> None:
    world, reports = World(seed), []
    spec = ClusterSpec(roles={Role.PREFILL: RoleSpec(), Role.DECODE: RoleSpec(replicas=2)})
    controller = Controller(Target(spec, plan(spec, [NODE])), world, reports.append)
    await controller.bring_up()
    world.up = True
    running = asyncio.create_task(controller.run(asyncio.Event()))
    for _ in range(world.random.randint(2, 8)):
        world.random.choice([world.scale, world.set_role, world.set_role, world.kill_one])()
        await world.some_turns(150)
    last = world.asked[0] if world.asked else None
    for _ in range(TURNS):
        if running.done():
            running.result()
        if (last is None or last["id"] in controller._changes.overview["answers"]) and world.rests(controller):
            break
        await asyncio.sleep(0)
    else:
        raise AssertionError(f"it does not come to rest: {controller._slots} {reports}")
    told = controller._changes.overview
    refused = any(switch["how"] == "failed" for switch in told["switches"].values())  # then roles went back
    if last is not None and not told["answers"][last["id"]] and not refused:
        if "worker" in last:
            assert world.members[last["worker"]].role == last["role"]
        else:
            assert controller._spec.roles[Role(last["role"])].replicas == last["replicas"]
    ended = {process.name for process in world.all if process.dead}
    assert all(world.killed[name] == 1 for name in ended), world.killed
    assert set(world.killed) == ended
    world.up = False
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await controller.end_now()
    assert all(process.dead for process in world.all)


@pytest.mark.parametrize("block", range(4))
async def test_whatever_is_asked_and_whoever_dies_it_ends_in_the_target(block):
    for seed in range(block * 40, (block + 1) * 40):
        try:
            await run(seed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
