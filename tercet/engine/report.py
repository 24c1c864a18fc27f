"""What a step has brought, for the handler whose leg it is."""

from __future__ import annotations

from dataclasses import dataclass

from tercet.core import PromptLogprobs, TokenEvent
from tercet.engine.sequence import Sequence
from tercet.errors import EngineFault


@dataclass(frozen=True)
class Sampled:
    """A sequence got its next token; `token.finish` says why it is over, if it is."""

    sequence: Sequence
    token: TokenEvent
    stop_token_id: int | None = None


@dataclass(frozen=True)
class Faulted:
    """A sequence's own step failed, and ended it."""

    sequence: Sequence
    error: EngineFault


@dataclass(frozen=True)
class Scored:
    """The logprobs of a whole prompt, as its request wanted; the first token follows."""

    sequence: Sequence
    scores: PromptLogprobs


StepReport = list[Sampled | Faulted | Scored]
