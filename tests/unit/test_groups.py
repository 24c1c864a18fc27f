"""A worker of several ranks as one member: what its ranks are asked, and what comes of a rank that fails."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tercet.cluster import actors, preflight
from tercet.cluster.actors import RankActor, WorkerActor
from tercet.cluster.cli import app
from tercet.cluster.group import GroupActor
from tercet.cluster.members import Slot, Target, overview
from tercet.cluster.reconcile import Member, State
from tercet.cluster.spec_file import load_spec
from tercet.cluster.tables import experts_table, placement_table, plan_table, status_table
from tercet.core import ExpertRows, Load, Moves, Role, WorkerInfo
from tercet.errors import ClusterError, ModelFileMissing, SpecError, TercetError, UnsupportedSpec, WorkerLost
from tercet.models.config import MixtureConfig
from tercet.models.sources import load_config
from tercet.placement.roles import Node, plan
from tercet.placement.switching import switched
from tercet.spec import ClusterSpec, ModelSpec, NetworkSpec, ParallelSpec, PoolSpec, RoleSpec
from tests.tiny import tiny_model
from tests.unit.test_controller import FakeStarter, controller, until
from tests.unit.test_spec_file import LOCAL

INFO = WorkerInfo("worker-0", Role.DECODE, 1, "127.0.0.1:1", "", "same", pid=10, node="vm")


class FakeRank:
    """A rank's actor: remembers what it was asked, and fails or hangs as the test says."""

    others = ()

    def __init__(self, number: int) -> None:
        self.name, self.asked, self.killed = f"worker-0 rank {number}", list[tuple[object, ...]](), False
        self.faults: dict[str, TercetError] = {}  # method -> what it raises
        self.hangs: set[str] = set()
        self.cancelled: list[str] = []
        self.died = asyncio.Event()
        self.lost: list[int] = []  # ranks that the others go on without
        self._number = number

    async def call(self, method: str, *args: object, timeout_s: float) -> Any:
        self.asked.append((method, *args))
        if method in self.faults:
            raise self.faults[method]
        if method == "until_end" or method in self.hangs:
            await self._until_death(method)
        answers = {"listen": "127.0.0.1:9", "health": f"load of {self._number}", "lost_ranks": self.lost}
        started = INFO if self._number == 0 else {"pid": 10 + self._number, "node": "vm"}
        return started if method == "start" else answers.get(method)

    async def _until_death(self, method: str) -> None:
        try:
            await self.died.wait()
        except asyncio.CancelledError:
            self.cancelled.append(method)
            raise
        raise WorkerLost(f"{self.name} died")

    async def kill(self) -> None:
        self.killed = True


def group_of(count: int = 3) -> tuple[GroupActor, list[FakeRank]]:
    ranks = [FakeRank(number) for number in range(count)]

    async def new(number: int) -> FakeRank:
        ranks[number], ranks[0].lost = FakeRank(number), []
        return ranks[number]

    return GroupActor("worker-0", ranks, new), ranks


async def test_it_listens_then_all_start_and_the_others_join():
    group, ranks = group_of()
    assert await group.call("start", timeout_s=5.0) == INFO
    assert ranks[0].asked == [("listen",), ("start",)]
    for rank in ranks[1:]:
        assert sorted(rank.asked) == [("start", "127.0.0.1:9"), ("until_end",)]
        assert rank.cancelled == []
    await group.kill()
    assert [rank.cancelled for rank in ranks[1:]] == [["until_end"]] * 2
    assert list(group.others) == [{"rank": 1, "pid": 11, "node": "vm"}, {"rank": 2, "pid": 12, "node": "vm"}]


@pytest.mark.parametrize("number", [0, 1, 2])
async def test_a_rank_that_cannot_start_fails_the_start_with_its_error(number):
    group, ranks = group_of()
    for rank in ranks:
        rank.hangs = {"start"}  # it waits for the others
    ranks[number].faults["start"] = ModelFileMissing(f"no file for {number}")
    with pytest.raises(ModelFileMissing, match=f"no file for {number}"):
        await group.call("start", timeout_s=5.0)
    assert all("start" in rank.cancelled for rank in ranks if rank is not ranks[number])


