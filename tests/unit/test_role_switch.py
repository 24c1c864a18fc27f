"""A worker gets another role: where it may, what the controller does, and what whoever asked is told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tercet.cluster.actors import GatewayActor
from tercet.cluster.controller import Controller
from tercet.cluster.members import Target
from tercet.cluster.reconcile import State
from tercet.cluster.set_role import RoleSet, missing
from tercet.core import Role
from tercet.errors import ClusterError, SpecError, UnsupportedSpec, WorkerLost
from tercet.metrics import Metrics
from tercet.placement.roles import Node, plan
from tercet.placement.switching import switched
from tercet.spec import ClusterSpec, NetworkSpec, PoolSpec, RaySpec, RoleSpec
from tests.unit.test_controller import FakeStarter, until

NODE = Node("a", "10.0.0.1", {"zone": "x"}, {"CPU": 8.0, "GPU": 1.0})


def spec_of(prefill: dict[str, Any] | None = None, decode: dict[str, Any] | None = None, **more: Any) -> ClusterSpec:
    """Two workers of each."""
    roles = {
        Role.PREFILL: RoleSpec(replicas=2, **prefill or {}),
        Role.DECODE: RoleSpec(replicas=2, **decode or {}),
    }
    return ClusterSpec(roles=roles, network=NetworkSpec(host="node"), **more)


def roles_of(placement: Any) -> dict[str, str]:
    return {worker.worker_id: worker.role.value for worker in placement.workers}


def test_a_worker_keeps_its_place_and_becomes_the_newest_of_its_role():
    spec = spec_of({"cpus": 2.0, "cpu_affinity": [0, 1]}, {"cpu_affinity": [2, 3, 4]})
    before = plan(spec, [NODE])
    changed, after = switched(spec, before, "worker-0", "decode")
    assert {role.value: wanted.replicas for role, wanted in changed.roles.items()} == {"prefill": 1, "decode": 3}
    assert list(roles_of(after).items()) == [
        ("worker-1", "prefill"), ("worker-2", "decode"), ("worker-3", "decode"), ("worker-0", "decode")
    ]  # fmt: skip
    moved = after.workers[-1]
    assert (moved.node, moved.needs, moved.cores) == (NODE, {"CPU": 2.0}, (4,))
    assert plan(changed, [NODE], after.workers) == after  # what a later scale starts from
    _, back = switched(changed, after, "worker-0", "prefill")
    assert roles_of(back) == roles_of(before)
    assert {worker.worker_id: worker.cores for worker in back.workers} == {
        worker.worker_id: worker.cores for worker in before.workers
    }


GPUS = {"pools": {"default": PoolSpec(), "gpus": PoolSpec(accelerator="gpu"), "y": PoolSpec(labels={"zone": "y"})}}


@pytest.mark.parametrize(
    ("worker", "role", "decode", "error", "said"),
    [
        ("worker-9", "decode", {}, SpecError, r"no worker worker-9; the workers of tercet are worker-0 \(prefill\), "),
        ("worker-0", "encode", {}, SpecError, "topology pd has no role encode; .* are prefill, decode"),
        ("worker-0", "prefill", {}, SpecError, "it is prefill already"),
        ("worker-0", "decode", {"cpus": 2.0}, ClusterError, "decode takes 2 CPU of a worker, and it was given 1"),
        (
            "worker-0",
            "decode",
            {"pool": "gpus"},
            ClusterError,
            "pool gpus of decode is of gpus, and its own, default, of",
        ),
        ("worker-0", "decode", {"pool": "y"}, ClusterError, "pool y is of nodes with zone=y, which 10.0.0.1 is not"),
        ("worker-0", "decode", {"cpu_affinity": [4, 5]}, ClusterError, "has no core left for worker-0"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(worker, role, decode, error, said):
    placement = plan(spec_of(**GPUS), [NODE])
    if "cpu_affinity" in decode:
        placement = plan(spec_of(None, decode), [NODE])
    with pytest.raises(error, match=said):
        switched(spec_of(None, decode, **GPUS), placement, worker, role)


def test_no_role_is_left_without_a_worker():
    spec = ClusterSpec(roles={Role.PREFILL: RoleSpec(), Role.DECODE: RoleSpec()})
    with pytest.raises(SpecError, match="prefill cannot have 0 workers: without one no request can be served"):
        switched(spec, plan(spec, [NODE]), "worker-0", "decode")


PHASES = {"drain": State.DRAINING, "switch": State.SWITCHING}


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch):
    monkeypatch.setattr("tercet.cluster.controller.LOOK_EVERY_S", 0.01)


class Cluster:
    """A controller over fake members, and what users ask of it. worker-0 and -1 prefill, worker-2 and -3 decode."""

    def __init__(self, **ray: float) -> None:
        self.starter, self.reports = FakeStarter(), list[str]()
        spec = spec_of(ray=RaySpec(start_timeout_s=20.0, **ray))
        self.controller = Controller(Target(spec, plan(spec, [NODE])), self.starter, self.reports.append)

    async def ask(self, name: str, **change: Any) -> dict[str, str]:
        """-> the controller's answer."""
        self.starter.asked = [{"id": name, **change}]
        await until(lambda: name in self.starter.noted.get("answers", {}))
        return self.starter.noted["answers"][name]

    async def outcome(self, name: str) -> dict[str, Any]:
        await until(lambda: name in self.starter.noted["switches"])
        return self.starter.noted["switches"][name]

    def calls(self, name: str) -> list[str]:
        return [method for who, method in self.starter.calls if who == name and method not in {"health", "loading"}]

    def state(self, worker: str) -> State:
        return self.controller._slots[worker].member.state


