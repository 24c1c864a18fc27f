"""What `tercet scale` waits for, and how `tercet status` shows a cluster that changes. Pure."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from tercet.cluster.scale import missing, scaled
from tercet.cluster.tables import status_table
from tercet.errors import ClusterError, SpecError


def member(state: str, **more: object) -> dict[str, Any]:
    return {"role": "decode", "state": state, "epoch": 1, "reason": "", "pid": 7, "node": "vm", **more}


def published(load: object = None) -> dict[str, Any]:
    return {"role": "decode", "epoch": 1, "pid": 7, "node": "vm", "load": load}


LOAD = {"running": 3, "waiting": 0, "blocks_free": 5, "blocks_total": 9}


def status(members: dict[str, Any], workers: dict[str, Any], **more: Any) -> dict[str, Any]:
    gateway = {"name": "c", "ready": True, "http_url": "h", "grpc_address": "g", "pid": 1, "node": "vm"}
    return gateway | {"members": members, "workers": workers, "target": {"decode": 2}, "answers": {"id": {}}} | more


@pytest.mark.parametrize(
    ("members", "workers", "want"),
    [
        ({"a": member("live"), "b": member("live")}, {"a": published(LOAD), "b": published(LOAD)}, ""),
        ({"a": member("live"), "b": member("live")}, {"a": published(LOAD), "b": published()}, "b is not in use yet"),
        ({"a": member("live"), "b": member("live")}, {"a": published(LOAD)}, "b is not in use yet"),
        ({"a": member("live"), "b": member("starting")}, {"a": published(LOAD)}, "b is starting"),
        ({"a": member("live")}, {"a": published(LOAD)}, "it has 1"),
        ({"a": member("live"), "b": member("lost", reason="no room")}, {"a": published(LOAD)}, "b is lost no room"),
        ({n: member("live") for n in "abc"}, {n: published(LOAD) for n in "abc"}, "it has 3"),
    ],
)
def test_what_is_waited_for_is_named(members, workers, want):
    assert missing(status(members, workers), "id", "decode", 2) == want


def test_an_answer_is_raised_as_what_it_is_and_a_later_question_is_told():
    refused = status({}, {}, answers={"id": {"code": "spec_error", "message": "no role x"}})
    with pytest.raises(SpecError, match="no role x"):
        missing(refused, "id", "x", 2)
    assert missing(status({}, {}), "another", "decode", 2) == "the controller has not answered yet"
    with pytest.raises(ClusterError, match="another request came meanwhile: decode is now to have 2"):
        missing(status({}, {}), "id", "decode", 3)


def test_what_happened_is_told():
    a, b, newer = {"a": {"epoch": 1}}, {"b": {"epoch": 2}}, {"a": {"epoch": 2}}
    assert str(scaled("c", "decode", a, a | b)) == "cluster c: decode has 2 workers (b came)"
    assert str(scaled("c", "decode", a | b, a)) == "cluster c: decode has 1 worker (b went)"
    assert str(scaled("c", "decode", a, a)) == "cluster c: decode has 1 worker (as before)"
    assert str(scaled("c", "decode", a, newer)) == "cluster c: decode has 1 worker (a came)"


def test_status_shows_who_drains_and_the_target():
    console = Console(width=80, record=True)
    members = {"worker-1": member("live"), "worker-2": member("draining", load=LOAD)}
    console.print(status_table(status(members, {"worker-1": published(LOAD)})))
    shown = console.export_text()
    row = next(line for line in shown.splitlines() if "worker-2" in line)
    assert row.split()[1:3] == ["decode", "draining"]
    assert row.split()[-2:] == ["3+0", "5/9"]
    assert max(map(len, shown.splitlines())) <= 80
    assert "target: 2 decode" in shown
