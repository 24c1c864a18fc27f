"""What a rank other than 0 does in a group: run the steps that rank 0 sends (group.py), one after the other."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from dataclasses import dataclass

from tercet.distributed.place import Place
from tercet.distributed.spread import Spread
from tercet.distributed.talk import Talk
from tercet.engine.plan import pack_result, unpack
from tercet.engine.runner import Runner
from tercet.errors import TransferError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Step:
    number: int
    attempt: int
    parts: list[bytes]


@dataclass(frozen=True)
class _Change:
    """Of who takes part."""

    attempt: int
    carry_out: Callable[[Spread], None]


@dataclass(frozen=True)
class _Between:
    """Something else that all ranks do behind the same step."""

    carry_out: Callable[[], None]


class RankSteps:
    """On a thread of its own."""

    def __init__(self, runner: Runner, place: Place, rank_0: Talk, spread: Spread | None = None) -> None:
        self._runner, self._place, self._rank_0, self._spread = runner, place, rank_0, spread
        self._work: queue.SimpleQueue[_Step | _Change | _Between | None] = queue.SimpleQueue()
        self._last: tuple[int, int] | None = None  # number and attempt of the newest step; None: it has just come
        self._running = 0, 0  # of that which runs, or has run
        self._attempt = 0  # of which the exchange is

    def take(self, number: int, attempt: int, parts: list[bytes]) -> None:
        """On the thread that reads. Tells rank 0 if this is neither the step behind the last one nor the same again."""
        if (
            self._last is not None
            and number != self._last[0] + 1
            and not (number == self._last[0] and attempt > self._last[1])
        ):
            self._rank_0.tell(
                "failed", f"rank {self._place.rank} is behind step {self._last[0]}, and rank 0 sent step {number}"
            )
            return
        self._last = number, attempt
        self._work.put(_Step(number, attempt, parts))

    def without(self, rank: int, attempt: int) -> None:
        """On the thread that reads."""
        if self._spread is not None:
            self._spread.cut(rank)
            self._work.put(_Change(attempt, lambda spread: spread.without(rank, attempt)))

    def rejoin(self, rank: int, endpoint: str, attempt: int) -> None:
        """As above."""
        self._work.put(_Change(attempt, lambda spread: spread.rejoin(rank, endpoint, attempt)))

    def join(self, ranks: list[int], attempt: int) -> None:
        """As above."""
        self._work.put(_Change(attempt, lambda spread: spread.join(ranks, attempt)))

    def between(self, work: Callable[[], None]) -> None:
        """Behind the steps that were taken so far. As above."""
        self._work.put(_Between(work))

    def stop(self) -> None:
        """No step follows."""
        self._work.put(None)

    def run(self) -> None:
        """Until `stop`, or a step that raises, of which rank 0 is told."""
        while (work := self._work.get()) is not None:
            try:
                if isinstance(work, _Step):
                    self._compute(work)
                elif isinstance(work, _Between):
                    work.carry_out()
                else:
                    assert self._spread is not None, "rank 0 knows that experts are spread"
                    self._attempt = work.attempt
                    work.carry_out(self._spread)
            except TransferError as error:
                log.warning("rank %d waits for what follows: %s", self._place.rank, error)
                self._rank_0.tell("broken_off", f"rank {self._place.rank}: {error}", *self._running)
            except Exception as error:  # whatever the model raises: rank 0 must hear
                log.error("a step failed", exc_info=error)
                why = f"{type(error).__name__}: {error}"
                self._rank_0.tell("failed", f"step {self._running[0]} failed on rank {self._place.rank}: {why}")
                return

    def _compute(self, step: _Step) -> None:
        if step.attempt < self._attempt:
            return  # rank 0 did not know yet who is lost: the step comes again
        self._running = step.number, step.attempt
        results = [self._runner.launch(unpack(part)).result() for part in step.parts]
        if self._place.draws:
            self._rank_0.tell("drawn", step.number, step.attempt, [pack_result(result) for result in results])
