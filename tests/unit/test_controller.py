"""The reconcile loop: its pure decisions, then the controller over a fake starter (members without processes)."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import RayActorError

from tercet.cluster import launcher, reconcile
from tercet.cluster.controller import Controller
from tercet.cluster.launcher import Actor
from tercet.cluster.members import Slot, Target
from tercet.cluster.reconcile import GATEWAY, Drain, Drop, Member, Publish, Start, State, Stop, Switch, diff
from tercet.cluster.tables import losses
from tercet.core import Load, Loading, Role, WorkerInfo
from tercet.errors import ClusterError, ModelFileMissing, RayLost, TercetError, WorkerLost
from tercet.placement.roles import Node, Placement, plan
from tercet.spec import ClusterSpec, RaySpec, RoleSpec

NODE = Node("a", "10.0.0.1", {}, {"CPU": 4.0})
TARGET = {GATEWAY: "", "worker-0": "prefill", "worker-1": "decode"}
ALONE = {GATEWAY: "", "worker-0": "prefill"}


def of(member_id: str, state: State = State.LIVE, epoch: int = 1) -> Member:
    return Member(epoch, state, 0.0, role=TARGET[member_id])


def live() -> dict[str, Member]:
    return {member_id: of(member_id) for member_id in TARGET}


def test_an_empty_cluster_starts_everything():
    assert set(diff(TARGET, {}, None, 0.0)) == {Start(m, 1) for m in TARGET}


def test_a_cluster_as_it_should_be_needs_nothing():
    assert diff(TARGET, live(), {"worker-1": (1, 0), "worker-0": (1, 0)}, 0.0) == ()


def test_a_lost_worker_is_unpublished_and_started_with_the_next_epoch():
    actual = live() | {"worker-1": reconcile.lost(of("worker-1", epoch=4), "died", 10.0)}
    told = {"worker-1": (4, 0), "worker-0": (1, 0)}
    assert diff(TARGET, actual, told, 10.0) == (Start("worker-1", 5), Publish({"worker-0": (1, 0)}))


def test_a_new_gateway_is_told_even_if_nothing_changed():
    assert diff(TARGET, live(), None, 0.0) == (Publish({"worker-1": (1, 0), "worker-0": (1, 0)}),)


def test_a_worker_that_is_reached_elsewhere_is_published_again():
    actual = live() | {"worker-1": reconcile.moved(of("worker-1"))}
    told = {"worker-1": (1, 0), "worker-0": (1, 0)}
    assert diff(TARGET, actual, told, 0.0) == (Publish(told | {"worker-1": (1, 1)}),)
    assert diff(TARGET, actual, told | {"worker-1": (1, 1)}, 0.0) == ()


def test_a_slot_hears_where_its_worker_is_reached():
    info = WorkerInfo("worker-1", Role.DECODE, 1, "127.0.0.1:1", "here", "same")
    slot = Slot("worker-1", of("worker-1"))
    slot.hear(Load(transfer_endpoint="nobody knows it yet"))  # while it switches
    assert (slot.info, slot.member.revision) == (None, 0)
    slot.info = info
    slot.hear(Load(running=1, transfer_endpoint="here"))
    assert (slot.info, slot.member.revision, slot.status.running) == (info, 0, 1)
    slot.hear(Load(transfer_endpoint="there"))
    assert (slot.info.transfer_endpoint, slot.member.revision) == ("there", 1)
    assert reconcile.up(slot.member, 5.0).revision == 1
    slot.actor = SimpleNamespace(others=[{"rank": 1, "pid": 7}, {"rank": 2, "pid": 0, "lost": True}])
    assert slot.hear(slot.status) == ["decode worker-1 goes on without rank 2; another process is to take its place"]
    assert slot.hear(slot.status) == []
    slot.actor.others[1] = {"rank": 2, "pid": 9}
    assert slot.hear(slot.status) == ["decode worker-1 has its rank 2 back"]
    assert reconcile.starting("decode", 2, slot.member, 5.0).revision == 0


BOTH = {"worker-0": (1, 0), "worker-1": (3, 0)}


def with_worker_1(state: State) -> dict[str, Member]:
    return live() | {"worker-1": of("worker-1", state, 3)}


@pytest.mark.parametrize(
    ("state", "told", "want"),
    [  # of a worker that is not wanted any more
        (State.STARTING, {"worker-0": (1, 0)}, (Stop("worker-1"),)),
        (State.LIVE, BOTH, (Publish({"worker-0": (1, 0)}),)),
        (State.LIVE, None, (Publish({"worker-0": (1, 0)}),)),
        (State.LIVE, {"worker-0": (1, 0)}, (Drain("worker-1"),)),
        (State.DRAINING, {"worker-0": (1, 0)}, ()),
        (State.DRAINED, {"worker-0": (1, 0)}, (Stop("worker-1"),)),
        (State.SWITCHING, {"worker-0": (1, 0)}, (Stop("worker-1"),)),
        (State.STOPPING, {"worker-0": (1, 0)}, ()),
        (State.LOST, {"worker-0": (1, 0)}, (Drop("worker-1"),)),
        (State.GONE, {"worker-0": (1, 0)}, ()),
    ],
)
def test_who_is_not_wanted_any_more_goes_step_by_step(state, told, want):
    assert diff(ALONE, with_worker_1(state), told, 0.0) == want


@pytest.mark.parametrize(
    ("state", "want"),
    [  # of a worker that is wanted again
        (State.DRAINING, ()),
        (State.DRAINED, (Switch("worker-1", 4),)),
        (State.STOPPING, ()),
        (State.GONE, (Start("worker-1", 4),)),
    ],
)
def test_who_is_wanted_again_while_it_goes_begins_anew_behind_its_drain_or_its_end(state, want):
    assert diff(TARGET, with_worker_1(state), {"worker-0": (1, 0)}, 0.0) == want


@pytest.mark.parametrize(
    ("state", "told", "want"),
    [  # of a worker that is wanted in another role than it has
        (State.STARTING, {"worker-0": (1, 0)}, ()),
        (State.LIVE, BOTH, (Publish({"worker-0": (1, 0)}),)),
        (State.LIVE, None, (Publish({"worker-0": (1, 0)}),)),
        (State.LIVE, {"worker-0": (1, 0)}, (Drain("worker-1"),)),
        (State.DRAINING, {"worker-0": (1, 0)}, ()),
        (State.DRAINED, {"worker-0": (1, 0)}, (Switch("worker-1", 4),)),
        (State.SWITCHING, {"worker-0": (1, 0)}, ()),  # to a role that is no longer wanted: it drains behind that
        (State.STOPPING, {"worker-0": (1, 0)}, ()),
        (State.LOST, {"worker-0": (1, 0)}, (Start("worker-1", 4),)),
        (State.GONE, {"worker-0": (1, 0)}, (Start("worker-1", 4),)),
    ],
)
def test_who_is_wanted_in_another_role_switches_step_by_step(state, told, want):
    assert diff(TARGET | {"worker-1": "prefill"}, with_worker_1(state), told, 0.0) == want


@pytest.mark.parametrize("gateway", [State.STARTING, State.LOST])
def test_nobody_drains_before_a_gateway_has_heard_of_it(gateway):
    actual = live() | {GATEWAY: Member(1, gateway, 0.0, retry_at=9.0)}
    assert diff(ALONE, actual, None, 0.0) == ()
    assert diff(TARGET | {"worker-1": "prefill"}, actual, None, 0.0) == ()


def test_a_crash_loop_backs_off_and_a_long_life_forgives():
    now, member, waits = 0.0, reconcile.starting("decode", 1, None, 0.0), []
    for _ in range(8):
        member = reconcile.lost(member, "crash", now)
        waits.append(member.retry_at - now)
        assert not [a for a in diff(TARGET, {"worker-1": member}, None, now - 0.1) if a == Start("worker-1", 2)]
        now = member.retry_at
        member = reconcile.starting("decode", member.epoch + 1, member, now)
    assert waits == [0, 1, 2, 4, 8, 16, 30, 30]
    old = reconcile.up(member, now)
    assert reconcile.lost(old, "at last", now + reconcile.STABLE_S).retry_at == now + reconcile.STABLE_S


@given(
    st.dictionaries(
        st.sampled_from(sorted(TARGET)),
        st.builds(
            Member,
            st.integers(1, 9),
            st.sampled_from(State),
            st.just(0.0),
            retry_at=st.floats(0, 9),
            role=st.sampled_from(["", "prefill", "decode"]),
        ),
    ),
    st.floats(0, 9),
)
def test_no_member_is_started_while_it_lives_and_epochs_grow(actual, now):
    for action in diff(TARGET, actual, None, now):
        match action:
            case Start(member_id, epoch):
                before = actual.get(member_id)
                assert before is None or (before.state in {State.LOST, State.GONE} and epoch > before.epoch)
            case Switch(member_id, epoch):
                assert actual[member_id].state is State.DRAINED
                assert epoch > actual[member_id].epoch
            case Publish(told):
                assert all(actual[m].state is State.LIVE and actual[m].role == TARGET[m] for m in told)


LOADING = Loading("tensors read", 1, 4)


class FakeMember:
    """A member's process: answers what the test says, remembers what it was asked."""

    others = ()

    def __init__(self, member_id: str, epoch: int, world: FakeStarter) -> None:
        self.name = f"{member_id}@{epoch}"
        self._member_id = member_id
        self._world = world
        self.fault: TercetError | None = None

    async def call(self, method: str, *args: object, timeout_s: float) -> Any:
        await asyncio.sleep(0)
        self._world.calls.append((self.name, method))
        await self._held(method, timeout_s)
        if method == "drain" and self._member_id == GATEWAY:
            self._world.drained.append(args)
            for name in self._world.stopped:  # a stream waits for it
                await self._world.ended(name)
        if method == "set_workers":
            self._world.told = args[0]
        if method == "health" and self._member_id == GATEWAY:
            asked = {"stop_requested": self._world.stop_requested, "asked": self._world.asked}
            return {"ready": len(self._world.told) >= 2} | asked
        if method == "loading":
            return LOADING
        if method == "note":
            self._world.noted = args[0]
        if method == "switch":
            if self._world.refusal is not None:
                raise self._world.refusal
            self.name = f"{self._member_id}@{args[1]}"
        return self.name  # stands for the info that `start` or `switch` gives

    async def _held(self, method: str, timeout_s: float) -> None:
        """Until the test lets the call go on. Raises if it does not live to that."""
        world = self._world
        free = world.held.get(method)
        await until(lambda: free is None or free.is_set() or self.fault or self.name in world.stopped)
        if self.name in world.stopped:
            await self._silence(method, timeout_s)
        if self.fault is not None:
            raise self.fault

    async def _silence(self, method: str, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._world.ended(self.name)
        raise WorkerLost(f"{self.name} did not answer {method}")

    async def kill(self) -> None:
        self._world.killed.append(self.name)


class FakeStarter:
    def __init__(self) -> None:
        self.members: dict[str, FakeMember] = {}
        self.calls: list[tuple[str, str]] = []
        self.killed: list[str] = []
        self.drained: list[tuple[object, ...]] = []  # what the gateway was told
        self.told: Any = ()
        self.stop_requested = False
        self.asked: list[dict[str, Any]] = []
        self.noted: dict[str, Any] = {}
        self.refuse: TercetError | None = None
        self.lost = asyncio.Event()  # Ray
        self.silent: set[str] = set()  # whose ports do not answer
        self.stopped: set[str] = set()  # who says nothing until it is killed
        self.held: dict[str, asyncio.Event] = {}  # method -> set once it may go on
        self.refusal: TercetError | None = None  # of another role

    def hold(self, method: str) -> asyncio.Event:
        """Let no worker end this call before the event is set."""
        return self.held.setdefault(method, asyncio.Event())

    async def ended(self, name: str) -> None:
        await until(lambda: name in self.killed)

    async def place(self, target: Target, spec: ClusterSpec, taken: Any) -> Placement:
        return plan(spec, [NODE], target.placement.workers, taken)

    async def watch_home(self) -> None:
        await self.lost.wait()
        raise RayLost("Ray is lost")

    async def ask_ports(self, info: Any, timeout_s: float) -> None:
        if info in self.silent:
            raise WorkerLost("its gRPC port at 127.0.0.1:1 does not answer new connections")

    async def launch(self, member_id: str, epoch: int, target: Target) -> FakeMember:
        if self.refuse is not None and member_id == "worker-1":
            raise self.refuse
        self.members[member_id] = FakeMember(member_id, epoch, self)
        return self.members[member_id]


def spec_of(**ray: float) -> ClusterSpec:
    return ClusterSpec(
        roles={Role.PREFILL: RoleSpec(), Role.DECODE: RoleSpec()}, ray=RaySpec(start_timeout_s=20.0, **ray)
    )


def target_of(spec: ClusterSpec) -> Target:
    return Target(spec, plan(spec, [NODE]))


def controller(starter: FakeStarter, reports: list[str], **ray: float) -> Controller:
    return Controller(target_of(spec_of(**ray)), starter, reports.append)


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.01)


