"""When the controller has experts placed anew: by fakes of a worker's answers, and a solver of its own process that is
slow, dies or talks nonsense."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tercet.cluster import rebalancing, solver
from tercet.cluster.experts_cli import _as_json
from tercet.cluster.members import Slot
from tercet.cluster.rebalancing import Rebalancing
from tercet.cluster.reconcile import Member, State
from tercet.cluster.solver import solve_apart
from tercet.cluster.windows import look_at, of_ranks, rows_between
from tercet.core import Load, Moves, WorkerInfo
from tercet.core import Role as R
from tercet.distributed.routed import Routed
from tercet.errors import ClusterError, TercetError, WorkerLost
from tercet.placement.expert_counts import Counts
from tercet.placement.expert_shares import TURNS, check_shares
from tercet.placement.experts.model import Dispatch, Objective
from tercet.placement.experts.weighing import Wish, served, weigh
from tercet.spec import ExpertPlacementSpec

LAYERS, EXPERTS, RANKS = 2, 6, 3
WANTED = ExpertPlacementSpec(window_size=10, step_interval=20)


class Worker:
    """Rank 0's answers. hot: experts that get most rows."""

    def __init__(self, hot: tuple[int, ...] = (0, 1), redundancy: int = 0) -> None:
        self.others: list[dict[str, Any]] = [{"rank": rank, "pid": 10 + rank, "node": "a"} for rank in (1, 2)]
        row = [*range(EXPERTS), *range(redundancy)] if redundancy != EXPERTS else [0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 0, 1]
        self.phy2log, self.hot, self.steps = np.array([row] * LAYERS), hot, 0
        self.load = np.zeros((RANKS, LAYERS, EXPERTS), np.int64)
        self.computed = np.zeros((LAYERS, RANKS), np.int64)
        self.asked: list[list[list[int]]] = []
        self.shares: Any = None  # [L, N, P], as last asked for
        self.error: TercetError | None = None
        self.refuses = self.moves_fail = False
        self.moves = Moves()

    def step(self, count: int) -> None:
        self.steps += count
        rows = np.array([50 if expert in self.hot else 10 for expert in range(EXPERTS)]) * count
        self.load += rows
        per_rank = self.phy2log.shape[1] // RANKS
        for layer, row in enumerate(self.phy2log):
            for slot, expert in enumerate(row):
                self.computed[layer, slot // per_rank] += RANKS * rows[expert] // (row == expert).sum()

    async def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        if self.error is not None:
            raise self.error
        if method == "move_experts":
            self.asked.append(args[0])
            self.shares = args[1]
            if self.refuses:
                raise ClusterError("experts are being moved already")
            if self.moves_fail:
                self.moves = replace(self.moves, failed=self.moves.failed + 1, alarm="peer_down: gone")
            else:
                self.phy2log = np.array(args[0])
            return LAYERS, len(self.asked)
        assert method == "routed"
        shares = None if self.shares is None else np.array(self.shares)
        return Routed(self.load.copy(), self.computed.copy(), self.phy2log.copy(), 2, 1000, shares, steps=self.steps)


@pytest.fixture
def solved_here(monkeypatch):
    """As `solve_apart`, without a process, which takes seconds to start."""

    async def solved(counts: Counts, wanted: ExpertPlacementSpec, *, keep: bool = False) -> Any:
        told = dict(option.removeprefix("--").split("=") for option in solver._options(wanted, keep=keep))
        wish = Wish(told["policy"], Objective(told["objective"]), Dispatch(told["dispatch"]))
        return json.loads(json.dumps(_as_json(counts, wish, weigh(counts, wish))))

    monkeypatch.setattr(rebalancing, "solve_apart", solved)


def made(worker: Worker, wanted: ExpertPlacementSpec = WANTED) -> tuple[Rebalancing, Slot, list[str]]:
    info = WorkerInfo("worker-0", R.DECODE, 1, "127.0.0.1:1", "", "same", 9, "a")
    slot = Slot("worker-0", Member(1, State.LIVE, 0.0, role="decode"), info=info)
    said: list[str] = []
    return Rebalancing(slot, worker, wanted, said.append), slot, said  # type: ignore[arg-type]


async def looks(its: Rebalancing, worker: Worker, count: int, steps: int = 10) -> None:
    for _ in range(count):
        worker.step(steps)
        its._slot.status = Load(moves=worker.moves)
        try:
            await its._look()
        except ClusterError as error:
            its._failed(error)


async def test_uneven_ranks_are_placed_anew_once_an_interval_is_over():
    worker = Worker()
    its, slot, said = made(worker)
    await looks(its, worker, 2)
    assert not worker.asked
    await looks(its, worker, 1)
    (rows,) = worker.asked
    for row in rows:
        assert sorted(row) == [*range(EXPERTS)]
        ranks = [{*row[at : at + 2]} for at in range(0, EXPERTS, 2)]
        assert all(len(rank & {0, 1}) <= 1 for rank in ranks)  # the hot ones are apart
    assert slot.placing["solves"] == 1
    assert slot.placing["gain"] == pytest.approx(0.4)  # 100 of the busiest rank's rows before, 60 after
    assert slot.placing["bytes"] > 0
    assert "decode worker-0: layers placed anew: 2; busiest ranks -40.0% on held-out counts" in said[0]
    await looks(its, worker, 8)
    assert len(worker.asked) == 1
    assert slot.placing["outcome"] == (
        "kept: at most 22.2% to gain, but traffic is that of the last placement, or still changes"
    )
    assert slot.placing["solves"] == 1
    worker.hot = (4, 5)
    await looks(its, worker, 6)  # an interval may have windows of both
    assert len(worker.asked) == 2
    assert slot.placing["gain"] == pytest.approx(0.4)


async def test_even_ranks_are_left_alone_without_a_solver(monkeypatch):
    monkeypatch.setattr(rebalancing, "solve_apart", None)
    worker = Worker(hot=())
    its, slot, said = made(worker)
    await looks(its, worker, 6)
    assert (worker.asked, said) == ([], [])
    assert slot.placing["outcome"] == "kept: ranks are even, with at most 0.0% to gain"


@pytest.mark.usefixtures("solved_here")
async def test_what_gains_too_little_on_held_out_counts_is_not_applied():
    """One expert has nearly all, so nothing helps without replicas."""
    worker = Worker(hot=(0,))
    worker.hot = ()
    its, slot, _ = made(worker)
    await looks(its, worker, 1)
    real, worker.step = worker.step, lambda count: (real(count), worker.computed.__iadd__([[900, 0, 0]] * LAYERS))
    await looks(its, worker, 3)  # ranks say that they are uneven; routing is even
    assert worker.asked == []
    assert slot.placing["solves"] >= 1
    assert slot.placing["outcome"].startswith("kept: what was found would gain")


async def test_a_placement_that_no_longer_survives_a_rank_is_not_applied(monkeypatch):
    async def solved(counts: Counts, wanted: ExpertPlacementSpec) -> dict[str, Any]:
        return answer(counts, survives=(True, False))

    monkeypatch.setattr(rebalancing, "solve_apart", solved)
    worker = Worker()
    its, slot, _ = made(worker)
    await looks(its, worker, 3)
    assert worker.asked == []
    assert "would not survive" in slot.placing["outcome"]


class Sharing(Worker):
    """Expert 0 has most rows, and replicas on two of three ranks; by turns both get as many."""

    def __init__(self) -> None:
        super().__init__(hot=(0,))
        self.phy2log = np.array([[0, 1, 2, 0, 3, 4, 5, 1, 2]] * LAYERS)

    def step(self, count: int) -> None:
        before = self.load.copy()
        super().step(count)
        rows = (self.load - before).astype(float)
        shares = None if self.shares is None else np.array(self.shares)
        self.computed += served(self.phy2log, rows, shares).reshape(LAYERS, RANKS, -1).sum(axis=2).astype(np.int64)
        self.computed[:] = np.maximum(self.computed, 0)


@pytest.mark.parametrize("policy", ["none", "ilp", "eplb"])
@pytest.mark.usefixtures("solved_here")
async def test_shares_are_solved_anew_between_placements(policy):
    worker = Sharing()
    wanted = ExpertPlacementSpec(policy=policy, window_size=10, step_interval=2000, dispatch_interval=20, min_gain=0.01)
    its, slot, said = made(worker, wanted)
    await looks(its, worker, 3)
    (rows,) = worker.asked
    assert (np.array(rows) == worker.phy2log).all()
    assert np.array(worker.shares).shape == (LAYERS, 1, 9)
    assert "shares of replicas set anew: busiest ranks -" in said[0]
    assert slot.placing["gain"] > 0.01
    await looks(its, worker, 6)
    assert len(worker.asked) == 1, "what is even stays"
    worker.hot = (2,)
    await looks(its, worker, 10)  # windows of both kinds of traffic gain nothing, so the next try is later
    assert len(worker.asked) == 2


async def test_shares_that_gain_nothing_are_solved_less_and_less_often(monkeypatch):
    solves: list[int] = []

    async def solved(counts: Counts, wanted: ExpertPlacementSpec, *, keep: bool = False) -> dict[str, Any]:
        solves.append(worker.steps)
        return answer(counts) | {"after": {"busiest": 100.0}}

    monkeypatch.setattr(rebalancing, "solve_apart", solved)
    worker = Sharing()
    wanted = ExpertPlacementSpec(policy="none", window_size=10, step_interval=20, dispatch_interval=20)
    its, slot, _ = made(worker, wanted)
    await looks(its, worker, 120)
    gaps = [after - before for before, after in itertools.pairwise(solves)]
    assert gaps[:5] == [40, 80, 160, 320, 320]
    assert slot.placing["outcome"] == "shares kept: others would gain 0.0%"


@pytest.mark.usefixtures("solved_here")
async def test_a_placement_brings_its_shares():
    worker = Worker(redundancy=3)
    wanted = ExpertPlacementSpec(window_size=10, step_interval=20, dispatch_interval=10, min_gain=0.01)
    its, _, _ = made(worker, wanted)
    await looks(its, worker, 3)
    (rows,) = worker.asked
    for row, shares in zip(rows, worker.shares, strict=True):
        check_shares(np.array(row), np.array(shares), RANKS)


async def test_shares_without_a_lost_rank_give_it_none(monkeypatch):
    async def solved(counts: Counts, wanted: ExpertPlacementSpec) -> dict[str, Any]:
        return answer(counts) | {"shares": [[[TURNS] * counts.phy2log.shape[1]]] * LAYERS}

    monkeypatch.setattr(rebalancing, "solve_apart", solved)
    worker = Worker(redundancy=EXPERTS)
    its, _, _ = made(worker, ExpertPlacementSpec(window_size=10, step_interval=2000, dispatch_interval=1000))
    await looks(its, worker, 2)
    worker.others[0] = {"rank": 1, "pid": 0, "node": "", "lost": True}
    await looks(its, worker, 1, steps=1)
    shares = np.array(worker.shares)
    assert shares.shape == (LAYERS, 1, 12)
    assert not shares[:, :, 4:8].any()
    assert (shares[:, :, [0, 1, 2, 3, 8, 9, 10, 11]] == TURNS).all()


@pytest.mark.usefixtures("solved_here")
async def test_rows_that_leave_their_node_are_what_internode_counts():
    """Ranks on three nodes; each has requests for other experts than lie there."""
    worker = Worker(hot=())
    worker.others = [{"rank": rank, "pid": 10 + rank, "node": name} for rank, name in ((1, "b"), (2, "c"))]
    real = worker.step

    def step(count: int) -> None:
        real(count)
        for rank in range(RANKS):
            worker.load[rank][:, [(2 * rank + 2) % 6, (2 * rank + 3) % 6]] += 100 * count

    worker.step = step  # type: ignore[method-assign]
    its, slot, said = made(worker, ExpertPlacementSpec(window_size=10, step_interval=20, objective="internode"))
    await looks(its, worker, 3)
    (rows,) = worker.asked
    assert [sorted(rows[0][at : at + 2]) for at in (0, 2, 4)] == [[2, 3], [4, 5], [0, 1]]
    assert "what internode counts -" in said[0]
    assert slot.placing["gain"] > 0.5


def answer(counts: Counts, survives: tuple[bool, bool] = (True, True)) -> dict[str, Any]:
    return {
        "before": {"busiest": 100.0},
        "after": {"busiest": 50.0},
        "survives_a_rank": dict(zip(("before", "after"), survives, strict=True)),
        "layers": [{"gap": None, "seconds": 0.5}, {"gap": 0.25, "seconds": 0.5}],
        "fetched_bytes": 7,
        "phy2log": counts.phy2log[:, ::-1].tolist(),
        "shares": None,
    }


async def test_without_a_lost_rank_the_others_are_placed_at_once(monkeypatch):
    """Only their slots change, once, and again when the rank is back and an interval is over."""
    solved_for: list[Counts] = []

    async def solved(counts: Counts, wanted: ExpertPlacementSpec) -> dict[str, Any]:
        solved_for.append(counts)
        return answer(counts)

    monkeypatch.setattr(rebalancing, "solve_apart", solved)
    worker = Worker(redundancy=EXPERTS)
    before = worker.phy2log.copy()
    its, _, _ = made(worker)
    await looks(its, worker, 2)
    assert not worker.asked
    worker.others[0] = {"rank": 1, "pid": 0, "node": "", "lost": True}
    worker.load[1] = worker.computed[:, 1] = 0
    await looks(its, worker, 1, steps=1)
    (counts,) = solved_for
    assert (counts.ranks, counts.load.shape[1]) == (2, 2)
    assert (counts.phy2log == before[:, [0, 1, 2, 3, 8, 9, 10, 11]]).all()
    (rows,) = worker.asked
    assert (np.array(rows)[:, 4:8] == before[:, 4:8]).all()
    assert (np.array(rows)[:, [0, 1, 2, 3, 8, 9, 10, 11]] == counts.phy2log[:, ::-1]).all()
    await looks(its, worker, 5)
    assert len(worker.asked) == 1


async def test_a_move_and_its_end_are_reported():
    worker = Worker(hot=())
    its, slot, said = made(worker)
    slot.status = Load(moves=Moves(live=True, layers_left=2))
    await its._look()
    slot.status = Load(moves=Moves(epoch=2, done=1, moved_bytes=4096, seconds=0.5, longest_pause_s=0.002))
    await its._look()
    slot.status = Load(moves=Moves(epoch=2, done=1, failed=1, moved_bytes=4096, alarm="peer_down: rank 1"))
    await its._look()
    await its._look()
    assert said == [
        "decode worker-0: experts have moved: 4,096 bytes in 0.50 s, longest pause so far 2.0 ms",
        "decode worker-0: experts could not be moved, and it serves on with them where they are: peer_down: rank 1",
    ]


@pytest.mark.parametrize("how", ["refuses", "moves_fail"])
@pytest.mark.usefixtures("solved_here")
async def test_a_move_that_was_not_made_is_asked_for_again(how):
    """Though traffic is what it was solved for."""
    worker = Worker()
    its, _, _ = made(worker)
    setattr(worker, how, True)
    await looks(its, worker, 12)
    assert len(worker.asked) > 1
    setattr(worker, how, False)
    before = worker.phy2log
    await looks(its, worker, 6)
    assert worker.phy2log is not before
    asked = len(worker.asked)
    await looks(its, worker, 12)
    assert len(worker.asked) == asked


async def test_without_a_lost_rank_it_is_tried_again_until_it_is_done(monkeypatch):
    monkeypatch.setattr(rebalancing, "AGAIN_S", 0.0)

    async def solved(counts: Counts, wanted: ExpertPlacementSpec) -> dict[str, Any]:
        return answer(counts)

    monkeypatch.setattr(rebalancing, "solve_apart", solved)
    worker = Worker(redundancy=EXPERTS)
    its, _, _ = made(worker)
    await looks(its, worker, 2)
    worker.others[0], worker.refuses = {"rank": 1, "pid": 0, "node": "", "lost": True}, True
    await looks(its, worker, 3, steps=1)
    assert len(worker.asked) == 3
    worker.refuses = False
    await looks(its, worker, 3, steps=1)
    assert len(worker.asked) == 4


@pytest.mark.usefixtures("solved_here")
async def test_traffic_that_alternates_for_ever_is_solved_for_now_and_then():
    worker = Worker()
    its, slot, _ = made(worker)
    await looks(its, worker, 4)
    for number in range(100):
        worker.hot = ((2, 3), (4, 5))[number % 2]
        await looks(its, worker, 1)
    assert 2 <= slot.placing["solves"] <= 6


@pytest.mark.parametrize("error", [OSError("no room"), RuntimeError("a fault")])
async def test_nothing_that_is_raised_ends_the_watch(monkeypatch, error):
    monkeypatch.setattr(rebalancing, "LOOK_S", 0.001)

    def fails(*args: object, **more: object) -> None:
        raise error

    monkeypatch.setattr(solver.tempfile, "TemporaryDirectory", fails)
    worker = Worker()
    its, slot, said = made(worker)
    running = asyncio.create_task(its.run())
    async with asyncio.timeout(20):
        while not slot.placing.get("failures"):
            worker.step(10)
            await asyncio.sleep(0.005)
    assert not running.done()
    running.cancel()
    assert str(error) in said[0]


async def test_what_fails_is_said_once_and_tried_again(monkeypatch):
    monkeypatch.setattr(rebalancing, "LOOK_S", 0.001)
    worker = Worker()
    its, slot, said = made(worker)
    worker.error = ClusterError("it is just starting")
    running = asyncio.create_task(its.run())
    while slot.placing.get("failures", 0) < 5:
        await asyncio.sleep(0.01)
    worker.error = None
    while not worker.asked:
        worker.step(5)
        await asyncio.sleep(0.01)
    running.cancel()
    assert said[0] == "decode worker-0: experts were not placed anew: cluster_error: it is just starting"
    assert "just starting" not in "".join(said[1:])


def test_a_window_in_which_a_rank_was_lost_or_started_anew_is_none():
    def look(pids: tuple[int, ...], rows: int) -> Any:
        routed = Routed(np.full((2, 1, 2), rows), np.full((1, 2), rows), np.zeros((1, 2), np.int64), 1, 1)
        return look_at(routed, pids[0], "a", [{"pid": pid, "node": "a"} for pid in pids[1:]])

    assert rows_between(look((1, 2), 5), look((1, 2), 7))[0].tolist() == [[[2, 2]], [[2, 2]]]
    assert rows_between(look((1, 2), 5), look((1, 3), 7)) is None
    assert rows_between(look((1, 0), 5), look((1, 0), 7)) is None
    assert rows_between(look((1, 2), 5), look((1, 2), 4)) is None


def counts() -> Counts:
    worker = Worker()
    worker.step(10)
    load, computed = np.stack([worker.load] * 3), np.stack([worker.computed] * 3)
    return Counts(load, computed, worker.phy2log, 1, 2, 1000, 1.0, "w")


async def test_another_process_solves():
    found = await solve_apart(counts(), ExpertPlacementSpec())
    assert found["after"]["busiest"] < found["before"]["busiest"]
    only = await solve_apart(of_ranks(counts(), [0, 1, 2]), ExpertPlacementSpec(policy="eplb"))
    assert only["wish"]["policy"] == "eplb"
    none = await solve_apart(counts(), ExpertPlacementSpec(max_moved_bytes=0))
    assert none["fetched_bytes"] == 0


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import time; time.sleep(60)", "was ended after 0.3 s"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended with -9: it said nothing"),
        ("raise SystemExit('no licence')", "ended with 1: no licence"),
        ("print('nonsense')", "no JSON: b'nonsense"),
    ],
)
async def test_a_solver_that_hangs_dies_or_talks_nonsense_is_named(monkeypatch, code, said):
    monkeypatch.setattr(solver, "RUN", code)
    monkeypatch.setattr(solver, "START_S", 0.2 if "sleep" in code else 20)
    with pytest.raises(ClusterError, match=said):
        await solve_apart(counts(), ExpertPlacementSpec(time_limit_s=0.1))


