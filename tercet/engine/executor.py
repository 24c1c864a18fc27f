"""Carry a plan out. One runner in this process today; a group of ranks would be another executor.

One sequence's fault must not be everybody's: a step that fails is run again, each sequence alone. KV is written where
it was written before, and a mover takes the same blocks twice, so running again is harmless.
"""

from __future__ import annotations

import logging
from typing import Protocol

from tercet.engine.plan import Piece, PieceResult, StepPlan, StepResult
from tercet.errors import EngineFault

log = logging.getLogger(__name__)


class Executor(Protocol):
    @property
    def vocab_size(self) -> int:
        """The model knows the token ids below it."""

    @property
    def layers_done(self) -> int:
        """Of all steps together; grows while a step runs. Any thread."""

    def execute(self, plan: StepPlan) -> StepResult:
        """What the step brings each sequence, which may be the fault that ends it. Raises what the model raises if that
        is broken, and no sequence is to blame."""


class StepRunner(Protocol):
    """What computes a plan as a whole (engine/runner.py)."""

    vocab_size: int
    layers_done: int

    def run(self, plan: StepPlan) -> StepResult:
        """Raises whatever the model raises. Changes nothing that keeps the same plan from running again."""

    def check(self) -> None:
        """Raises what the model raises without any sequence."""


class LocalExecutor:
    def __init__(self, runner: StepRunner) -> None:
        self._runner = runner

    @property
    def vocab_size(self) -> int:
        return self._runner.vocab_size

    @property
    def layers_done(self) -> int:
        return self._runner.layers_done

    def execute(self, plan: StepPlan) -> StepResult:
        try:
            return self._runner.run(plan)
        except Exception as error:  # noqa: BLE001  # whatever the model raises, a sequence may be its cause
            self._runner.check()
            if len(plan.pieces) == 1:
                return [_fault(plan.pieces[0], error)]
            return [self._alone(part) for part in plan.apart()]

    def _alone(self, part: StepPlan) -> PieceResult:
        try:
            [result] = self._runner.run(part)
        except Exception as error:  # noqa: BLE001  # as above
            return _fault(part.pieces[0], error)
        return result


def _fault(piece: Piece, error: Exception) -> PieceResult:
    log.error("the step of request %s failed", piece.ticket.request_id, exc_info=error)
    return PieceResult(fault=EngineFault(f"the engine failed on this request: {type(error).__name__}: {error}"))