async def test_a_lost_worker_is_killed_replaced_and_published():
    starter, reports, stop = FakeStarter(), [], asyncio.Event()
    cluster = controller(starter, reports)
    await cluster.bring_up()
    assert set(starter.told) == {"worker-0@1", "worker-1@1"}
    running = asyncio.create_task(cluster.run(stop))
    starter.members["worker-1"].fault = WorkerLost("worker-1 died")
    await until(lambda: "worker-1@2" in starter.told)
    assert starter.killed == ["worker-1@1"]
    assert any("worker-1 (epoch 1) lost: worker_lost: worker-1 died" in line for line in reports)
    starter.members[GATEWAY].fault = WorkerLost("gateway died")
    starter.told = ()
    await until(lambda: set(starter.told) == {"worker-0@1", "worker-1@2"})
    stop.set()
    await running


async def test_whoever_waits_for_a_worker_is_told_how_far_its_model_is():
    starter, told, stop = FakeStarter(), [], asyncio.Event()
    cluster = Controller(target_of(spec_of()), starter, lambda line: None, loading=lambda *heard: told.append(heard))
    start = starter.hold("start")
    rising = asyncio.create_task(cluster.bring_up())
    await until(lambda: {title for title, _ in told} == {"prefill worker-0", "decode worker-1"})
    assert {loading for _, loading in told} == {LOADING}
    start.set()
    await rising
    count = len(told)
    running = asyncio.create_task(cluster.run(stop))
    start.clear()  # another incarnation loads anew
    starter.members["worker-1"].fault = WorkerLost("worker-1 died")
    await until(lambda: starter.noted["members"]["worker-1"]["reason"] == "1 of 4 tensors read")
    assert starter.noted["members"]["worker-1"]["state"] == "starting"
    assert {title for title, _ in told[count:]} == {"decode worker-1"}
    start.set()
    await until(lambda: starter.noted["members"]["worker-1"]["state"] == "live")
    assert starter.noted["members"]["worker-1"]["reason"] == ""
    assert starter.noted["members"]["worker-1"]["last_loss"] == "worker_lost: worker-1 died"
    assert losses(starter.noted) == ["worker-1 (now epoch 2) was lost: worker_lost: worker-1 died"]
    stop.set()
    await running
    await cluster.end_now()


