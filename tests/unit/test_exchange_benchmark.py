"""The benchmark of the exchange with a few rounds, so that it cannot rot; no time decides anything here."""

import json

import typer
from typer.testing import CliRunner

from benchmarks import exchange


def test_the_command_measures_both_exchanges(tmp_path, monkeypatch):
    monkeypatch.setattr(exchange, "WORLDS", (2,))
    app, file = typer.Typer(), tmp_path / "result.json"
    app.command()(exchange.main)
    run = CliRunner().invoke(app, ["--rounds", "3", "--most", "4", "--result", str(file)])
    assert run.exit_code == 0, run.output
    written = json.loads(file.read_text())
    for name in ("collective", "direct", "direct, TCP"):
        assert set(written["medians"][name]) == {"2 x 1", "2 x 4"}
        assert all(len(seconds) == 4 and min(seconds) > 0 for seconds in written["seconds"][name].values())
