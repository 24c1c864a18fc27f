"""Execute plans by a group of ranks, each with a share of the model's layers, heads or experts.

Rank 0 plans, and sends each step to the others under its number; no rank decides anything by itself. A rank that draws
tokens (Place.draws) sends the result back, if it is not rank 0.

    rank 0   ─step(number, attempt, micro-batches)─>  rank
             <─drawn(number, attempt, results)──────  a rank that draws
             <─failed(reason)───────────────────────  any rank; the group is then broken, and with it the worker
             ─without(rank, attempt)────────────────> go on without a rank that is lost
             ─rejoin(rank, endpoint, attempt)───────> take it back; to that rank itself: join(ranks, attempt)
             ─experts_commit(move, layer, epoch)────> a layer's experts are where they were moved to

A step that raises breaks the group: the ranks would no longer agree on who computes what. So there is no trying again
one sequence at a time, as a worker of one rank does (executor.py); a request that was on two workers when they died is
not tried on a third.

A rank that is lost while the others can go on without it (Spread.survives) breaks off the step at some of them, but not
at all. So all run it once more, under the next attempt: the same KV goes to the same slots, and the mover takes the
same blocks twice.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tercet.distributed.place import Place
from tercet.distributed.spread import Spread
from tercet.distributed.talk import Talk
from tercet.engine.executor import Done, Launched
from tercet.engine.plan import ImageKey, PieceResult, StepPlan, StepResult, pack, unpack_result
from tercet.engine.runner import Runner
from tercet.errors import ClusterError, InternalError, TransferError, WorkerDrained, WorkerLost

HEAR_S = 10.0  # after a step was broken off, until it is known which rank is lost: longer than one may be silent
log = logging.getLogger(__name__)
Parts = list[tuple[StepPlan, list[int]]]  # micro-batches, each with its pieces' numbers in the replica's plan


@dataclass(frozen=True)
class Drawn:
    """A replica's results of a step."""

    replica: int
    number: int
    attempt: int
    results: list[bytes]  # of each micro-batch


@dataclass(frozen=True)
class Lost:
    """A rank that the others go on without, under the next attempt."""

    rank: int
    attempt: int


