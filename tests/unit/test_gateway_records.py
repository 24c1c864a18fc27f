"""The record of requests and the series: what they hold is bounded, and what they count is what was done."""

from __future__ import annotations

import gc
import json
import time
import weakref
from contextlib import ExitStack

import pytest

from tercet.core import Done, FinishReason, GenerateRequest, Progress, SamplingParams, StageTimes, TokenEvent
from tercet.errors import UnknownRequest
from tercet.metrics import Metrics
from tercet.roles.gateway.ask import Ask
from tercet.roles.gateway.choice import Choice
from tercet.roles.gateway.records import Record, Records
from tercet.roles.gateway.series import POINTS, WINDOW_S, Series
from tercet.roles.router.record import Decision, Seen
from tests.fakes.tokenizer import MODEL

WORKERS = (("prefill", "p0"), ("decode", "d1"))
TIMES = StageTimes((("queue", 0.1), ("prefill", 0.2)), kv_bytes=1000, transport="shm")
ROWS = tuple(Seen(f"d{n}", 1, "decode", 0, 0, 0, 0) for n in range(10))


def ask(name, arrived=None, client=""):
    now = time.monotonic() if arrived is None else arrived
    return Ask(name, ("x",), SamplingParams(), 60.0, now, client)


def choice_of(tokens=(1, 2, 3), arrived=None):
    now = time.monotonic() if arrived is None else arrived
    return Choice(0, GenerateRequest("r", tokens, SamplingParams(), now + 60), MODEL.tokenizer, (), now)


def decision(at=0.0, prefill="p0"):
    return Decision(at, 1, ("prefill", "decode"), ROWS, prefill=prefill, decode="d1")


def run(records, name, notes=0, client=""):
    with records.of(ask(name, client=client), "m") as record:
        choice = choice_of()
        records.begin(record, [choice])
        for _ in range(notes):
            records.note(choice.request, decision())


def listed(records):
    return [json.loads(line) for line in records.lines()()]


def points(series):
    return [json.loads(text) for _, text in series.points()]


def test_only_the_last_ones_are_kept():
    records = Records(most=3)
    for number in range(5):
        run(records, f"request-{number}")
    assert [one["id"] for one in listed(records)] == ["request-4", "request-3", "request-2"]
    assert records.running == {}
    with pytest.raises(UnknownRequest, match="no request 'request-1' is known"):
        records.find("request-1")
    with pytest.raises(UnknownRequest, match="may be 3 requests"):
        records.find("request")


def test_decisions_are_bounded_in_all():
    records = Records(most=100, most_rows=45)
    for number in range(6):
        run(records, f"request-{number}", notes=2)
    assert [one["id"] for one in listed(records)] == ["request-5", "request-4"]


def test_an_id_that_is_used_again_names_the_newest_request():
    records = Records()
    run(records, "same", notes=2)
    run(records, "same")
    assert len(listed(records)) == 1
    assert records.find("same").whole()()["told"][0]["notes"] == []
    assert records._rows == 0


def test_an_id_of_one_client_is_not_the_same_id_of_another():
    records = Records()
    for client, notes in (("name-a", 1), ("name-b", 2), ("name-b", 3), ("name-a", 4)):
        run(records, "job-1", notes, client)
    kept = {"job-1": ("name-a", 4), "job-1@name-b": ("name-b", 3)}
    for request_id, (client, notes) in kept.items():
        whole = records.find(request_id).whole()()
        assert (whole["id"], whole["client"], len(whole["told"][0]["notes"])) == (request_id, client, notes)
    assert records._rows == (4 + 3) * len(ROWS)
    with records.of(ask("job-1", client="name-b"), "m"):  # which runs while that of another begins
        run(records, "job-1", client="name-a")
    assert [one["id"] for one in listed(records)] == ["job-1", "job-1@name-b"]


def test_a_request_waits_until_it_has_workers():
    records = Records()
    with records.of(ask("one"), "m") as record:
        assert listed(records)[0]["state"] == "waiting"
        choice = choice_of()
        records.begin(record, [choice])
        records.note(choice.request, decision(prefill=""))
        assert records.states() == (0, 1)
        records.note(choice.request, decision())
        assert records.states() == (1, 0)
    assert listed(records)[0]["state"] == "finished"
    assert records.states() == (0, 0)


