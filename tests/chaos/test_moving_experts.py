"""Experts move to other ranks of a group while it serves: every answer stays the right one, and a move that fails at
any stage leaves a placement behind which the group serves on."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from examples import make_tiny_model
from tercet.core import Moves, Role
from tercet.distributed.expert_map import ExpertMap
from tercet.engine.group import GroupExecutor
from tercet.errors import ClusterError, PeerMismatch
from tercet.kernels.moe import TorchExperts
from tercet.placement.expert_shares import TURNS
from tercet.placement.experts.weighing import served
from tercet.roles import migration
from tercet.roles.expert_links import ExpertLinks
from tercet.roles.expert_mover import ExpertMover
from tercet.roles.part import Identity
from tercet.roles.worker import Worker
from tercet.spec import ParallelSpec
from tests.chaos.test_lost_ranks import CLIENTS, Clients, model
from tests.helpers import TOKEN, cluster, spec_of, start_rank

EXPERTS = 8  # of each family
SHAPES = {
    "replicas": {"data": 2, "expert": 2},
    "tensor": {"tensor": 2, "expert": 2, "expert_redundancy": 2},
    "stages": {"pipeline": 2, "data": 2, "expert": 2, "expert_redundancy": 4},
    "with replicas of experts": {"data": 3, "expert": 3, "expert_redundancy": 7},
}


def another(placed: np.ndarray, ranks: int, seed: int) -> list[list[int]]:
    """A random placement [L, P] with as many slots, no expert twice on a rank where that can be."""
    rng, rows = random.Random(seed), []
    for _ in placed:
        each = placed.shape[1] // ranks
        while True:
            extra = [rng.randrange(EXPERTS) for _ in range(placed.shape[1] - EXPERTS)]
            row = [*range(EXPERTS), *extra]
            rng.shuffle(row)
            if all(len({*row[at : at + each]}) == min(each, EXPERTS) for at in range(0, len(row), each)):
                break
        rows.append(row)
    return rows


async def ended(worker: Worker, timeout_s: float = 30.0) -> Moves:
    deadline = time.monotonic() + timeout_s
    while (moves := (await worker.health()).moves).live:
        assert time.monotonic() < deadline, moves
        await asyncio.sleep(0.02)
    return moves


async def answers(clients: Clients, more: int = CLIENTS) -> None:
    """Until there are so many more."""
    wanted, deadline = clients.answered + more, time.monotonic() + 30
    while clients.answered < wanted:
        assert time.monotonic() < deadline
        await clients.go_on(0.1, answered=False)


def grouped(role: Role, family: str, degrees: dict[str, int], kernels: str = "native", **changes: object):
    changes = {"source": model(family)} | changes
    spec = spec_of("aggregated" if role is Role.AGGREGATED else "pd", decoders=1, **changes)
    its = spec.roles[role].model_copy(update={"parallelism": ParallelSpec(**degrees), "kernels": kernels})
    return spec.model_copy(update={"roles": spec.roles | {role: its}})


@pytest.mark.parametrize(
    ("role", "family", "shape", "kernels", "transport"),
    [
        (Role.AGGREGATED, "qwen3-moe", "replicas", "native", "shm"),
        pytest.param(Role.AGGREGATED, "deepseek-v3", "tensor", "torch", "tcp", marks=pytest.mark.slow),
        pytest.param(Role.PREFILL, "mixtral", "stages", "native", "auto", marks=pytest.mark.slow),
        (Role.DECODE, "deepseek-v3", "with replicas of experts", "native", "tcp"),
    ],
)
async def test_answers_stay_right_while_experts_move(role, family, shape, kernels, transport):
    degrees = SHAPES[shape]
    spec = grouped(role, family, degrees, kernels, transfer__transport=transport)
    name = f"{role.value}-0"
    async with cluster(spec) as made:
        worker, clients = made.workers[name], Clients(made, family)
        await answers(clients)
        for seed in range(4):
            before = await worker.routed()
            wanted = another(before.phy2log, degrees["expert"], seed)
            assert await worker.move_experts(wanted) == (len(wanted), seed + 1)
            moves = await ended(worker)
            assert (moves.alarm, moves.done, moves.failed) == ("", seed + 1, 0)
            after = await worker.routed()
            assert [[sorted(part) for part in np.split(np.array(row), degrees["expert"])] for row in wanted] == [
                [sorted(part) for part in np.split(row, degrees["expert"])] for row in after.phy2log
            ]
            await answers(clients)
        await clients.stop()
        counted = await worker.routed()
        assert counted.load.sum() * degrees.get("tensor", 1) >= counted.computed.sum() > 0
        assert (await ended(worker)).epoch == 4 * len(wanted)


async def test_a_stage_without_experts_takes_part(monkeypatch, tmp_path):
    """Rank 0 has none, and yet says how the others' move."""
    monkeypatch.setitem(make_tiny_model.LATENT, "first_k_dense_replace", 2)
    make_tiny_model.make(make_tiny_model.Family.DEEPSEEK_V3, tmp_path)
    degrees = {"pipeline": 2, "data": 2, "expert": 2, "expert_redundancy": 4}
    async with cluster(grouped(Role.AGGREGATED, "qwen3-moe", degrees, source=str(tmp_path))) as made:
        worker = made.workers["aggregated-0"]
        events, _ = await made.generate([1, 2, 3], max_tokens=12, ignore_eos=True)
        before = await worker.routed()
        assert len(before.phy2log) == 2
        await worker.move_experts(another(before.phy2log, 2, 1))
        moves = await ended(worker)
        assert (moves.alarm, moves.done, moves.epoch) == ("", 1, 2)
        again, _ = await made.generate([1, 2, 3], max_tokens=12, ignore_eos=True)
        assert [event.token_id for event in again] == [event.token_id for event in events]
        async with asyncio.timeout(10):
            while len((await worker.health()).experts) < 2:
                await asyncio.sleep(0.1)


