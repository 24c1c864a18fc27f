"""Which of many alike cases the default run takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def few(cases: Iterable[Any], count: int) -> list[Any]:
    """The first `count` as they are, the others marked slow; a tuple is a value for each parameter."""
    every = [*cases]
    values = [case if isinstance(case, tuple) else (case,) for case in every[count:]]
    return [*every[:count], *(pytest.param(*each, marks=pytest.mark.slow) for each in values)]