@contextlib.asynccontextmanager
async def served(**ray: float) -> AsyncIterator[Cluster]:
    made, stop = Cluster(**ray), asyncio.Event()
    await made.controller.bring_up()
    running = asyncio.create_task(made.controller.run(stop))
    async with asyncio.timeout(20):
        yield made
        stop.set()
        await running
        await made.controller.shut_down()


async def test_a_worker_drains_and_switches_in_its_process():
    async with served() as made:
        made.starter.calls.clear()
        assert await made.ask("a", worker="worker-1", role="decode") == {}
        outcome = await made.outcome("a")
        assert outcome["how"] == "in_place"
        assert 0 <= outcome["drain_s"] <= outcome["seconds"]
        assert set(made.starter.told) == {"worker-0@1", "worker-1@2", "worker-2@1", "worker-3@1"}
        assert made.calls("worker-1@1") == ["drain", "switch"]
        order = [method for who, method in made.starter.calls if who == "worker-1@1" or method == "set_workers"]
        told = [method for method in order if method not in {"health", "loading"}]
        assert told == ["set_workers", "drain", "switch", "set_workers"]
        assert made.starter.killed == []
        assert made.starter.noted["target"] == {"prefill": 1, "decode": 3}
        assert (
            made.starter.noted["members"]["worker-1"] | {"role": "decode", "epoch": 2}
            == (made.starter.noted["members"]["worker-1"])
        )
        assert any(line.startswith("worker-1, which was prefill, serves as decode: 0.") for line in made.reports)
        answer = await made.ask("b", worker="worker-1", role="decode")
        assert answer == {
            "code": "spec_error",
            "message": "worker-1 cannot become decode: it is decode already; it stays at 1 prefill, 3 decode",
        }
        answer = await made.ask("c", worker="worker-0", role="decode")
        assert "without one no request can be served" in answer["message"]


async def test_a_worker_that_dies_while_it_drains_starts_in_its_new_role():
    async with served() as made:
        drains = made.starter.hold("drain")
        await made.ask("a", worker="worker-1", role="decode")
        await until(lambda: made.state("worker-1") is State.DRAINING)
        made.starter.members["worker-1"].fault = WorkerLost("worker-1 died")
        outcome = await made.outcome("a")
        drains.set()
        assert (outcome["how"], outcome["drain_s"]) == ("restarted", 0.0)
        assert "worker-1@2" in made.starter.told
        assert made.starter.noted["members"]["worker-1"]["role"] == "decode"


@pytest.mark.parametrize("end", ["killed", "stopped"])
async def test_a_worker_that_dies_while_it_switches_starts_in_its_new_role(end):
    """Also one that is stopped, which is noticed as one that is silent."""
    async with served(health_deadline_s=0.1) as made:
        made.starter.hold("switch")
        await made.ask("a", worker="worker-1", role="decode")
        await until(lambda: made.state("worker-1") is State.SWITCHING)
        if end == "killed":
            made.starter.members["worker-1"].fault = WorkerLost("worker-1 died")
        else:
            made.starter.stopped = {"worker-1@1"}
        assert (await made.outcome("a"))["how"] == "restarted"
        assert "worker-1@3" in made.starter.told
        assert made.starter.killed == ["worker-1@1"]
        assert made.starter.noted["members"]["worker-1"]["role"] == "decode"


async def test_a_role_that_the_worker_refuses_is_taken_back_and_the_reason_told():
    async with served() as made:
        switches = made.starter.hold("switch")
        await made.ask("a", worker="worker-1", role="decode")
        await until(lambda: made.state("worker-1") is State.SWITCHING)
        made.starter.refusal = UnsupportedSpec("the model does not fit")
        switches.set()
        outcome = await made.outcome("a")
        assert (outcome["how"], outcome["code"]) == ("failed", "unsupported_spec")
        assert outcome["message"] == ("worker-1 cannot be decode and is to be prefill again: the model does not fit")
        await until(lambda: "worker-1@3" in made.starter.told)
        assert made.starter.noted["members"]["worker-1"]["role"] == "prefill"
        assert made.starter.noted["target"] == {"prefill": 2, "decode": 2}


