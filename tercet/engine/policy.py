"""Who runs next: only the choice. The scheduler (engine/scheduler.py) allocates blocks and preempts."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Rows
from typing import Protocol

from tercet.engine.sequence import Sequence


class Policy(Protocol):
    """Reads sequences, changes none."""

    def prompt_tokens(self, num_decodes: int) -> int:
        """Tokens of prompts that a step may compute beside so many decodes."""

    def next(self, waiting: Rows[Sequence]) -> Sequence:
        """The waiting sequence to start next; if it does not fit, none starts. waiting: not empty, preempted ones
        first."""

    def victims(self, running: Rows[Sequence]) -> Iterable[Sequence]:
        """The order in which sequences are preempted when blocks run out. running: in order of arrival."""


class FirstComeFirstServed:
    """Every running decode, then prompts in chunks in order of arrival, under one token budget (Sarathi-Serve,
    arXiv:2403.02310, section 4). The latest arrival is preempted first."""

    def __init__(self, token_budget: int) -> None:
        self._token_budget = token_budget

    def prompt_tokens(self, num_decodes: int) -> int:
        return max(1, self._token_budget - num_decodes)  # decodes alone must not starve the prompts

    def next(self, waiting: Rows[Sequence]) -> Sequence:
        return waiting[0]

    def victims(self, running: Rows[Sequence]) -> Iterable[Sequence]:
        return reversed(running)
