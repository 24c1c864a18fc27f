"""Output of the command; a failed write never changes what the command does."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import select
import sys
import time
from collections.abc import Iterator
from typing import IO, Self, TextIO, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

from tercet import logs
from tercet.core import Loading
from tercet.spec import LoggingSpec

SAY_EVERY_S = 10.0
LINE_S = 0.5  # for a line, from a command that must go on

_lines: list[logs.Lines] = []  # none: plain text
_waits_s: float | None = None  # for a line; none: as long as it takes


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


def _console() -> Console | None:
    """Where bars can be drawn."""
    seen = Console(stderr=True)
    if _lines or not seen.is_terminal or seen.is_dumb_terminal:
        return None
    with contextlib.suppress(OSError):
        return Console(file=cast("IO[str]", _Patient(sys.stderr.fileno())), force_terminal=True)
    return None


class _Patient(io.TextIOBase):
    """A terminal that is written to without waiting for it: what it does not take is dropped. One that nobody reads
    (Ctrl-S, a connection that stalls) would else stop whoever draws, and with it what handles signals."""

    def __init__(self, fd: int) -> None:
        # Opened anew, since others who write to it are to wait as ever.
        self._fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            os.write(self._fd, text.encode(errors="replace"))
        return len(text)

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
        super().close()


class Waiting:
    """Shows on a terminal that something goes on, below the lines that come meanwhile, with a bar for each worker that
    loads its model; elsewhere and afterwards a line now and then."""

    def __init__(self, what: str) -> None:
        console = _console()
        self._bars = Progress(
            *(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}")),
            console=console,
            transient=True,
            redirect_stdout=False,  # it may be a file
            disable=console is None,
        )
        self._bars.add_task(what, total=None, told="")
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, float] = {}  # title -> time.monotonic() at which it began, or was last told of

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """The bars are gone from the terminal."""
        with contextlib.suppress(OSError, ValueError):
            self._bars.stop()

    def loading(self, title: str, loading: Loading) -> None:
        """A worker is so far."""
        if self._bars.live.is_started:
            if title not in self._tasks:
                self._tasks[title] = self._bars.add_task(title, told="")
            self._bars.update(self._tasks[title], completed=loading.done, total=loading.total, told=str(loading))
        elif time.monotonic() - self._said.setdefault(title, time.monotonic()) > SAY_EVERY_S:
            self._said[title] = time.monotonic()
            report(f"{title}: {loading}")


def use(spec: LoggingSpec) -> None:
    """For a command that runs on and on: where the log is JSON, so is what the command says, and it does not wait long
    for who reads that."""
    global _waits_s  # noqa: PLW0603, of this process
    _waits_s = LINE_S
    _lines[:] = [logs.JsonLines({"role": "controller"})] if spec.format == "json" else []


def say(line: str) -> None:
    line = _json(line, logging.INFO) if _lines else line
    if not _takes(sys.stdout):
        return
    with contextlib.suppress(OSError, ValueError):  # a closed terminal, a full disk, a reader that has gone
        typer.echo(line)


def report(line: str, level: int = logging.INFO) -> None:
    """To standard error, where the log goes."""
    line = _json(line, level) if _lines else f"tercet: {line}"
    if not _takes(sys.stderr):
        return
    with contextlib.suppress(OSError, ValueError):
        typer.echo(line, err=True)


def _takes(stream: TextIO) -> bool:
    """Whether it can be written to now, or soon where this must not be waited for: a terminal that is stopped (Ctrl-S)
    and a full pipe take nothing."""
    if _waits_s is None:
        return True
    with contextlib.suppress(OSError, ValueError):
        asked = select.poll()
        asked.register(stream.fileno(), select.POLLOUT)
        return bool(asked.poll(1000 * _waits_s))
    return True  # no file: it waits for nobody


def _json(line: str, level: int) -> str:
    return _lines[0].format(logging.LogRecord("tercet.serve", level, "", 0, line, None, None))