@pytest.mark.parametrize(
    ("later", "said", "members", "role"),
    [
        ({"worker": "worker-1", "role": "prefill"}, "worker-1 is to be prefill", 4, "prefill"),
        ({"role": "decode", "replicas": 2}, "worker-1 is to go", 3, None),
    ],
)
@pytest.mark.parametrize("phase", ["drain", "switch"])
async def test_a_later_request_ends_an_earlier_one(later, said, members, role, phase):
    async with served() as made:
        held = made.starter.hold(phase)
        await made.ask("a", worker="worker-1", role="decode")
        await until(lambda: made.state("worker-1") is PHASES[phase])
        assert await made.ask("b", **later) == {}
        outcome = await made.outcome("a")
        assert outcome["how"] == "superseded"
        assert said in outcome["message"]
        held.set()
        await until(lambda: len(made.starter.told) == members and len(made.starter.noted["members"]) == members)
        assert made.starter.noted["members"].get("worker-1", {}).get("role") == role


@pytest.mark.parametrize("phase", ["drain", "switch"])
async def test_a_cluster_that_ends_meanwhile_waits_for_nobody(phase):
    async with served() as made:
        held = made.starter.hold(phase)
        await made.ask("a", worker="worker-1", role="decode")
        await until(lambda: made.state("worker-1") is PHASES[phase])
        made.starter.stop_requested = True  # as `tercet down` asks
        if phase == "drain":
            held.set()
    assert "worker-1@1" in made.starter.killed


def test_whoever_asked_is_told_what_is_waited_for_and_what_came_of_it():
    done = {"how": "in_place", "seconds": 0.8, "drain_s": 0.3}
    status = {
        "answers": {},
        "switches": {},
        "members": {"worker-1": {"state": "draining", "reason": ""}},
        "workers": {"worker-1": {"role": "decode", "load": None}},
    }

    def waits_for(**more: Any) -> str:
        return missing(status | more, "a", "worker-1", "decode")

    answered = {"answers": {"a": {}}}
    assert waits_for() == "the controller has not answered yet"
    assert waits_for(**answered) == "worker-1 is draining"
    assert waits_for(**answered, switches={"a": done}) == "worker-1 is not in use yet"
    used = {"worker-1": {"role": "decode", "load": {}}}
    assert waits_for(**answered, switches={"a": done}, workers=used) == ""
    failed = {"how": "failed", "code": "unsupported_spec", "message": "too large"}
    with pytest.raises(UnsupportedSpec, match="too large"):
        waits_for(**answered, switches={"a": failed})
    with pytest.raises(SpecError, match="it is decode already"):
        waits_for(answers={"a": {"code": "spec_error", "message": "it is decode already"}})
    took = "after 0.80 s, 0.30 s of them to drain"
    is_set = RoleSet("c", "worker-1", "decode", **done)
    assert str(is_set) == f"cluster c: worker-1 serves as decode, in its process, {took}"
    again = replace(is_set, how="restarted")
    assert str(again) == f"cluster c: worker-1 serves as decode, in a new process, {took}"


async def test_a_gateway_counts_each_switch_once_and_none_of_an_earlier_gateways():
    actor, metrics = GatewayActor(spec_of(), "secret"), Metrics()
    actor._gateway = metrics
    switches = {"a": {"how": "in_place", "seconds": 0.2}}
    members = {"worker-1": {"role": "decode", "state": "starting", "epoch": 2}}
    overview = {"target": {"decode": 1}, "members": members, "answers": {}, "switches": switches}
    await actor.note(overview)
    for more in ({"b": {"how": "in_place", "seconds": 0.3}}, {}, {"c": {"how": "failed", "seconds": 9.0}}):
        switches = switches | more
        await actor.note(overview | {"switches": switches})
    found = {
        (sample.name, sample.labels.get("how") or sample.labels.get("state")): sample.value
        for family in text_string_to_metric_families(metrics.exposition().decode())
        for sample in family.samples
    }
    assert (found["tercet_workers", "starting"], found["tercet_workers", "live"]) == (1, 0)
    assert found["tercet_role_switches_total", "in_place"] == 1
    assert found["tercet_role_switches_total", "failed"] == 1
    assert found["tercet_role_switch_seconds_count", None] == 1
    assert found["tercet_role_switch_seconds_sum", None] == pytest.approx(0.3)
