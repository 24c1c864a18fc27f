"""Bars for benchmarks that take long: on a terminal alone, on standard error, redrawn once a second so that they cost
nothing of what is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

T = TypeVar("T")


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[], None]]:
    """-> to be called at the end of each of `total` parts."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, refresh_per_second=1, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


def rounds(parts: Sequence[T], what: str = "rounds") -> Iterable[T]:
    with bar(what, len(parts)) as done:
        for part in parts:
            yield part
            done()
