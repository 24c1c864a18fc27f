"""Keep one sequence's fault from being everybody's: a step that fails is run again, each sequence alone.

KV is written where it was written before, and a handoff takes the same blocks twice, so running again is harmless.
"""

from __future__ import annotations

import logging

from tercet.engine.runner import Computed, Runner
from tercet.engine.scheduler import Step
from tercet.engine.sequence import Sequence
from tercet.errors import EngineFault

log = logging.getLogger(__name__)


class Isolated:
    """Runs steps on the engine's thread."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def run(self, step: Step) -> Computed:
        """What the step brings each sequence, which may be the fault that ends it. Raises what the runner raises if the
        model fails without any of them too: then it is broken, and none of them is to blame."""
        try:
            return self._runner.run(step)
        except Exception as error:  # noqa: BLE001  # whatever the model raises, a sequence may be its cause
            self._runner.check()
            return self._one_by_one(step, error)

    def _one_by_one(self, step: Step, error: Exception) -> Computed:
        parts = dict(step.parts())
        if len(parts) == 1:
            return Computed({sequence: _fault(sequence, error) for sequence in parts})
        together = Computed({})
        for sequence, part in parts.items():
            try:
                computed = self._runner.run(part)
                together.outcomes.update(computed.outcomes)
                together.scores.update(computed.scores)
            except Exception as own:  # noqa: BLE001  # as above
                together.outcomes[sequence] = _fault(sequence, own)
        return together


def _fault(sequence: Sequence, error: Exception) -> EngineFault:
    log.error("the step of request %s failed", sequence.ticket.request_id, exc_info=error)
    return EngineFault(f"the engine failed on this request: {type(error).__name__}: {error}")
