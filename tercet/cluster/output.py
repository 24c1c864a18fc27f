"""What the command says, whoever reads it: a line that cannot be written never decides anything."""

from __future__ import annotations

import contextlib
import os
import sys

import typer


def open_closed() -> None:
    """Put /dev/null where standard input, output or error came closed, before another file gets that number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number is this one
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115, till the end


def say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a closed terminal, a full disk, a reader that has gone
        typer.echo(line)


def report(line: str) -> None:
    """To standard error, where the log goes."""
    with contextlib.suppress(OSError, ValueError):
        typer.echo(f"tercet: {line}", err=True)