async def test_no_rank_starts_if_rank_0_cannot_listen():
    group, ranks = group_of()
    ranks[0].faults["listen"] = ClusterError("no port")
    with pytest.raises(ClusterError, match="no port"):
        await group.call("start", timeout_s=5.0)
    assert [rank.asked for rank in ranks[1:]] == [[], []]


@pytest.mark.parametrize("number", [0, 1, 2])
async def test_a_rank_that_dies_fails_the_start_also_if_it_had_joined(number):
    group, ranks = group_of()
    ranks[0].hangs = {"start"}
    starting = asyncio.create_task(group.call("start", timeout_s=5.0))
    await asyncio.sleep(0.02)
    ranks[number].died.set()
    with pytest.raises(WorkerLost, match=f"worker-0 rank {number} died"):
        await starting


async def test_health_is_rank_0s_and_fails_once_any_rank_has_ended():
    group, ranks = group_of()
    await group.call("start", timeout_s=5.0)
    assert await group.call("health", timeout_s=5.0) == "load of 0"
    ranks[2].died.set()
    await asyncio.sleep(0.01)
    with pytest.raises(WorkerLost, match="rank 2 died"):
        await group.call("health", timeout_s=5.0)
    await group.kill()
    group, ranks = group_of()
    ranks[0].faults["health"] = WorkerLost("worker-0: rank 1 of the group is gone")
    with pytest.raises(WorkerLost, match="rank 1 of the group is gone"):
        await group.call("health", timeout_s=5.0)


async def test_a_rank_that_the_others_go_on_without_comes_back_as_another_process():
    group, ranks = group_of()
    await group.call("start", timeout_s=5.0)
    before = ranks[1]
    before.died.set()
    ranks[0].lost = [1]
    assert await group.call("health", timeout_s=5.0) == "load of 0"
    assert group.others[0] == {"rank": 1, "pid": 0, "node": "", "lost": True}
    await until(lambda: ranks[1] is not before and not group._coming)
    assert before.killed
    assert sorted(ranks[1].asked) == [("start", "127.0.0.1:9"), ("until_end",)]
    assert group.others[0] == {"rank": 1, "pid": 11, "node": "vm"}
    ranks[0].lost = []
    assert await group.call("health", timeout_s=5.0) == "load of 0"
    await group.kill()


async def test_a_rank_0_that_does_not_answer_while_others_end_is_lost(monkeypatch):
    monkeypatch.setattr("tercet.cluster.group.SOON_S", 0.05)
    group, ranks = group_of()
    await group.call("start", timeout_s=5.0)
    ranks[0].hangs = {"health"}
    asking = asyncio.create_task(group.call("health", timeout_s=30.0))
    await asyncio.sleep(0.02)
    ranks[1].died.set()
    with pytest.raises(WorkerLost, match="a rank has ended, and rank 0 does not answer"):
        await asking
    await group.kill()


async def test_one_that_cannot_come_back_is_tried_again(monkeypatch):
    monkeypatch.setattr("tercet.cluster.group.AGAIN_S", 0.01)
    group, ranks = group_of()
    await group.call("start", timeout_s=5.0)
    ranks[0].lost, made = [2], []

    async def new(number: int) -> FakeRank:
        ranks[number] = FakeRank(number)
        made.append(ranks[number])
        ranks[0].lost = [2] if len(made) == 1 else []
        if len(made) == 1:
            ranks[number].faults["start"] = WorkerLost("it died at once")
        return ranks[number]

    group._new = new
    for _ in range(2):
        await group.call("health", timeout_s=5.0)
        await until(lambda: not group._coming)
    assert [rank.killed for rank in made] == [True, False]
    assert group.others[1] == {"rank": 2, "pid": 12, "node": "vm"}
    await group.kill()


async def test_legs_are_drained_by_rank_0_alone():
    group, ranks = group_of()
    await group.call("drain", 3.0, timeout_s=5.0)
    assert [rank.asked for rank in ranks] == [[("drain", 3.0)], [], []]


