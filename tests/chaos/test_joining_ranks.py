"""A rank is stopped at the very moment at which another one, which was lost, comes back: the rest goes on with that."""

from __future__ import annotations

import asyncio
import signal

from tercet.core import Role
from tercet.spec import ParallelSpec
from tests.chaos.test_lost_ranks import Clients, model
from tests.helpers import LocalCluster, cluster, spec_of, start_rank

NAME, FAMILY = "aggregated-0", "qwen3-moe"
DEGREES = ParallelSpec(data=3, expert=3, expert_redundancy=10)  # any rank can be lost


async def until_lost(made: LocalCluster, ranks: list[int]) -> None:
    worker = made.workers[NAME]
    async with asyncio.timeout(40):
        while worker.lost_ranks() != ranks:
            assert worker._group.broken is None
            await asyncio.sleep(0.05)


async def test_a_rank_that_is_stopped_while_another_comes_back_holds_nobody_up(monkeypatch):
    spec = spec_of("aggregated", decoders=1, source=model(FAMILY))
    grouped = spec.roles[Role.AGGREGATED].model_copy(update={"parallelism": DEGREES})
    spec = spec.model_copy(update={"roles": {Role.AGGREGATED: grouped}})
    async with cluster(spec) as made:
        losses, clients = made.workers[NAME]._group.losses, Clients(made, FAMILY)
        made.ranks[NAME, 1].kill()
        made.ranks[NAME, 1].wait()
        made.ranks[NAME, 1].stdin.close()
        await until_lost(made, [1])
        tell_all = losses._tell_all

        def stop_and_tell(*args):
            made.ranks[NAME, 2].send_signal(signal.SIGSTOP)
            return tell_all(*args)

        monkeypatch.setattr(losses, "_tell_all", stop_and_tell)
        made.ranks[NAME, 1] = start_rank(NAME, 1, Role.AGGREGATED, 1, spec, made.workers[NAME]._group.endpoint)
        await until_lost(made, [2])
        await clients.go_on(2.0)
        made.ranks[NAME, 2].kill()
        await clients.stop()
        assert made.workers[NAME].lost_ranks() == [2]
