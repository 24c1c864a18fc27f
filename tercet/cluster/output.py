"""Output of the command; a failed write never changes what the command does."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
from collections.abc import Callable, Iterator

import typer
from rich.console import Console

from tercet import logs
from tercet.spec import LoggingSpec

_lines: list[logs.Lines] = []  # none: plain text


def open_closed() -> None:
    """Open /dev/null as each closed standard stream, before another file gets its descriptor."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number: this one
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115, never closed


@contextlib.contextmanager
def foreign_silenced() -> Iterator[None]:
    """What libraries print to standard output meanwhile is dropped."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    own, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # what C keeps back
        os.dup2(own, 1)
        os.close(own)


@contextlib.contextmanager
def waiting(what: str) -> Iterator[Callable[[], None]]:
    """Show on a terminal that something goes on, below the lines that come meanwhile, until what is given is called."""
    console = Console(stderr=True)
    if not console.is_terminal or _lines:
        yield lambda: None
        return
    status = console.status(what)
    status.start()
    try:
        yield status.stop
    finally:
        status.stop()


def use(spec: LoggingSpec) -> None:
    """For a command that runs on and on: where the log is JSON, so is what the command says."""
    _lines[:] = [logs.JsonLines({"role": "controller"})] if spec.format == "json" else []


def say(line: str) -> None:
    line = _json(line, logging.INFO) if _lines else line
    with contextlib.suppress(OSError, ValueError):  # a closed terminal, a full disk, a reader that has gone
        typer.echo(line)


def report(line: str, level: int = logging.INFO) -> None:
    """To standard error, where the log goes."""
    line = _json(line, level) if _lines else f"tercet: {line}"
    with contextlib.suppress(OSError, ValueError):
        typer.echo(line, err=True)


def _json(line: str, level: int) -> str:
    return _lines[0].format(logging.LogRecord("tercet.serve", level, "", 0, line, None, None))