async def test_a_solver_that_is_stopped_is_ended(monkeypatch, tmp_path):
    told = tmp_path / "pid"
    code = f"import os, signal; open({str(told)!r}, 'w').write(str(os.getpid())); os.kill(os.getpid(), signal.SIGSTOP)"
    monkeypatch.setattr(solver, "RUN", code)
    monkeypatch.setattr(solver, "START_S", 2.0)
    with pytest.raises(ClusterError, match="was ended after"):
        await solve_apart(counts(), ExpertPlacementSpec(time_limit_s=0.1))
    with pytest.raises(ProcessLookupError):
        os.kill(int(told.read_text()), 0)


async def test_a_solver_ends_with_who_asked(monkeypatch, tmp_path):
    told = tmp_path / "pid"
    code = f"import os, time; open({str(told)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    monkeypatch.setattr(solver, "RUN", code)
    asking = asyncio.create_task(solve_apart(counts(), ExpertPlacementSpec()))
    async with asyncio.timeout(20):
        while not told.exists() or not told.read_text():
            await asyncio.sleep(0.02)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    with pytest.raises(ProcessLookupError):
        os.kill(int(told.read_text()), signal.SIGCONT)


async def test_only_groups_of_experts_are_looked_at(monkeypatch):
    """Under policy none they are told what others move."""
    monkeypatch.setattr(rebalancing, "LOOK_S", 0.01)
    worker, said = Worker(), list[str]()
    worker.error = ClusterError("it was asked")
    _, slot, _ = made(worker)
    slot.status = Load(moves=Moves(epoch=2, done=1, moved_bytes=5))
    for expert in (1, 2):
        placed = ExpertPlacementSpec(policy="none")
        role = SimpleNamespace(parallelism=SimpleNamespace(expert=expert), expert_placement=placed)
        spec = SimpleNamespace(roles={R.DECODE: role})
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await rebalancing.keep_placed(slot, worker, spec, said.append)  # type: ignore[arg-type]
    (line,) = said
    assert "experts have moved: 5 bytes" in line
    assert slot.placing["outcome"] == "policy none: experts stay where they are"


async def test_a_worker_that_is_lost_ends_nothing_here(monkeypatch):
    monkeypatch.setattr(rebalancing, "LOOK_S", 0.001)
    worker = Worker()
    its, _, said = made(worker)
    worker.error = WorkerLost("gone")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await its.run()
    assert len(said) == 1