async def scaled_to(starter: FakeStarter, name: str, role: str, replicas: int) -> dict[str, str]:
    """Ask as `tercet scale` does; the controller's answer."""
    starter.asked = [{"id": name, "role": role, "replicas": replicas}]
    await until(lambda: name in starter.noted.get("answers", {}))
    return starter.noted["answers"][name]


async def test_a_cluster_grows_and_shrinks_by_what_it_is_asked():
    starter, reports, stop = FakeStarter(), [], asyncio.Event()
    cluster = controller(starter, reports)
    await cluster.bring_up()
    running = asyncio.create_task(cluster.run(stop))
    assert await scaled_to(starter, "more", "decode", 2) == {}
    await until(lambda: set(starter.told) == {"worker-0@1", "worker-1@1", "worker-2@1"})
    assert starter.noted["target"] == {"prefill": 1, "decode": 2}
    assert {name: member["role"] for name, member in starter.noted["members"].items()} == {
        "worker-0": "prefill", "worker-1": "decode", "worker-2": "decode"
    }  # fmt: skip
    starter.calls.clear()
    assert await scaled_to(starter, "less", "decode", 1) == {}
    await until(lambda: "worker-2" not in starter.noted["members"])
    words = [call for call in starter.calls if call[0] == "worker-2@1" or call[1] == "set_workers"]
    assert [method for _, method in words if method != "health"] == ["set_workers", "drain", "stop"]
    assert starter.killed == ["worker-2@1"]
    assert await scaled_to(starter, "again", "decode", 2) == {}
    await until(lambda: set(starter.told) == {"worker-0@1", "worker-1@1", "worker-2@2"})
    starter.members[GATEWAY].fault = WorkerLost("gateway died")  # the target is not the gateway's
    starter.told, starter.noted = (), {}
    await until(lambda: set(starter.told) == {"worker-0@1", "worker-1@1", "worker-2@2"})
    await until(lambda: starter.noted)
    assert starter.noted["target"] == {"prefill": 1, "decode": 2}
    stop.set()
    await running
    await cluster.end_now()
    assert "decode is to have 2 workers" in reports
    assert "decode worker-2 (epoch 1) is gone" in reports


