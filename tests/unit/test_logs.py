"""One configuration for all lines of a process."""

from __future__ import annotations

import contextvars
import json
import logging

import pytest
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from tercet import logs
from tercet.cluster import output
from tercet.errors import InvalidRequest, WorkerLost
from tercet.roles.gateway.ask import Chat
from tercet.roles.gateway.observing import MOST_PROMPT, _shown
from tercet.spec import LoggingSpec

SPAN = NonRecordingSpan(SpanContext(int("a" * 32, 16), int("b" * 16, 16), False, TraceFlags(1)))


@pytest.fixture(autouse=True)
def _log_as_before():
    root, own, raises = logging.getLogger(), logging.getLogger("tercet"), logging.raiseExceptions
    before, levels = list(root.handlers), (root.level, own.level)
    yield
    root.handlers[:] = before
    root.setLevel(levels[0])
    own.setLevel(levels[1])
    logging.raiseExceptions = raises
    output.use(LoggingSpec())


def lines_of(capsys):
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_line_has_who_says_it_and_what_it_is_about(capsys):
    logs.configure(LoggingSpec(format="json"), worker="worker-1", role="decode", epoch=3, rank=1)
    log = logging.getLogger("tercet.some.place")
    log.warning("first %s", "one", extra=logs.about("r-1", SPAN, attempt=2))
    with logs.within("r-2"):
        log.error("second")
        contextvars.copy_context().run(log.info, "third")
    log.info("fourth")
    log.debug("not this one")
    logging.getLogger("foreign").info("nor this one, which may show what a library was sent")
    first, second, third, fourth = lines_of(capsys)
    assert first | {"ts": ""} == {
        "ts": "",
        "level": "warning",
        "logger": "tercet.some.place",
        "message": "first one",
        "worker": "worker-1",
        "role": "decode",
        "epoch": 3,
        "rank": 1,
        "request_id": "r-1",
        "trace_id": "a" * 32,
        "span_id": "b" * 16,
        "attempt": 2,
    }
    assert second["request_id"] == third["request_id"] == "r-2"
    assert "request_id" not in fourth


def test_a_line_of_text_is_one_line(capsys):
    logs.configure(LoggingSpec(level="debug"), worker="worker-1", rank=2)
    logging.getLogger("tercet.x").debug("two\nlines", extra=logs.about("a b", words='say "no"', none=None))
    [line] = capsys.readouterr().err.splitlines()
    assert line.split(" ", 1)[1] == (
        r'DEBUG   worker-1 rank 2 tercet.x: two\nlines request_id="a b" words="say \"no\""'
    )


def test_what_a_terminal_would_obey_is_shown_as_text(capsys):
    logs.configure(LoggingSpec(), worker="w")
    evil = "".join(map(chr, (*range(32), 0x7F, 0x85, 0x9B, 0x2028, 0x202E))) + "\x1b[2Jend"
    logging.getLogger("tercet.x").warning(evil, extra=logs.about(evil, said=evil))
    [line] = capsys.readouterr().err.removesuffix("\n").splitlines()
    assert line.isprintable()
    assert line.count("[2Jend") == 3


def test_to_configure_twice_is_to_say_things_once(capsys):
    logs.configure(LoggingSpec(format="json"), role="prefill")
    logs.configure(LoggingSpec(format="json"), role="decode")
    logging.getLogger("tercet").warning("x")
    assert [line["role"] for line in lines_of(capsys)] == ["decode"]


def fails(error, word):
    try:
        try:
            raise KeyError(word)
        except KeyError as cause:
            raise error from cause
    except Exception:
        logging.getLogger("tercet").exception("it failed")


@pytest.mark.parametrize("form", ["json", "text"])
@pytest.mark.parametrize(
    ("hears", "prompts", "hidden"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_exceptions_where_clients_are_heard_are_told_without_their_words(form, hears, prompts, hidden, capsys):
    logs.configure(LoggingSpec(format=form, prompts=prompts), hears_clients=hears)
    word = "secret"
    for error in (ValueError(word), InvalidRequest(word), WorkerLost("worker-7 is gone")):
        fails(error, word)
    told = capsys.readouterr().err
    assert ("secret" not in told) == hidden
    assert all(name in told for name in ("KeyError", "ValueError", "InvalidRequest", "worker-7 is gone", "in fails"))


def test_lines_alike_are_left_out_and_counted(capsys, monkeypatch):
    logs.configure(LoggingSpec(format="json"))
    log, access = logging.getLogger("tercet"), logging.getLogger(logs.ACCESS)
    for number in range(1000):
        log.warning("a bad client says %d", number)
        access.info("a request")
    log.warning("another")
    lines = [line["message"] for line in lines_of(capsys)]
    assert lines.count("a request") == 1000
    assert len([line for line in lines if line.startswith("a bad client")]) == logs.MOST_ALIKE
    assert lines[-1] == "another"
    monkeypatch.setattr(logs, "WINDOW_S", -1.0)  # it is over
    log.warning("a bad client says %d", 0)
    assert [line["left_out"] for line in lines_of(capsys)] == [1000 - logs.MOST_ALIKE]


def test_what_the_command_says_is_json_where_the_log_is(capsys):
    output.report("worker-1 is up")
    output.use(LoggingSpec(format="json"))
    output.report("worker-2 is up")
    output.report("broken", logging.ERROR)
    output.say("ready")
    told = capsys.readouterr()
    plain, *rest = told.err.splitlines()
    assert plain == "tercet: worker-1 is up"
    assert [(line["level"], line["message"]) for line in map(json.loads, rest)] == [
        ("info", "worker-2 is up"),
        ("error", "broken"),
    ]
    assert json.loads(told.out)["message"] == "ready"


def test_a_prompt_in_a_line_is_bounded():
    chat = Chat(({"role": "user", "content": "x" * 10_000},))
    assert [len(_shown(prompt)) for prompt in ("y" * 10_000, tuple(range(10_000)), chat)] == [MOST_PROMPT] * 3
