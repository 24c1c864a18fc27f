"""The benchmarks of expert placement, in short: what they print is there, and the figures are figures."""

from __future__ import annotations

import json
import math

import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks import placement, placement_chain, placement_nodes
from tercet.placement.experts import Topology


def run(main, *arguments: str) -> str:
    app = Typer()
    app.command()(main)
    done = CliRunner().invoke(app, arguments, catch_exceptions=False, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.slow  # a whole benchmark
def test_balance(tmp_path):
    told = run(placement.main, "--layers", "1", "--limit-s", "1", "--result", str(tmp_path / "rows.json"))
    assert all(title in told for title in ("balance", "golden", "drift"))
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert len(rows["balance"]) == len(placement.SHAPES)
    assert all(math.isfinite(row["gap"]) and row["max_over_mean"] >= 1 for row in rows["balance"])
    assert [round(row["reached"]) for row in rows["golden"]] == [197, 181, 232]


def test_interlayer(monkeypatch):
    cases = (placement_chain.Case("small", 3, 6, 2, Topology(1, 3, 2)),)
    monkeypatch.setattr(placement_chain, "CASES", cases)
    row = json.loads(run(placement_chain.main, "--json", "--time-limit-s", "4").splitlines()[-1])
    assert row["held_out"] > 0
    assert row["descent_of_exact"] <= 1.0001


def test_nodes():
    told = run(placement_nodes.main, "--layers", "1", "--rounds", "1", "--seconds", "1")
    assert all(policy in told for policy in ("EPLB", "internode_dedup", "homes"))
