"""The transfer benchmark with tiny blocks, so that it cannot rot; no time decides anything here."""

import json

import typer
from typer.testing import CliRunner

from benchmarks.transfer import SHAPES, main
from benchmarks.transfer_report import Speeds, goals

SIDES = ("shm", "tcp", "tcp digests", "memcpy slices", "tcp loop")


def test_the_command_moves_and_compares_every_byte(tmp_path):
    app, file = typer.Typer(), tmp_path / "result.json"
    app.command()(main)
    args = ["--shrink", "64", "--rounds", "1", "--small", "2", "--result", str(file)]
    for side in SIDES:
        args += ["--only", side]
    run = CliRunner().invoke(app, args)
    assert run.exit_code == 0, run.output
    written = json.loads(file.read_text())
    assert written["not_run"] == {}
    assert set(written["medians"]) == set(SIDES)
    for side in SIDES:
        assert all(written["medians"][side][shape] > 0 for shape in SHAPES)
    assert written["medians"]["tcp"]["handover"] > written["medians"]["tcp"]["round_trip"] > 0


def test_speeds_compare_with_the_fastest_that_ran():
    speeds = Speeds({"shm": {"s": 0.5}, "a": {"s": 1.0}, "b": {"s": 2.0}}, {"s": 4.0})
    assert speeds.of("s", "a", "b", "absent") == 4.0
    assert speeds.ratio("s", "shm", "a", "b") == 2.0
    assert speeds.ratio("s", "absent", "a") is None


def test_a_goal_of_what_did_not_run_is_left_out():
    found = {"shm": dict.fromkeys((*SHAPES, "handover"), 1e-4)}
    rows = goals(found, {"shm": 5.0}, dict.fromkeys(SHAPES, 1.0))
    assert [list(column.cells) for column in rows.columns][3] == ["met", "MISSED"]
