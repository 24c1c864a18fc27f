"""The log of a process: one configuration for all of them, lines of text or of JSON on standard error.

    log.info("...", extra=logs.about(request_id))      a line about a request
    with logs.within(request_id, span): ...            so are all lines that come from in here, in this task

A line has nothing that a client wrote. So where clients are heard, an exception that is not ours is told by its kind
and place alone, since its message may quote them, unless `logging.prompts` is set.
"""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from opentelemetry.trace import Span, format_span_id, format_trace_id

from tercet.errors import TercetError, UserError
from tercet.spec import LoggingSpec

ACCESS = "tercet.access"  # logger of the line for each request
MOST_ALIKE, WINDOW_S = 50, 10.0  # lines of one kind, in so many seconds

_within: ContextVar[Mapping[str, Any]] = ContextVar("within", default={})  # noqa: B039  # never changed


def configure(spec: LoggingSpec, *, hears_clients: bool = False, **who: object) -> None:
    """For this process, once or again. who: what each line has of it, such as worker, role and epoch."""
    handler = logging.StreamHandler()
    shows_all = spec.prompts or not hears_clients
    handler.setFormatter((JsonLines if spec.format == "json" else TextLines)(who, shows_all=shows_all))
    handler.addFilter(Alike())
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h.formatter, Lines)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)  # other libraries' lines; at lower levels some of them show what they are sent
    logging.getLogger("tercet").setLevel(spec.level.upper())
    logging.raiseExceptions = False  # else a line that cannot be written is told with its parts


def about(request_id: str, span: Span | None = None, **fields: Any) -> dict[str, Any]:
    """For `extra`: what a line is about."""
    told: dict[str, Any] = {"request_id": request_id}
    context = None if span is None else span.get_span_context()
    if context is not None and context.is_valid:
        told |= {"trace_id": format_trace_id(context.trace_id), "span_id": format_span_id(context.span_id)}
    return {"about": told | fields}


@contextmanager
def within(request_id: str, span: Span | None = None) -> Iterator[None]:
    token = _within.set(about(request_id, span)["about"])
    try:
        yield
    finally:
        _within.reset(token)


def reason(error: TercetError) -> str:
    """Its name, and its words unless they may quote a client."""
    return error.code() if isinstance(error, UserError) else f"{error.code()}: {error}"


class Lines(logging.Formatter):
    def __init__(self, who: Mapping[str, object], *, shows_all: bool = True) -> None:
        super().__init__()
        self._who, self._shows_all = who, shows_all

    def _about(self, record: logging.LogRecord) -> dict[str, Any]:
        return {**_within.get(), **getattr(record, "about", {})}

    def _exception(self, record: logging.LogRecord) -> str:
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return ""
        return "".join(traceback.format_exception(error)) if self._shows_all else _kinds_and_places(error)


class JsonLines(Lines):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "ts": _time_of(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._who,
            **self._about(record),
        }
        if exception := self._exception(record):
            line["exception"] = exception
        return json.dumps(line, default=str)


class TextLines(Lines):
    def format(self, record: logging.LogRecord) -> str:
        who = self._who.get("worker") or self._who.get("role") or ""
        if (rank := self._who.get("rank")) is not None:
            who = f"{who} rank {rank}"
        fields = "".join(f" {name}={_word(value)}" for name, value in self._about(record).items() if value is not None)
        message = _shown(record.getMessage())
        line = f"{_time_of(record)} {record.levelname:<7} {who} {record.name}: {message}{fields}"
        exception = self._exception(record)
        return f"{line}\n{exception.rstrip()}" if exception else line


class Alike(logging.Filter):
    """Leaves out lines of one kind beyond MOST_ALIKE in WINDOW_S, whoever causes them; the next says how many."""

    def __init__(self) -> None:
        super().__init__()
        self._since = time.monotonic()
        self._seen: Counter[tuple[str, str]] = Counter()
        self._left_out: Counter[tuple[str, str]] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == ACCESS:  # one each is what it is for
            return True
        now, kind = time.monotonic(), (record.name, str(record.msg))
        if now - self._since > WINDOW_S:
            self._since, self._left_out = now, self._seen - Counter(dict.fromkeys(self._seen, MOST_ALIKE))
            self._seen.clear()
        self._seen[kind] += 1
        if left_out := self._left_out.pop(kind, 0):
            record.about = getattr(record, "about", {}) | {"left_out": left_out}
        return self._seen[kind] <= MOST_ALIKE


def _time_of(record: logging.LogRecord) -> str:
    """RFC 3339, UTC."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{whole}.{int(record.msecs):03d}Z"


def _shown(text: str) -> str:
    """One line, in which nothing speaks to a terminal or turns the direction of writing."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _word(value: object) -> str:
    text = str(value)
    return text if text.isprintable() and text and not set(text) & set(' "=') else json.dumps(text)


def _kinds_and_places(error: BaseException) -> str:
    """A traceback without messages, but those of errors of ours that quote no client."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    before = f"{_kinds_and_places(cause)}which led to\n" if cause is not None else ""
    message = f": {error}" if isinstance(error, TercetError) and not isinstance(error, UserError) else ""
    return f"{before}{''.join(traceback.format_tb(error.__traceback__))}{type(error).__qualname__}{message}\n"
