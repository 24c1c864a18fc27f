"""Experts move to other ranks of a group while it serves: every answer stays the right one, and a move that fails at any
stage leaves a placement behind which the group serves on."""

from __future__ import annotations

import asyncio
import random
import time

import numpy as np
import pytest

from tercet.core import Moves, Role
from tercet.roles.worker import Worker
from tercet.spec import ParallelSpec
from tests.chaos.test_lost_ranks import CLIENTS, Clients, model
from tests.helpers import cluster, spec_of

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
    while (moves := (await worker.health()).moves).layers_left:
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
        (Role.AGGREGATED, "deepseek-v3", "tensor", "torch", "tcp"),
        (Role.PREFILL, "mixtral", "stages", "native", "auto"),
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
            changed = await worker.move_experts(wanted)
            assert changed == len(wanted)
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