async def test_who_does_not_serve_goes_before_who_does():
    starter, stop = FakeStarter(), asyncio.Event()
    cluster = controller(starter, [])
    await cluster.bring_up()
    running = asyncio.create_task(cluster.run(stop))
    assert await scaled_to(starter, "more", "decode", 2) == {}
    await until(lambda: set(starter.told) == {"worker-0@1", "worker-1@1", "worker-2@1"})
    starter.hold("start")
    starter.members["worker-1"].fault = WorkerLost("worker-1 died")  # the older one
    await until(lambda: set(starter.told) == {"worker-0@1", "worker-2@1"})
    starter.calls.clear()
    assert await scaled_to(starter, "less", "decode", 1) == {}
    await until(lambda: "worker-1" not in starter.noted["members"])
    assert set(starter.told) == {"worker-0@1", "worker-2@1"}
    assert ("worker-2@1", "drain") not in starter.calls
    stop.set()
    await running
    await cluster.end_now()


async def test_what_cannot_be_is_answered_and_the_target_stays():
    starter, stop = FakeStarter(), asyncio.Event()
    cluster = controller(starter, [])
    await cluster.bring_up()
    running = asyncio.create_task(cluster.run(stop))
    for name, role, replicas, code, want in (
        ("none", "decode", 0, "spec_error", "without one no request can be served"),
        ("other", "encode", 1, "spec_error", "topology pd has no role encode"),
        ("much", "decode", 9, "cluster_error", "decode cannot have 9 workers: worker-4 needs 1 CPU, beside 4 CPU"),
    ):
        answer = await scaled_to(starter, name, role, replicas)
        assert answer["code"] == code
        assert want in answer["message"]
        assert answer["message"].endswith("it stays at 1 prefill, 1 decode")
    assert starter.noted["target"] == {"prefill": 1, "decode": 1}
    assert starter.killed == []
    stop.set()
    await running
    await cluster.end_now()


