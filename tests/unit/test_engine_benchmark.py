"""The engine's benchmark: its arithmetic by hand, and the command with tiny sizes on the real model."""

import json
import math

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.engine import WORKLOADS, Cost, Outcome, Workload, compare, main
from tercet.models.sources import load_config
from tercet.spec import ModelSpec

SMOLLM2_PARAMETERS = 134_515_008  # as its model card's safetensors count them; 61 norms of 576 are not products


def test_cost_counts_every_weight_once():
    cost = Cost.of(load_config(ModelSpec()), itemsize=2, prompt=1)
    products = SMOLLM2_PARAMETERS - 61 * 576
    assert cost.decode_bytes == 2 * products
    assert cost.prefill_flops == 2 * products + 30 * 4 * 9 * 64  # one score and one sum, each of 64 products, a head
    longer = Cost.of(load_config(ModelSpec()), itemsize=2, prompt=1000)
    assert longer.prefill_flops < cost.prefill_flops  # the head is for the last token alone


def test_speeds_and_agreement():
    ours = Outcome(first_s=2.0, total_s=4.0, tokens=[[1, 2, 3], [4, 5, 6]])
    theirs = Outcome(first_s=3.0, total_s=7.0, tokens=[[1, 2, 3], [4, 0, 0]])
    work = Workload(batch=2, inputs=12, outputs=3)
    assert compare("decode", work, ours, theirs)["decode.tercet"] == 1.0  # two tokens in two seconds
    batch = compare("batch", work, ours, theirs)
    assert (batch["batch.tercet"], batch["batch.ratio"]) == (1.5, 7 / 4)
    assert batch["batch.same_tokens"] == pytest.approx(4 / 6)
    assert compare("prefill", work, ours, theirs)["prefill.rival"] == 4.0


@pytest.mark.slow  # a whole benchmark
def test_the_command_measures_both_with_the_same_tokens(tmp_path):
    app, file = typer.Typer(), tmp_path / "result.json"
    app.command()(main)
    args = ["--dtype", "float32", "--repeats", "1", "--shrink", "32", "--json", str(file)]
    run = CliRunner().invoke(app, args)
    assert run.exit_code == 0, run.output
    assert "GFLOPS" in run.stdout
    written = json.loads(file.read_text())
    assert len(written["rounds"]) == 1
    assert written["commit"]
    result = written["result"]
    for measure in WORKLOADS:
        assert result[f"{measure}.same_tokens"] == 1.0
        assert result[f"{measure}.ratio"] > 0
    assert all(math.isfinite(value) for value in result.values())
    assert result["decode.reached"] > 0
