"""Execute a plan by one runner, in this process; by those of a group of ranks: group.py.

One sequence's fault must not fail the whole batch: a step that fails is run again, one sequence at a time. That is
safe, since the same KV goes to the same slots, and the mover accepts the same blocks twice.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

from tercet import logs
from tercet.engine.plan import ImageKey, Piece, PieceResult, StepPlan, StepResult
from tercet.errors import EngineFault

log = logging.getLogger(__name__)
Tokens = TypeVar("Tokens")  # what a step draws, where its runner has it
Drawn_co = TypeVar("Drawn_co", covariant=True)


class Launched(Protocol):
    """A step that computes, or has computed."""

    def result(self) -> StepResult:
        """A result for each piece; waits for it. Raises what the model raises."""


class Executor(Protocol):
    rank: int  # of this process in its group of ranks, which compute one model together
    world_size: int

    @property
    def ahead(self) -> bool:
        """Whether a step may be launched before the result of the one before it is known."""

    @property
    def vocab_size(self) -> int:
        """Token ids below it are valid."""

    @property
    def layers_done(self) -> int:
        """Layers computed so far, over all steps; grows during a step. Any thread."""

    def see(self, key: ImageKey, embeddings: Any) -> None:
        """Keep an image's embeddings, [levels, tokens, E], for the steps that take them."""

    def forget(self, key: ImageKey) -> None:
        """No step to come takes them."""

    def launch(self, plan: StepPlan) -> Launched:
        """Begin a step; its result may be a fault that ends a sequence. Raises what the model raises if the model
        itself is broken, so that no sequence is to blame."""


class Running(Protocol[Drawn_co]):
    """A step of a runner. The tokens that it draws can be taken by the next one before anybody has seen them."""

    @property
    def tokens(self) -> Drawn_co | None:
        """One for each piece that draws; None if none does."""

    def result(self) -> StepResult: ...


class StepRunner(Protocol[Tokens]):
    """What computes a plan as a whole (engine/runner.py)."""

    vocab_size: int
    ahead: bool

    @property
    def layers_done(self) -> int: ...

    def launch(self, plan: StepPlan, before: Tokens | None) -> Running[Tokens]:
        """before: what the step before draws. Raises whatever the model raises. The same plan can be launched again."""

    def tokens_of(self, token_ids: Sequence[int]) -> Tokens:
        """Known ids, as a step has them."""

    def see(self, key: ImageKey, embeddings: Any) -> None: ...

    def forget(self, key: ImageKey) -> None: ...

    def check(self) -> None:
        """Run the model without any sequence. Raises what it raises."""


class LocalExecutor(Generic[Tokens]):
    rank, world_size = 0, 1

    def __init__(self, runner: StepRunner[Tokens]) -> None:
        self._runner = runner
        self._before: Tokens | None = None

    @property
    def ahead(self) -> bool:
        return self._runner.ahead

    @property
    def vocab_size(self) -> int:
        return self._runner.vocab_size

    @property
    def layers_done(self) -> int:
        return self._runner.layers_done

    def see(self, key: ImageKey, embeddings: Any) -> None:
        self._runner.see(key, embeddings)

    def forget(self, key: ImageKey) -> None:
        self._runner.forget(key)

    def launch(self, plan: StepPlan) -> Launched:
        try:
            running = self._runner.launch(plan, self._before)
        except Exception as error:  # noqa: BLE001  # whatever the model raises, a sequence may be its cause
            self._runner.check()
            return self._one_by_one(plan, error)
        self._before = running.tokens
        return running

    def _one_by_one(self, plan: StepPlan, error: Exception) -> Launched:
        """The step again, a sequence at a time, if more than one may have been the cause of the error."""
        if len(plan.pieces) == 1:
            results = [_fault(plan.pieces[0], error)]
        else:
            results = [self._alone(part) for part in plan.apart()]
        drawn = [result for piece, result in zip(plan.pieces, results, strict=True) if piece.draw is not None]
        # A sequence at fault is over; whatever the next step computes for it is dropped.
        self._before = self._runner.tokens_of([r.tokens[0].token_id if r.tokens else 0 for r in drawn])
        return Done(results)

    def _alone(self, part: StepPlan) -> PieceResult:
        try:
            [result] = self._runner.launch(part, self._before).result()
        except Exception as error:  # noqa: BLE001  # as above
            return _fault(part.pieces[0], error)
        return result


class Done:
    """A step whose result is known."""

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        return self._result


def _fault(piece: Piece, error: Exception) -> PieceResult:
    log.error("the step of a request failed", exc_info=error, extra=logs.about(piece.ticket.asked))
    return PieceResult(fault=EngineFault(f"the engine failed on this request: {type(error).__name__}: {error}"))