def test_a_request_that_has_ended_is_not_summed_up_again(monkeypatch):
    records, summed, summary = Records(), [], Record.summary
    for number in range(3):
        run(records, f"ended-{number}")
    monkeypatch.setattr(Record, "summary", lambda self: summed.append(self.request_id) or summary(self))
    with records.of(ask("runs"), "m"):
        for _ in range(2):
            assert [one["state"] for one in listed(records)] == ["waiting", *["finished"] * 3]
    assert summed == ["runs", "runs", "runs"]  # two listings, and its own end
    assert listed(records)[0]["elapsed_s"] == listed(records)[0]["elapsed_s"]
    assert len(summed) == 3


def test_nothing_of_the_prompt_outlives_the_request():
    records = Records()
    with records.of(ask("one"), "m") as record:
        choice = choice_of()
        records.begin(record, [choice])
        request = weakref.ref(choice.request)
        del choice
        assert request() is not None
    gc.collect()
    assert request() is None
    assert records.find("one").whole()()["prompt_tokens"] == 3


def test_an_answer_counts_while_it_is_made():
    records, metrics, now = Records(), Metrics(), time.monotonic()
    series = Series(records)
    with records.of(ask("one", now), "m") as record:
        choice = choice_of(tokens=(1,) * 7, arrived=now)
        records.begin(record, [choice])
        choice.push(TokenEvent(65, at=now + 0.25), metrics)
        series.tick(now + 1, 1001.0)
        choice.push(TokenEvent(65, at=now + 0.75), metrics)
        choice.account = Progress(0, TIMES, WORKERS)
        choice.push(TokenEvent(65, at=now + 1.25), metrics)
        series.tick(now + 2, 1002.0)
        choice.finish(Done(FinishReason.STOP, times=TIMES, workers=WORKERS))
        choice.book(FinishReason.STOP, metrics)
    series.tick(now + 3, 1003.0)
    first, second, third = points(series)
    assert (first["tokens_in"], first["tokens_out"], first["finished"]) == pytest.approx((7, 1, 0), rel=0.01)
    assert first["ttft_p50"] == pytest.approx(0.25)
    assert (second["tokens_in"], second["tokens_out"]) == pytest.approx((0, 2), rel=0.01)
    assert second["kv"] == [["p0", "d1", pytest.approx(1000)]]
    assert (third["tokens_out"], third["finished"], third["kv"]) == (0, pytest.approx(1), [])
    assert third["tpot_p99"] == pytest.approx(0.5)
    assert series.kv_bytes == {("p0", "d1"): 1000}
    assert series.kv_rates() == {("p0", "d1"): pytest.approx(1000 / 3)}
    assert [at for at, _ in series.points()] == [point["t"] for point in (first, second, third)]
    assert second["t"] == pytest.approx(1002.0)
    series.tick(now + 4 + WINDOW_S, 1004.0)
    assert points(series)[-1]["ttft_p50"] is None


def test_a_clock_that_is_set_hides_no_point():
    """The times of points are Unix times, and go on rising when it is set back."""
    series = Series(Records())
    for now, wall in ((1, 1001), (2, 1002), (3, 503), (4, 504), (5, 5005), (6, 5006)):
        series.tick(float(now), float(wall))
    assert [at for at, _ in series.points()] == [1001, 1002, 1003, 1004, 5005, 5006]


def test_the_ring_has_an_end():
    series = Series(Records())
    for second in range(POINTS + 50):
        series.tick(float(second), float(second))
    assert len(series.points()) == POINTS


def test_requests_that_are_forgotten_while_they_run_leave_nothing_behind():
    """Their rows are not counted when they end, else newer ones would have no room in the end."""
    records = Records(most=4, most_rows=8 * len(ROWS))
    with ExitStack() as stack:
        for number in range(50):
            record = stack.enter_context(records.of(ask(f"long-{number}"), "m"))
            choice = choice_of()
            records.begin(record, [choice])
            records.note(choice.request, decision())
            run(records, f"meanwhile-{number}")
    for number in range(20):
        run(records, f"short-{number}", notes=1)
    assert len(listed(records)) == 4
    assert records._rows == 4 * len(ROWS)
