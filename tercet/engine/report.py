"""The outcome of a step, for the handlers of the legs in it."""

from __future__ import annotations

from dataclasses import dataclass

from tercet.core import PromptLogprobs, TokenEvent
from tercet.engine.sequence import Sequence
from tercet.errors import EngineFault, WorkerDrained


@dataclass(frozen=True)
class Sampled:
    """A sequence got its next token; `token.finish` says why it is over, if it is."""

    sequence: Sequence
    token: TokenEvent
    stop_token_id: int | None = None


@dataclass(frozen=True)
class Faulted:
    """The step failed on this sequence, or it was preempted and cannot be computed again here. It is over."""

    sequence: Sequence
    error: EngineFault | WorkerDrained


@dataclass(frozen=True)
class Scored:
    """The logprobs of a whole prompt, if its request asked for them; the first token follows."""

    sequence: Sequence
    scores: PromptLogprobs


StepItem = Sampled | Faulted | Scored
StepReport = list[StepItem]
