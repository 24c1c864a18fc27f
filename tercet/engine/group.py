"""Execute plans by a group of ranks, each with a share of the model's layers, heads or experts.

Rank 0 plans, and sends each step to the others under its number; no rank decides anything by itself. A rank that draws
tokens (Place.draws) sends the result back, if it is not rank 0.

    rank 0   ─step(number, micro-batches)─>  rank
             <─drawn(number, results)──────  the rank that draws
             <─failed(reason)──────────────  any rank; the group is then broken, and with it the worker

A step that raises breaks the group: the ranks would no longer agree on who computes what. So there is no trying again
one sequence at a time, as a worker of one rank does (executor.py); a request that was on two workers when they died is
not tried on a third.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Sequence
from typing import Any

from tercet.distributed.place import Place
from tercet.distributed.talk import Talk
from tercet.engine.executor import Launched
from tercet.engine.plan import ImageKey, StepPlan, StepResult, pack, pack_result, unpack, unpack_result
from tercet.engine.runner import Runner
from tercet.errors import InternalError, WorkerLost

log = logging.getLogger(__name__)
Drawn = tuple[int, int, list[bytes]]  # data replica, the step's number, a result for each micro-batch


class GroupExecutor:
    """Rank 0's. `launch` and its results are for the engine's thread, all else for any."""

    rank, ahead = 0, False  # a step's tokens are known to rank 0 before the next is planned

    def __init__(self, runner: Runner, place: Place, others: Sequence[Talk]) -> None:
        self._runner, self._place, self._others = runner, place, others
        self.world_size, self.vocab_size = place.ranks, runner.vocab_size
        self._number = 0  # of the last step
        self._drawn: queue.SimpleQueue[Drawn | WorkerLost] = queue.SimpleQueue()
        self._broken: WorkerLost | None = None

    @property
    def layers_done(self) -> int:
        return self._runner.layers_done

    def see(self, key: ImageKey, embeddings: Any) -> None:
        raise InternalError("a group of ranks takes no images")  # its spec is refused

    def forget(self, key: ImageKey) -> None:
        """There is none."""

    def launch(self, plan: StepPlan) -> Launched:
        """Raises WorkerLost once the group is broken."""
        if self._broken is not None:
            raise self._broken
        self._number += 1
        replicas = self._divided(plan)
        packed = [[pack(part) for part, _ in parts] for parts in replicas]
        for other in self._others:
            other.tell("step", self._number, packed[self._place.of(other.rank).data_rank])
        own = [self._runner.launch(part).result() for part, _ in replicas[0]]
        numbers = [[pieces for _, pieces in parts] for parts in replicas]
        return _GroupStep(self, self._number, numbers, own if self._place.draws else None)

    def _divided(self, plan: StepPlan) -> list[list[tuple[StepPlan, list[int]]]]:
        """Of each replica its micro-batches, as many everywhere, since all take part in each."""
        plans = plan.replicas
        plans += [StepPlan()] * (self._place.data - len(plans))
        replicas = [plan.divided(self._place.pipeline) for plan in plans]
        most = max(map(len, replicas))
        return [parts + [(StepPlan(), [])] * (most - len(parts)) for parts in replicas]

    def take(self, rank: int, number: int, results: list[bytes]) -> None:
        """What a rank that draws sends."""
        self._drawn.put((self._place.of(rank).data_rank, number, results))

    def fail(self, error: WorkerLost) -> None:
        """The group is broken: nothing more is launched or waited for."""
        self._broken = error
        self._drawn.put(error)

    def drawn(self, number: int) -> tuple[int, list[StepResult]]:
        """Waits for a replica's results of a step. -> and which replica. Raises WorkerLost, or InternalError if they
        are those of another step."""
        found = self._drawn.get()
        if isinstance(found, WorkerLost):
            raise found
        replica, theirs, results = found
        if theirs != number:
            raise InternalError(f"rank 0 waits for step {number}, and a rank that draws sent step {theirs}")
        return replica, [unpack_result(packed) for packed in results]


class _GroupStep:
    def __init__(
        self, executor: GroupExecutor, number: int, pieces: list[list[list[int]]], own: list[StepResult] | None
    ) -> None:
        """pieces: of each replica, of each micro-batch, its pieces' numbers in the replica's plan. own: the first
        replica's results, if rank 0 draws."""
        self._executor, self._number, self._pieces, self._own = executor, number, pieces, own

    def result(self) -> StepResult:
        found = {} if self._own is None else {0: self._own}
        while len(found) < len(self._pieces):
            replica, parts = self._executor.drawn(self._number)
            found[replica] = parts
        return [result for replica in sorted(found) for result in self._ordered(replica, found[replica])]

    def _ordered(self, replica: int, parts: list[StepResult]) -> StepResult:
        numbered = {
            number: result
            for numbers, results in zip(self._pieces[replica], parts, strict=True)
            for number, result in zip(numbers, results, strict=True)
        }
        return [numbered[number] for number in sorted(numbered)]


class RankSteps:
    """Another rank's: runs the steps that rank 0 sends, one after the other, on a thread of its own."""

    def __init__(self, runner: Runner, place: Place, rank_0: Talk) -> None:
        self._runner, self._place, self._rank_0 = runner, place, rank_0
        self._steps: queue.SimpleQueue[tuple[int, list[bytes]] | None] = queue.SimpleQueue()
        self._last = 0

    def take(self, number: int, parts: list[bytes]) -> None:
        """On the thread that reads. Tells rank 0 if this is not the step behind the last one."""
        if number != self._last + 1:
            self._rank_0.tell(
                "failed", f"rank {self._place.rank} is behind step {self._last}, and rank 0 sent step {number}"
            )
            return
        self._last = number
        self._steps.put((number, parts))

    def stop(self) -> None:
        """No step follows."""
        self._steps.put(None)

    def run(self) -> None:
        """Until `stop`, or a step that raises, of which rank 0 is told."""
        while (step := self._steps.get()) is not None:
            number, parts = step
            try:
                results = [self._runner.launch(unpack(part)).result() for part in parts]
            except Exception as error:  # whatever the model raises: rank 0 must hear
                log.error("step %d failed", number, exc_info=error)
                why = f"{type(error).__name__}: {error}"
                self._rank_0.tell("failed", f"step {number} failed on rank {self._place.rank}: {why}")
                return
            if self._place.draws:
                self._rank_0.tell("drawn", number, [pack_result(result) for result in results])
