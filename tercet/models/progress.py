"""Who is told how far the load of a model is."""

from __future__ import annotations

from collections.abc import Callable

from tercet.core import Loading

Hear = Callable[[Loading], None]  # called on any thread, often: it is to return at once


def unheard(loading: Loading) -> None:
    pass