REPLICATED = {"data": 3, "expert": 3, "expert_redundancy": 10}  # any rank may be lost


def surviving(placed: np.ndarray, seed: int) -> list[list[int]]:
    """As `another`, and each expert of a rank lies on another one, too."""
    for at in range(seed, seed + 1_000_000, 97):
        wanted = [row for row in another(placed, 3, at) if ExpertMap(torch.tensor([row]), EXPERTS, 6).survives([1])]
        found = [row for row in wanted if all(ExpertMap(torch.tensor([row]), EXPERTS, 6).survives([r]) for r in (0, 2))]
        if found:
            return [found[0]] * len(placed)
    raise AssertionError("there is none")


class Striking:
    """Does something to a rank's process the moment before rank 0 says the verb to it, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, verb: str, strike: Callable[[], None]) -> None:
        self.struck, self._left = False, 3 if verb in {"take", "give"} else 1  # layers that go well
        ask, between = migration._Asking.one, GroupExecutor.between_steps

        def one(asking: object, rank: int, said: str, *rest: object) -> object:
            if said == verb and (rank == 1 or verb in {"take", "give"}):
                self._strike(strike)
            return ask(asking, rank, said, *rest)

        def between_steps(executor: GroupExecutor, work: Callable[[], None], timeout_s: float) -> float:
            if verb == "commit":
                self._strike(strike)
            return between(executor, work, timeout_s)

        monkeypatch.setattr(migration._Asking, "one", one)
        monkeypatch.setattr(GroupExecutor, "between_steps", between_steps)

    def _strike(self, strike: Callable[[], None]) -> None:
        self._left -= 1
        if self._left == 0:
            self.struck = True
            strike()


def shares_of(rows: list[list[int]], nodes: int, seed: int) -> list[list[list[int]]]:
    """Random ones [L, nodes, P]."""
    rng, made = np.random.default_rng(seed), np.zeros((len(rows), nodes, len(rows[0])), np.int64)
    for layer, row in enumerate(rows):
        for expert, node in itertools.product(range(EXPERTS), range(nodes)):
            slots = [slot for slot, held in enumerate(row) if held == expert]
            made[layer, node, slots] = rng.multinomial(TURNS, rng.dirichlet(np.full(len(slots), 0.5)))
    shares: list[list[list[int]]] = made.tolist()
    return shares


async def rows_follow_shares(worker: Worker, clients: Clients, wanted: list[list[list[int]]] | None) -> None:
    """wanted: as told, of slots in the order of the ranks. What each rank computes is what its shares say."""
    before = await worker.routed()
    await answers(clients, 40)
    after = await worker.routed()
    assert (after.shares is None) == (wanted is None)
    sent = (after.load - before.load).astype(float)
    expected = served(after.phy2log, sent, after.shares).reshape(len(after.phy2log), after.ranks, -1).sum(axis=2)
    assert expected == pytest.approx((after.computed - before.computed).astype(float), rel=0.15, abs=100)
    if wanted is not None:
        parts = [
            np.array(shares).reshape(*np.array(shares).shape[:2], after.ranks, -1) for shares in (wanted, after.shares)
        ]
        assert (parts[0].sum(axis=3) == parts[1].sum(axis=3)).all()


async def test_rows_follow_shares_while_it_serves():
    """With a move, without one, taken back, and at a rank that was lost meanwhile."""
    spec = grouped(Role.AGGREGATED, "qwen3-moe", REPLICATED)
    async with cluster(spec) as made:
        worker, clients = made.workers["aggregated-0"], Clients(made, "qwen3-moe")
        await answers(clients)
        rows = surviving((await worker.routed()).phy2log, 1)
        for number, nodes in enumerate((3, 1)):
            shares = shares_of(rows, nodes, nodes)
            layers, move = await worker.move_experts(rows, shares)
            assert (layers, move) == ((len(rows), 0)[number], number + 1)
            while (moves := await ended(worker)).ended < move:
                await asyncio.sleep(0.02)
            assert (moves.alarm, moves.done, moves.epoch) == ("", number + 1, len(rows))
            assert await worker.move_experts(rows, shares) == (0, 0)
            await rows_follow_shares(worker, clients, shares)
        process = made.ranks["aggregated-0", 1]
        process.kill()
        process.wait()
        process.stdin.close()
        while not worker.lost_ranks():
            await clients.go_on(0.05, answered=False)
        await answers(clients, 10)
        made.ranks["aggregated-0", 1] = start_rank("aggregated-0", 1, Role.AGGREGATED, 1, spec, worker._group.endpoint)
        while worker.lost_ranks():
            await clients.go_on(0.1, answered=False)
        await rows_follow_shares(worker, clients, shares)
        for wrong in (
            shares[:1],
            [[node[:-1] for node in layer] for layer in shares],
            [[[1] * len(rows[0])]] * len(rows),
        ):
            with pytest.raises(ClusterError, match="shares of"):
                await worker.move_experts(rows, wrong)
        others = surviving(np.array(rows), 2)
        with pytest.raises(ClusterError, match="experts lie elsewhere"):
            await worker.move_experts(others, shares_of(others, 1, 3), shares_only=True)
        assert await worker.move_experts(rows) == (0, 3)
        while (await ended(worker)).ended < 3:
            await asyncio.sleep(0.02)
        await rows_follow_shares(worker, clients, None)
        await clients.stop()


@pytest.mark.slow
async def test_shares_that_do_not_arrive_are_given_up(monkeypatch):
    real, go_on = ExpertMover.share, threading.Event()
    monkeypatch.setattr(ExpertMover, "share", lambda mover, *fields: (go_on.wait(), real(mover, *fields))[1])
    monkeypatch.setattr(migration, "LAYER_S", 0.5)
    monkeypatch.setattr(migration, "GRACE_S", 0.1)
    async with cluster(grouped(Role.AGGREGATED, "qwen3-moe", REPLICATED)) as made:
        worker, clients = made.workers["aggregated-0"], Clients(made, "qwen3-moe")
        rows = (await worker.routed()).phy2log.tolist()
        await worker.move_experts(rows, shares_of(rows, 1, 1))
        async with asyncio.timeout(5):
            while (moves := (await worker.health()).moves).ended < 1:
                await asyncio.sleep(0.02)
        assert "shares of replicas" in moves.alarm
        assert (moves.done, moves.failed, moves.epoch) == (0, 1, 0)
        await answers(clients)
        go_on.set()
        await answers(clients)
        await clients.stop()


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "verb",
    [
        "commit",
        *(pytest.param(verb, marks=pytest.mark.slow) for verb in ("begin", "stage", "take", "give", "share", "end")),
    ],
)
async def test_a_rank_that_is_lost_while_experts_move(monkeypatch, verb, number):
    """The others serve on by a whole placement, the rank comes back into it, and experts move again."""
    spec = grouped(Role.AGGREGATED, "qwen3-moe", REPLICATED)
    async with cluster(spec) as made:
        worker, clients = made.workers["aggregated-0"], Clients(made, "qwen3-moe")
        await answers(clients)
        before = await worker.routed()
        await worker.move_experts(surviving(before.phy2log, 1))
        assert (await ended(worker)).alarm == ""
        striking = Striking(monkeypatch, verb, lambda: made.ranks["aggregated-0", 1].send_signal(number))
        rows = surviving(before.phy2log, 2)
        await worker.move_experts(rows, shares_of(rows, 1, 2) if verb == "share" else None)
        moves = await ended(worker)
        while not striking.struck or not worker.lost_ranks():
            await clients.go_on(0.05, answered=False)
        assert worker.lost_ranks() == [1]
        assert moves.alarm or verb in {"commit", "share", "end"}, moves
        await answers(clients, 10)
        process = made.ranks["aggregated-0", 1]
        process.kill()
        process.wait()
        process.stdin.close()
        made.ranks["aggregated-0", 1] = start_rank("aggregated-0", 1, Role.AGGREGATED, 1, spec, worker._group.endpoint)
        while worker.lost_ranks():
            await clients.go_on(0.1, answered=False)
        await answers(clients, 10)
        await worker.move_experts(surviving(before.phy2log, 3))
        assert (await ended(worker)).alarm == ""
        await answers(clients, 10)
        await clients.stop()


@pytest.mark.parametrize(
    "verb", ["take", *(pytest.param(verb, marks=pytest.mark.slow) for verb in ("begin", "stage", "give"))]
)
async def test_a_move_that_hangs_is_given_up(monkeypatch, verb):
    """At rank 0, whose threads nobody watches but the watchdog: nothing of it is switched later either."""
    real, go_on, hangs = getattr(ExpertMover, verb), threading.Event(), threading.Event()

    def hang(mover: ExpertMover, *fields: object) -> object:
        if not go_on.is_set():
            hangs.set()
            go_on.wait()
        return real(mover, *fields)

    monkeypatch.setattr(ExpertMover, verb, hang)
    monkeypatch.setattr(migration, "LAYER_S", 0.5)
    monkeypatch.setattr(migration, "GRACE_S", 0.1)
    async with cluster(grouped(Role.AGGREGATED, "qwen3-moe", SHAPES["replicas"])) as made:
        worker, clients = made.workers["aggregated-0"], Clients(made, "qwen3-moe")
        before = await worker.routed()
        wanted = another(before.phy2log, 2, 5)
        await worker.move_experts(wanted)
        moves = await ended(worker, 5.0)
        assert hangs.is_set()
        assert ("the links for experts" if verb == "begin" else "layer 0") in moves.alarm
        assert (moves.failed, moves.done, moves.epoch) == (1, 0, 0)
        await answers(clients)
        go_on.set()
        await asyncio.sleep(0.3)
        assert ((await worker.routed()).phy2log == before.phy2log).all()
        monkeypatch.setattr(migration, "LAYER_S", 30.0)
        await worker.move_experts(wanted)
        moves = await ended(worker)
        assert (moves.alarm, moves.done, moves.failed, moves.epoch) == ("", 1, 1, len(wanted))
        await answers(clients)
        await clients.stop()


async def test_what_cannot_be_moved_is_refused_and_nothing_changes(monkeypatch):
    async with cluster(grouped(Role.AGGREGATED, "qwen3-moe", SHAPES["replicas"])) as made:
        worker, clients = made.workers["aggregated-0"], Clients(made, "qwen3-moe")
        before = await worker.routed()
        placed = before.phy2log.tolist()
        wrong = {
            "1 layers of 8 slots; the worker has 4 layers": placed[:1],
            "4 layers of 7 slots": [row[:-1] for row in placed],
            "4 layers of 7, 8 slots": [placed[0][:-1], *placed[1:]],
            "no slot holds experts": [[0] * 8 for _ in placed],
            "slots of experts": [[*range(7), 8] for _ in placed],
            "0 layers of no slots": [],
        }
        for said, rows in wrong.items():
            with pytest.raises(ClusterError, match=said):
                await worker.move_experts(rows)
        assert await worker.move_experts(placed) == (0, 0)
        assert await worker.move_experts([row[:4][::-1] + row[4:][::-1] for row in placed]) == (0, 0)  # the same ranks
        held = threading.Event()
        real = ExpertMover.begin
        monkeypatch.setattr(ExpertMover, "begin", lambda mover, move: (held.wait(), real(mover, move))[1])
        assert await worker.move_experts(another(before.phy2log, 2, 1)) == (len(placed), 1)
        for other in (another(before.phy2log, 2, 2), placed):  # the last is where they are, for now
            with pytest.raises(ClusterError, match="already"):
                await worker.move_experts(other)
        held.set()
        assert (await ended(worker)).alarm == ""
        await answers(clients)
        await clients.stop()


async def test_a_worker_that_stops_does_not_wait_for_a_move(monkeypatch):
    held = threading.Event()
    real = ExpertMover.take
    monkeypatch.setattr(ExpertMover, "take", lambda mover, *fields: (held.wait(), real(mover, *fields))[1])
    async with cluster(grouped(Role.AGGREGATED, "qwen3-moe", SHAPES["replicas"])) as made:
        worker = made.workers["aggregated-0"]
        await worker.move_experts(another((await worker.routed()).phy2log, 2, 1))
        asyncio.get_running_loop().call_later(0.5, held.set)
        began = time.monotonic()
    assert time.monotonic() - began < 20


async def test_a_worker_that_stops_does_not_wait_for_a_step_that_hangs():
    """A switch waits for it, too."""
    async with cluster(grouped(Role.AGGREGATED, "qwen3-moe", SHAPES["replicas"])) as made:
        worker = made.workers["aggregated-0"]
        executor, migration_ = worker._group.executor, worker._group.migration
        executor._turn.acquire()
        await worker.move_experts(another((await worker.routed()).phy2log, 2, 1))
        await asyncio.sleep(1.0)
        began = time.monotonic()
        await asyncio.to_thread(migration_.close)
        assert time.monotonic() - began < 10
        assert migration_.moves.alarm == "cancelled: the worker stops"
        with pytest.raises(ClusterError):
            await worker.move_experts([])
        executor._turn.release()


def test_links_that_are_cancelled_are_free_once_nothing_can_be_written():
    """Again and again, while the other side gives, or never does."""
    spec = grouped(Role.AGGREGATED, "qwen3-moe", SHAPES["replicas"])
    who = Identity("w", Role.AGGREGATED, 1, spec, "127.0.0.1", TOKEN, (Role.AGGREGATED,), ())
    experts = TorchExperts(torch.randn(2, 400, 300), torch.randn(2, 300, 200))
    for number in range(3):
        one, other = (ExpertLinks(who, rank, "same", experts) for rank in (0, 1))
        room = experts.empty()
        taking = [[weight[slot] for weight in room.weights] for slot in (0, 1)]
        giving = [[weight[slot] for weight in experts.weights] for slot in (0, 1)]
        with ThreadPoolExecutor(2) as pool:
            waits = [pool.submit(other.take, "these", taking, 5.0)]
            if number % 3:
                waits.append(pool.submit(one.give, "these", 1, other.endpoint, giving, 5.0))
            time.sleep(0.005 * (number % 4))
            if number % 3 != 2:
                for links in (one, other):
                    links.cancel()
            ended = [wait.exception(10) for wait in waits]
        if number % 3 == 2:
            assert ended == [None, None]
            assert all(map(torch.equal, room.weights, experts.weights))
        assert one.close(5.0)
        assert other.close(5.0)


def test_links_refuse_experts_that_are_kept_otherwise():
    spec = grouped(Role.AGGREGATED, "qwen3-moe", SHAPES["replicas"])
    who = Identity("w", Role.AGGREGATED, 1, spec, "127.0.0.1", TOKEN, (Role.AGGREGATED,), ())
    narrow = TorchExperts(torch.randn(2, 400, 300).bfloat16(), torch.randn(2, 300, 200).bfloat16())
    one, other = (
        ExpertLinks(who, rank, "same", experts)
        for rank, experts in enumerate((narrow, TorchExperts(torch.randn(2, 400, 300), torch.randn(2, 300, 200))))
    )
    with pytest.raises(PeerMismatch):
        one.give("these", 1, other.endpoint, [[weight[0] for weight in narrow.weights]], 5.0)
    assert one.close(5.0)
    assert other.close(5.0)