async def test_each_gateway_is_told_of_since_its_ports_may_be_others():
    starter, gateways = FakeStarter(), []
    cluster = Controller(target_of(spec_of()), starter, lambda line: None, gateways.append)
    await cluster.bring_up()
    running = asyncio.create_task(cluster.run(asyncio.Event()))
    starter.members[GATEWAY].fault = WorkerLost("gateway died")
    await until(lambda: gateways == ["gateway@1", "gateway@2"])
    running.cancel()
    await cluster.end_now()


async def test_shut_down_drains_the_gateway_first_and_kills_all():
    starter = FakeStarter()
    cluster = controller(starter, [])
    await cluster.bring_up()
    starter.stop_requested = True  # as `tercet down` asks
    await cluster.run(asyncio.Event())
    starter.calls.clear()
    await cluster.shut_down()
    told = [call for call in starter.calls if call[1] != "health"]
    assert told[0] == ("gateway@1", "drain")
    assert set(told[1:3]) == {("worker-0@1", "drain"), ("worker-1@1", "drain")}
    assert {method for _, method in told[3:]} == {"stop"}
    assert sorted(starter.killed) == ["gateway@1", "worker-0@1", "worker-1@1"]


@pytest.mark.parametrize("stopped", ["gateway@1", "worker-1@1"])
async def test_who_is_silent_while_the_cluster_drains_is_not_waited_for(monkeypatch, stopped):
    monkeypatch.setattr("tercet.cluster.controller.DEAF_AFTER_S", 0.01)
    starter, reports = FakeStarter(), []
    cluster = controller(starter, reports)
    await cluster.bring_up()
    starter.stopped = {stopped}
    starter.calls.clear()
    async with asyncio.timeout(cluster._spec.limits.drain_timeout_s):
        await cluster.shut_down()
    assert reports[-1] == f"while it drains: {stopped} did not answer health"
    assert starter.killed[0] == stopped
    others = {"gateway@1", "worker-0@1", "worker-1@1"} - {stopped}
    assert {name for name, method in starter.calls if method == "drain"} >= others
    assert {name for name, method in starter.calls if method == "stop"} == others


