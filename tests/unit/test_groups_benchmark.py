"""The benchmark of groups: its arithmetic by hand, and the command on a tiny model; no time decides anything here."""

import json

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import groups, groups_sums
from benchmarks.engine import Workload
from benchmarks.groups_ranks import Run, Shape, difference
from examples.make_tiny_model import Family, make
from tercet.core import Role
from tercet.engine.plan import pack, unpack


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("one", Shape(threads=5)),
        ("tp2", Shape(tensor=2, threads=2)),
        ("tp2pp2", Shape(tensor=2, pipeline=2, threads=1)),
        ("ep16", Shape(expert=16, threads=1)),  # more ranks than cores
    ],
)
def test_a_shape_takes_all_cores(text, wanted):
    shape = Shape.parse(text, 5)
    assert shape == wanted
    role = shape.spec("source", "float32").roles[Role.AGGREGATED]
    assert (role.parallelism.ranks, role.threads) == (shape.ranks, shape.threads)


@pytest.mark.parametrize("text", ["", "two", "tp", "tp2x", "xtp2", "tp0", "2tp"])
def test_what_is_no_shape_is_named(text):
    with pytest.raises(SystemExit, match="--shapes"):
        Shape.parse(text, 2)


def test_figures_of_a_run():
    traffic = [{"tensor": [20, 400, 0.5], "expert": [4, 40, 0.25]}, {"tensor": [20, 800, 1.0], "expert": [4, 0, 0.5]}]
    run = Run(step_s=0.5, steps=4, wall_s=2.0, traffic=traffic)
    found = groups.figures(Workload(batch=8, inputs=1, outputs=5), run)
    assert found == {
        "step_s": 0.5,
        "tokens_s": 16.0,
        "share_least": 0.375,
        "share_most": 0.75,
        "calls": 6.0,
        "bytes": 200.0,
    }
    alone = groups.figures(Workload(batch=1, inputs=512, outputs=1), Run(0.5, 1, 0.5, [{}]))
    assert (alone["tokens_s"], alone["share_most"], alone["bytes"]) == (1024.0, 0.0, 0.0)


def test_what_lies_between_two_measures():
    then, now = {"tensor": [1, 10, 0.5], "expert": [2, 20, 0.5]}, {"tensor": [4, 30, 1.5], "expert": [2, 20, 0.5]}
    assert difference(now, then) == {"tensor": [3, 20, 1.0], "expert": [0, 0, 0.0]}


def test_a_round_of_sums_takes_as_long_as_its_slowest_rank():
    assert groups_sums.slowest([{"a": [1.0, 5.0, 2.0]}, {"a": [4.0, 2.0, 1.0]}]) == {"a": 4.0}


def test_plans_are_those_that_ranks_take():
    plan = groups_sums.plan_of(8)
    assert unpack(pack(plan)) == plan
    assert len(plan.decodes) == 8


@pytest.mark.slow  # a whole benchmark
def test_the_command_measures_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(groups, "WORLDS", (2,))
    monkeypatch.setattr(groups, "SUM_ROUNDS", 2)
    make(Family.QWEN3_MOE, tmp_path / "model")
    app, file = typer.Typer(), tmp_path / "result.json"
    app.command()(groups.main)
    shapes = ["one", "tp2", "pp2", "ep2"]
    asked = [part for shape in shapes for part in ("--shapes", shape)]
    model = str(tmp_path / "model")
    run = CliRunner().invoke(app, ["--model", model, *asked, "--rounds", "1", "--result", str(file)])
    assert run.exit_code == 0, run.output
    written = json.loads(file.read_text())
    found = written["models"][model]
    assert list(found["medians"]) == shapes
    assert [len(found["memory"][shape]["own"]) for shape in shapes] == [1, 2, 2, 2]
    for works in found["medians"].values():
        assert all(works[work]["step_s"] > 0 for work in groups.WORKS)
    calls = {shape: found["medians"][shape]["decode of 1"]["calls"] for shape in shapes}
    assert calls == {"one": 0, "tp2": 10, "pp2": 1, "ep2": 8}  # 4 layers: 2 sums each, the embedding, the logits
    row, logits = 64 * 4, 129 * 4  # float32
    assert found["medians"]["pp2"]["decode of 1"]["bytes"] == row
    assert found["medians"]["tp2"]["decode of 1"]["bytes"] == 8 * row + row // 2 + logits  # an embedding is bfloat16
    assert all(seconds > 0 for seconds in written["sums"]["2 ranks"].values())


def test_a_model_needs_shapes():
    app = typer.Typer()
    app.command()(groups.main)
    run = CliRunner().invoke(app, ["--model", "somewhere"])
    assert run.exit_code != 0
