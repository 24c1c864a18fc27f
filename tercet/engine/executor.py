"""Execute a plan: by one runner in this process today. A group of ranks would be another executor.

One sequence's fault must not fail the whole batch: a step that fails is run again, one sequence at a time. That is
safe, since the same KV goes to the same slots, and the mover accepts the same blocks twice.
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
        """Token ids below it are valid."""

    @property
    def layers_done(self) -> int:
        """Layers computed so far, over all steps; grows during a step. Any thread."""

    def execute(self, plan: StepPlan) -> StepResult:
        """A result for each sequence, which may be the fault that ends it. Raises what the model raises if the model
        itself is broken, so that no sequence is to blame."""


class StepRunner(Protocol):
    """What computes a plan as a whole (engine/runner.py)."""

    vocab_size: int

    @property
    def layers_done(self) -> int: ...

    def run(self, plan: StepPlan) -> StepResult:
        """Raises whatever the model raises. The same plan can be run again."""

    def check(self) -> None:
        """Run the model without any sequence. Raises what it raises."""


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
