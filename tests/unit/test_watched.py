"""Files that change: who asks what is made of them never waits long, and is told of a change at once if possible."""

from __future__ import annotations

import os
import threading
import time

import pytest

from tercet import watched
from tercet.errors import SpecError
from tercet.watched import WAIT_S, Watched


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(watched, "LOOK_EVERY_S", 0.0)


def test_a_change_is_in_force_for_whoever_asks_next(tmp_path, at_once):
    path = tmp_path / "file"
    path.write_text("0")
    files = Watched([str(path)], path.read_text)
    for number in range(1, 30):
        (tmp_path / "new").write_text(str(number))
        os.replace(tmp_path / "new", path)
        assert files.value == str(number)


def test_what_takes_long_is_not_waited_for_and_read_once(tmp_path, at_once):
    path, go_on, reads = tmp_path / "file", threading.Event(), []
    path.write_text("old")

    def make() -> str:
        reads.append(path.read_text())
        assert reads == ["old"] or go_on.wait(60)
        return reads[-1]

    files = Watched([str(path)], make)
    path.write_text("a new one")
    begun = time.monotonic()
    assert [files.value for _ in range(100)] == ["old"] * 100
    assert time.monotonic() - begun < 100 * WAIT_S  # the first alone waits
    go_on.set()
    while files.value != "a new one":
        time.sleep(0.01)
    assert reads == ["old", "a new one"]


def test_a_pipe_in_its_place_is_not_opened(tmp_path, at_once, caplog):
    path = tmp_path / "file"
    path.write_text("old")
    files = Watched([str(path)], path.read_text)
    path.unlink()
    os.mkfifo(path)
    assert files.value == "old"
    assert "is no regular file; what was read before stays in force" in caplog.text
    with pytest.raises(SpecError, match="is no regular file"):
        Watched([str(path)], path.read_text)
    path.unlink()
    path.write_text("new")
    assert files.value == "new"