async def test_all_are_stopped_and_killed_also_if_one_has_died():
    group, ranks = group_of()
    ranks[1].faults["stop"] = WorkerLost("worker-0 rank 1 died")
    with pytest.raises(WorkerLost, match="rank 1 died"):
        await group.call("stop", timeout_s=5.0)
    assert [rank.asked for rank in ranks] == [[("stop",)]] * 3
    await group.kill()
    assert all(rank.killed for rank in ranks)


async def test_it_serves_again_as_new_processes_only():
    """The controller then starts it anew, as it does for a worker that cannot give up its memory."""
    group, ranks = group_of()
    with pytest.raises(WorkerLost, match="worker-0 has several ranks, which serve again as new processes only"):
        await group.call("switch", Role.DECODE, 2, (), timeout_s=5.0)
    assert [rank.asked for rank in ranks] == [[], [], []]


class GroupStarter(FakeStarter):
    """Whose worker-1 is a group of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[list[FakeRank]] = []

    async def launch(self, member_id: str, epoch: int, target: Target) -> Any:
        if member_id != "worker-1":
            return await super().launch(member_id, epoch, target)
        group, ranks = group_of()
        self.groups.append(ranks)
        return group


async def test_a_rank_that_dies_is_the_end_of_its_group_which_starts_anew_with_the_next_epoch(monkeypatch):
    monkeypatch.setattr("tercet.cluster.controller.LOOK_EVERY_S", 0.01)
    starter, reports, stop = GroupStarter(), [], asyncio.Event()
    cluster = controller(starter, reports)
    await cluster.bring_up()
    running = asyncio.create_task(cluster.run(stop))
    starter.groups[0][2].died.set()
    await until(lambda: len(starter.groups) == 2 and starter.noted["members"]["worker-1"]["state"] == "live")
    assert starter.noted["members"]["worker-1"]["epoch"] == 2
    assert [rank.killed for rank in starter.groups[0]] == [True] * 3
    assert any("(epoch 1) lost: worker_lost: worker-0 rank 2 died" in line for line in reports)
    stop.set()
    await running
    await cluster.shut_down()
    assert [rank.asked[-1] for rank in starter.groups[1]] == [("stop",)] * 3
    assert [rank.killed for rank in starter.groups[1]] == [True] * 3


# ---- the actors


@pytest.fixture
def made(monkeypatch) -> list[Any]:
    """What was made of the roles' classes, instead of them."""
    found: list[Any] = []

    class Role_:
        def __init__(self, *args: object, **named: object) -> None:
            self.args, self.named, self.calls = args, named, list[tuple[object, ...]]()
            found.append(self)

        async def listen(self) -> str:
            self.calls.append(("listen",))
            return "127.0.0.1:9"

        async def start(self, *args: object) -> WorkerInfo:
            self.calls.append(("start", *args))
            return INFO

    async def watch() -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(actors, "end_with_raylet", watch)
    monkeypatch.setattr("tercet.roles.worker.Worker", Role_)
    monkeypatch.setitem(sys.modules, "tercet.roles.rank", SimpleNamespace(Rank=Role_))
    return found


async def test_a_rank_gets_its_number_and_joins_the_endpoint(made):
    spec = spec_of()
    actor = RankActor("worker-0", 3, Role.DECODE, 7, spec, (4, 5), "secret")
    place = await actor.start("127.0.0.1:9")
    assert made[0].args[:8] == ("worker-0", 3, Role.DECODE, 7, spec, "127.0.0.1", "secret", (4, 5))
    assert made[0].calls == [("start", "127.0.0.1:9")]
    assert place["pid"] == os.getpid()
    waiting = asyncio.create_task(actor.until_end())
    await asyncio.sleep(0.02)
    assert not waiting.done()
    waiting.cancel()
    actor._watch.cancel()


@pytest.mark.parametrize("grouped", [False, True])
async def test_rank_0_listens_and_starts_as_one_object(made, grouped):
    actor = WorkerActor("worker-0", Role.DECODE, 7, spec_of(), (4, 5), "secret")
    if grouped:
        assert await actor.listen() == "127.0.0.1:9"
    assert await actor.start() == INFO
    assert [call for each in made for call in each.calls] == [*([("listen",)] if grouped else []), ("start",)]
    assert made[0].named == {"cores": (4, 5)}
    actor._watch.cancel()