class GroupExecutor:
    """Rank 0's. `launch` is for the engine's thread, all else for any."""

    rank, ahead = 0, False  # a step's tokens are known to rank 0 before the next is planned

    def __init__(self, runner: Runner, place: Place, others: Sequence[Talk], spread: Spread | None = None) -> None:
        self._runner, self._place, self._spread = runner, place, spread
        self._others = {talk.rank: talk for talk in others}  # those that take part
        self.world_size, self.vocab_size = place.ranks, runner.vocab_size
        self._number, self._attempt = 0, 0  # of the last step
        self._heard: queue.SimpleQueue[Drawn | Lost | WorkerLost] = queue.SimpleQueue()
        self._broken: WorkerLost | None = None
        self._turn = threading.Lock()  # a step, or a rank that comes back

    @property
    def layers_done(self) -> int:
        return self._runner.layers_done

    @property
    def steps(self) -> int:
        """So far. Any thread."""
        return self._number

    def see(self, key: ImageKey, embeddings: Any) -> None:
        raise InternalError("a group of ranks takes no images")  # its spec is refused

    def forget(self, key: ImageKey) -> None:
        """There is none."""

    def launch(self, plan: StepPlan) -> Launched:
        """Computes it, too. Raises WorkerLost once the group is broken."""
        with self._turn:
            self._hear_all()
            self._number += 1
            replicas = self._divided(plan)
            while True:
                if self._broken is not None:
                    raise self._broken
                try:
                    return Done(self._step(replicas))
                except TransferError as error:
                    self._await_loss(error)
                except _BrokenOffError:
                    log.warning("step %d is computed once more", self._number)

    # ---- what ranks tell

    def take(self, rank: int, number: int, attempt: int, results: list[bytes]) -> None:
        """What a rank that draws sends."""
        self._heard.put(Drawn(self._place.of(rank).data_rank, number, attempt, results))

    def lose(self, rank: int, attempt: int) -> None:
        """The others go on without it, and know it."""
        assert self._spread is not None
        self._heard.put(Lost(rank, attempt))
        self._spread.cut(rank)

    def fail(self, error: WorkerLost) -> None:
        """The group is broken: nothing more is launched or waited for."""
        self._broken = error
        self._heard.put(error)
        if self._spread is not None:
            self._spread.cut_all()

    def rejoin(self, talk: Talk, tell: Callable[[Callable[[], None]], tuple[str, int]]) -> None:
        """Take a rank back between two steps. tell: tells the others, after it has called what it is given; -> its
        exchange's endpoint and the attempt. Raises RankLost, WorkerLost."""
        assert self._spread is not None
        with self._turn:
            endpoint, self._attempt = tell(self._hear_all)
            self._others[talk.rank] = talk
            self._spread.rejoin(talk.rank, endpoint, self._attempt)

    def between_steps(self, work: Callable[[], None], timeout_s: float) -> float:
        """Do this, which may tell all ranks something, while no step runs. -> seconds for which none could begin.
        Raises ClusterError if the step that runs does not end in time."""
        if not self._turn.acquire(timeout=max(0.0, timeout_s)):
            raise ClusterError(f"step {self._number} did not end in {timeout_s:.1f} s")
        try:
            began = time.monotonic()
            work()
            return time.monotonic() - began
        finally:
            self._turn.release()

    def broken_off(self, why: str, number: int, attempt: int) -> None:
        """A rank's step was. If no loss is known before long that explains it, the group is broken."""
        timer = threading.Timer(HEAR_S, self._check_cause, (why, number, attempt))
        timer.daemon = True
        timer.start()

    def _check_cause(self, why: str, number: int, attempt: int) -> None:
        if (self._number, self._attempt) == (number, attempt):
            self.fail(WorkerLost(f"step {number} was broken off, and no rank is lost: {why}"))

    def _hear_all(self) -> None:
        while not self._heard.empty():
            with contextlib.suppress(_BrokenOffError):
                self._hear()

    # ---- a step

    def _divided(self, plan: StepPlan) -> list[Parts]:
        """Of each replica its micro-batches, as many everywhere, since all take part in each."""
        plans = plan.replicas
        plans += [StepPlan()] * (self._place.data - len(plans))
        replicas = [plan.divided(self._place.pipeline) for plan in plans]
        most = max(map(len, replicas))
        return [parts + [(StepPlan(), [])] * (most - len(parts)) for parts in replicas]

    def _step(self, replicas: list[Parts]) -> StepResult:
        """Raises TransferError if it was broken off."""
        packed = [[pack(part) for part, _ in parts] for parts in replicas]
        for rank, other in self._others.items():
            other.tell("step", self._number, self._attempt, packed[self._place.of(rank).data_rank])
        own = [self._runner.launch(part).result() for part, _ in replicas[0]]
        found = {0: own} if self._place.draws else {}
        live = {0, *(self._place.of(rank).data_rank for rank in self._others)}
        while missing := live - found.keys():
            drawn = self._hear()
            if drawn is not None and drawn.replica in missing:
                found[drawn.replica] = [unpack_result(results) for results in drawn.results]
        return [
            result
            for replica, parts in enumerate(replicas)
            for result in (_ordered(parts, found[replica]) if replica in found else _gone(parts))
        ]

    def _hear(self, timeout_s: float | None = None) -> Drawn | None:
        """-> results of this step; None for those of an attempt before. Raises WorkerLost if the group is broken,
        _BrokenOffError if a rank is lost, InternalError for the results of another step."""
        heard = self._heard.get(timeout=timeout_s)
        if isinstance(heard, WorkerLost):
            raise heard
        if isinstance(heard, Lost):
            self._go_on_without(heard)
            raise _BrokenOffError
        if heard.attempt < self._attempt:
            return None
        if heard.number != self._number:
            raise InternalError(f"rank 0 is at step {self._number}, and a rank that draws sent step {heard.number}")
        return heard

    def _await_loss(self, error: TransferError) -> None:
        """This rank's step was broken off. Returns once it is known which rank is lost. Raises WorkerLost."""
        with contextlib.suppress(_BrokenOffError):
            try:
                while True:
                    self._hear(HEAR_S)
            except queue.Empty:
                raise WorkerLost(f"step {self._number} was broken off, and no rank is lost: {error}") from error

    def _go_on_without(self, lost: Lost) -> None:
        assert self._spread is not None
        self._others.pop(lost.rank, None)
        self._attempt = lost.attempt
        self._spread.without(lost.rank, lost.attempt)


class _BrokenOffError(Exception):
    """Of a step: a rank is lost."""


def _ordered(parts: Parts, results: list[StepResult]) -> StepResult:
    """A replica's results in the order of its plan's pieces."""
    numbered = {
        number: result
        for (_, numbers), part in zip(parts, results, strict=True)
        for number, result in zip(numbers, part, strict=True)
    }
    return [numbered[number] for number in sorted(numbered)]


def _gone(parts: Parts) -> StepResult:
    """Of a replica whose rank is out: its requests can go on elsewhere."""
    error = WorkerDrained("the rank that had it is lost")
    return [PieceResult(fault=error) for _, numbers in parts for _ in numbers]