@pytest.mark.parametrize("fault", [ModelFileMissing("x.gguf: no such file"), ClusterError("port 8000 is in use")])
async def test_a_fault_while_bringing_up_is_raised_as_itself(fault):
    starter = FakeStarter()
    starter.refuse = fault
    cluster = controller(starter, [])
    with pytest.raises(type(fault), match=str(fault)):
        await cluster.bring_up()
    await cluster.shut_down()
    assert len(starter.killed) == len(starter.members)


async def test_the_loss_of_ray_ends_the_controller_and_clients_are_told_why():
    starter = FakeStarter()
    cluster = controller(starter, [])
    await cluster.bring_up()
    starter.lost.set()
    with pytest.raises(RayLost):
        await cluster.run(asyncio.Event())
    await cluster.shut_down("Ray is lost")
    assert starter.drained == [(spec_of().limits.drain_timeout_s, "Ray is lost")]
    assert len(starter.killed) == len(starter.members)


async def test_a_port_that_does_not_answer_is_named_and_its_member_replaced(monkeypatch):
    monkeypatch.setattr("tercet.cluster.members.ASK_PORTS_EVERY_S", 0.01)
    starter, reports, stop = FakeStarter(), [], asyncio.Event()
    cluster = controller(starter, reports, health_deadline_s=0.1)
    await cluster.bring_up()
    running = asyncio.create_task(cluster.run(stop))
    starter.silent = {"worker-1@1"}
    await until(lambda: "worker-1@2" in starter.told)
    assert starter.killed == ["worker-1@1"]
    assert any("worker-1 (epoch 1) lost: worker_lost: its gRPC port at 127.0.0.1:1" in line for line in reports)
    stop.set()
    await running


async def test_one_miss_of_a_port_is_none(monkeypatch):
    monkeypatch.setattr("tercet.cluster.members.ASK_PORTS_EVERY_S", 0.0)

    class Hiccup(FakeStarter):
        def __init__(self) -> None:
            super().__init__()
            self.asked: Counter[Any] = Counter()

        async def ask_ports(self, info: Any, timeout_s: float) -> None:
            self.asked[info] += 1
            if self.asked[info] % 2:
                await asyncio.sleep(0.02)  # longer than the deadline
                raise WorkerLost("busy")

    starter = Hiccup()
    cluster = controller(starter, [], health_deadline_s=0.01)
    await cluster.bring_up()
    running = asyncio.create_task(cluster.run(asyncio.Event()))
    await until(lambda: starter.asked.total() > 30)
    assert starter.killed == []
    running.cancel()
    await cluster.end_now()


async def test_a_bug_in_a_member_is_not_swallowed():
    class Broken(FakeStarter):
        async def launch(self, member_id: str, epoch: int, target: Target) -> FakeMember:
            raise ZeroDivisionError

    cluster = controller(Broken(), [])
    with pytest.raises(ZeroDivisionError):
        await cluster.bring_up()
    await cluster.end_now()


async def test_a_call_is_cancelled_also_as_its_answer_comes():
    """Else a drain waits for ever for a task that goes on watching."""
    answers = []

    class Health:
        def remote(self):
            answers.append(asyncio.get_running_loop().create_future())
            return answers[-1]

    class Handle:
        health = Health()

    async def watch():
        while True:
            await actor.call("health", timeout_s=10)

    actor = Actor("worker-1", Handle(), None)
    task = asyncio.create_task(watch())
    await asyncio.sleep(0)
    answers[0].set_result({})
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task], timeout=1)
    assert task.cancelled()


def test_a_death_names_the_folder_of_its_log(monkeypatch):
    monkeypatch.setattr(launcher, "log_folder", lambda: "/somewhere/logs")
    assert str(launcher._death("worker-1", RayActorError())).endswith(
        "; while Ray runs, its node keeps its log in /somewhere/logs"
    )