# ---- what is said of groups


def spec_of(decode: RoleSpec | None = None, host: str = "loopback", **more: Any) -> ClusterSpec:
    roles = {Role.PREFILL: RoleSpec(replicas=2), Role.DECODE: decode or RoleSpec()}
    return ClusterSpec(roles=roles, network=NetworkSpec(host=host), **more)


def nodes_of(*cpus: float) -> list[Node]:
    return [Node(str(i), f"10.0.0.{i}", {"zone": "x"}, {"CPU": n}) for i, n in enumerate(cpus)]


def shown(table: Any) -> str:
    console = Console(width=200, record=True)
    console.print(table)
    return console.export_text()


def test_plan_shows_ranks_on_nodes_and_their_cores():
    decode = RoleSpec(
        parallelism=ParallelSpec(tensor=2, data=2, expert=4, expert_redundancy=4),
        threads=2,
        cpu_affinity=[0, 1, 2, 3, 4, 5],
    )
    spec = spec_of(decode, "node")
    lines = shown(plan_table(spec, plan(spec, nodes_of(2.0, 3.0, 2.0)))).splitlines()
    at = next(number for number, line in enumerate(lines) if "worker-2" in line)
    text = " ".join(lines[at : at + 5])
    for told in (
        "10.0.0.1 zone=x: ranks 0, 1", "10.0.0.0 zone=x: ranks 2, 3",
        "4 ranks (tensor 2, data 2, expert 4, expert_redundancy 4), each 1 CPU, 2 threads",
        "rank 0 on cores 0, 1", "rank 1 on cores 2, 3", "rank 2 on cores 0, 1", "rank 3 on cores 2, 3",
        "16,384 tokens of KV",
    ):  # fmt: skip
        assert told in text
    one = shown(plan_table(spec_of(), plan(spec_of(), nodes_of(4.0))))
    assert "rank" not in one
    assert "1 CPU, 1 thread " in one


def test_status_shows_a_rank_a_line():
    group, _ = group_of()
    group.others = [{"pid": 11, "node": "vm"}, {"pid": 12, "node": "other"}]
    target = Target(spec_of(), plan(spec_of(), nodes_of(4.0)))
    slot = Slot("worker-0", Member(1, State.LIVE, 0.0, role="decode"), actor=group, info=INFO)
    members = overview(target, {"worker-0": slot})["members"]
    assert members["worker-0"]["ranks"] == group.others
    slot.actor = FakeRank(0)
    assert "ranks" not in overview(target, {"worker-0": slot})["members"]["worker-0"]
    status = {"name": "c", "ready": True, "http_url": "h", "grpc_address": "g", "pid": 1, "node": "vm"}
    lines = shown(status_table(status | {"target": {}, "workers": {}, "members": members})).splitlines()
    rows = [line.split() for line in lines if "rank" in line]
    assert rows == [["rank", "1", "11", "vm"], ["rank", "2", "12", "other"]]
    group.others[1] = {"pid": 0, "node": "", "lost": True}
    slot.actor = group
    members = overview(target, {"worker-0": slot})["members"]
    lines = shown(status_table(status | {"target": {}, "workers": {}, "members": members})).splitlines()
    assert [line.split() for line in lines if "rank 2" in line] == [["rank", "2", "lost"]]


@pytest.mark.parametrize(
    ("nodes", "crossing"),
    [
        ("aaaa", [0, 0, 0, 0]),
        ("aabb", [0, 0, 0, 0]),
        ("abab", [2, 10, 2, 10]),
        ("abbc", [2, 10, 2, 10]),
        ("a aa", [0, 0, 0, 0]),  # a lost one
    ],
)
def test_bytes_to_other_nodes_are_told_of_each_stage(nodes, crossing):
    """Two stages of two ranks."""
    rows = tuple(ExpertRows(rank, (), (), (), ((0, 2), (10, 0))[rank % 2]) for rank in range(4))
    actor = SimpleNamespace(others=[{"rank": rank, "pid": 1, "node": nodes[rank].strip()} for rank in (1, 2, 3)])
    info = replace(INFO, node=nodes[0])
    slot = Slot("w", Member(1, State.LIVE, 0.0, role="decode"), actor=actor, info=info, status=Load(experts=rows))
    told = overview(Target(spec_of(), plan(spec_of(), nodes_of(4.0))), {"w": slot})["members"]["w"]["experts"]
    assert [each["crossing_bytes"] for each in told] == crossing


