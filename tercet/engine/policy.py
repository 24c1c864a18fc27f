"""Who runs next: decisions alone. Blocks and preemption are the scheduler's matter (engine/scheduler.py)."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Rows
from typing import Protocol

from tercet.engine.sequence import Sequence


class Policy(Protocol):
    """Looks at sequences, changes none."""

    def prompt_tokens(self, num_decodes: int) -> int:
        """Tokens of prompts that a step may compute beside so many decodes."""

    def next(self, waiting: Rows[Sequence]) -> Sequence:
        """Who of those that wait starts first; nobody starts before it. waiting: at least one, the preempted first."""

    def victims(self, running: Rows[Sequence]) -> Iterable[Sequence]:
        """In which order they are preempted when blocks run out. running: in order of arrival."""


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