def test_status_shows_who_computed_which_experts():
    target = Target(spec_of(), plan(spec_of(), nodes_of(4.0)))
    load = Load(experts=(ExpertRows(0, (0, 1, 2, 5), (9000, 0, 0, 345), (1, 2)), ExpertRows(2, (3, 4), (0, 3115), ())))
    slots = {
        name: Slot(name, Member(1, State.LIVE, 0.0, role="decode"), info=INFO, status=status)
        for name, status in (("worker-0", load), ("worker-1", Load()), ("worker-2", {}))
    }
    members = json.loads(json.dumps(overview(target, slots)["members"]))
    assert members["worker-0"]["experts"][0] == {
        "rank": 0, "experts": [0, 1, 2, 5], "rows": [9000, 0, 0, 345], "routed": [1, 2],
        "sent_to": [], "crossing_bytes": 0,
    }  # fmt: skip
    assert not any("experts" in members[name] for name in ("worker-1", "worker-2"))
    lines = shown(experts_table({"members": members})).splitlines()
    assert [line.replace("│", " ").split() for line in lines if "worker-0" in line] == [
        ["worker-0", "0", "0-2,", "5", "9,345", "75%"],
        ["worker-0", "2", "3-4", "3,115", "25%"],
    ]
    assert experts_table({"members": {"worker-1": members["worker-1"]}}).row_count == 0


def test_status_shows_how_experts_were_placed_anew():
    def member(placing: dict[str, object], **moves: object) -> dict[str, object]:
        return {"moves": asdict(Moves(**moves)), "placing": placing}

    members = {
        "worker-0": member({"outcome": "kept: ranks are even"}, epoch=3, done=1, moved_bytes=4096),
        "worker-1": member({}, epoch=1, layers_left=2),
        "worker-2": member({"outcome": "2 layers placed anew"}, failed=1, alarm="worker_lost: gone"),
        "worker-3": member({}),
        "worker-4": {},
        "worker-5": member({}, epoch=2, done=1),
    }
    lines = shown(placement_table({"members": members})).splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "worker-" in line]
    assert rows == [
        ["worker-0", "3", "4,096 bytes", "kept: ranks are even"],
        ["worker-1", "1", "0 bytes", "2 layers to go"],
        ["worker-2", "0", "0 bytes", "worker_lost: gone"],
        ["worker-5", "2", "0 bytes", ""],
    ]


@pytest.mark.parametrize(
    ("worker", "role", "said"),
    [
        ("worker-2", "prefill", "worker-2 is a group of 2 ranks, which keeps its role; use `tercet scale`"),
        ("worker-0", "decode", "a worker of decode is a group of 2 ranks, which keeps its role"),
    ],
)
def test_a_group_keeps_its_role(worker, role, said):
    spec = spec_of(RoleSpec(replicas=2, parallelism=ParallelSpec(tensor=2)))
    with pytest.raises(ClusterError, match=said):
        switched(spec, plan(spec, nodes_of(9.0)), worker, role)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("roles.decode.parallelism.expert=4", "roles.decode.parallelism.expert: 4 is neither 1 nor 1"),
        ("roles.decode.parallelism={data: 2}", "roles.decode.parallelism.data: 2 ranks that share no experts"),
        ("roles.decode.parallelism.tensors=2", "parallelism.tensors: unknown key; did you mean tensor?"),
        ("roles.decode.parallelism.tensor=0", "roles.decode.parallelism.tensor: must be at least 1, got 0"),
        ("roles.decode.parallel.tensor=2", "roles.decode.parallel: unknown key; did you mean parallelism?"),
    ],
)
def test_a_fault_of_parallelism_is_one_line_with_its_path(setting, said):
    with pytest.raises(SpecError) as caught:
        load_spec(LOCAL, [setting])
    assert f"--set {setting}: " in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_encode_worker_is_a_single_process():
    settings = ["topology=epd", "roles.encode={pool: cpu, parallelism: {tensor: 2}}"]
    with pytest.raises(UnsupportedSpec, match=r"roles.encode.parallelism: 2 ranks, but an encode worker is a single"):
        load_spec(LOCAL, settings)


@pytest.mark.parametrize(
    ("degrees", "said"),
    [
        ({"tensor": 16}, r"roles.decode.parallelism.tensor: 16 does not divide the model's \d+ attention heads"),
        ({"pipeline": 100}, r"roles.decode.parallelism.pipeline: 100 is more than the model's \d+ layers"),
        ({"data": 2, "expert": 2}, "roles.decode.parallelism.expert: 2 ranks for experts, and the model has 0 experts"),
    ],
)
def test_a_model_that_cannot_be_divided_so_is_refused_before_anything_starts(degrees, said):
    spec = spec_of(RoleSpec(parallelism=ParallelSpec(**degrees)), model=ModelSpec(source=tiny_model(), max_context=64))
    with pytest.raises(UnsupportedSpec, match=said):
        preflight.check_model(spec, print)


@pytest.mark.parametrize(("accelerator", "counted"), [("cpu", True), ("gpu", False)])
def test_a_gpu_need_not_hold_what_a_group_divides(monkeypatch, accelerator, counted):
    monkeypatch.setattr(preflight, "_memory_of", lambda device: 1)
    device = {"gpus": 1} if accelerator == "gpu" else {}
    roles = {role: RoleSpec(parallelism=ParallelSpec(tensor=2), **device) for role in (Role.PREFILL, Role.DECODE)}
    pool = PoolSpec(accelerator=accelerator, gpus=4 * len(device))
    spec = ClusterSpec(roles=roles, pools={"default": pool}, model=ModelSpec(source=tiny_model(), max_context=64))
    with pytest.raises(UnsupportedSpec, match="does not fit") if counted else contextlib.nullcontext():
        preflight.refuse_what_does_not_fit(spec)


def test_the_experts_of_a_config_that_has_some_are_counted():
    config = load_config(ModelSpec(source=tiny_model()))
    assert preflight._shape(config).experts == 0
    mixture = MixtureConfig((1,), experts=8, top_k=2, intermediate_size=24, shared_size=48)
    shape = preflight._shape(replace(config, mixture=mixture))
    assert (shape.experts, shape.expert_intermediate, shape.shared_intermediate) == (8, 24, 48)
    assert (shape.layers, shape.kv_heads) == (config.num_layers, config.num_kv_heads)


def test_the_commands_validate_and_plan_a_group():
    degrees = "roles.decode.parallelism={tensor: 3, pipeline: 2}"
    done = CliRunner().invoke(app, ["validate", str(LOCAL), "--set", degrees])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["plan", str(LOCAL), "--set", degrees], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    assert "6 ranks (tensor 3, pipeline 2), each 0.5 CPU, 1 thread" in done.output
    assert "this machine: ranks 0-5" in done.output
    for command in ("validate", "plan"):
        done = CliRunner().invoke(app, [command, str(LOCAL), "--set", "roles.decode.parallelism.tensor=2"])
        assert isinstance(done.exception, UnsupportedSpec)
        assert "2 does not divide the model's 9 attention heads; of 1 to 16, 1, 3 would do" in str(done.exception)
    elsewhere = "model.source=somebody/not-fetched"
    done = CliRunner().invoke(app, ["validate", str(LOCAL), "--set", degrees, "--set", elsewhere])
    assert done.exit_code == 0, done.output
    assert "the model is not here, so whether the degrees divide it was not checked" in done.output
    done = CliRunner().invoke(app, ["spec", str(LOCAL), "--set", degrees])
    for told in ("# ranks that share a layer: each", " tensor: 3\n", "#pipeline: 1  # stages", "threads of one rank"):
        assert told in done.output
