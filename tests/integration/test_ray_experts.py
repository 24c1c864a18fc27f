"""`tercet experts` against a mixture that `tercet serve` serves on a real Ray: what clients asked is recorded, and a
placement is solved from it."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator

import pytest

from examples.make_tiny_model import Family, make
from tercet.cluster.counts_file import read_counts
from tests.machine import Machine, Served, new_machine, serve, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(170)]
TOKENS = 24


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = new_machine()
    yield made
    made.clear()


def ask(served: Served, number: int) -> None:
    assert served.client().chat(f"question {number} " * (number + 1), temperature=0, max_tokens=TOKENS).text


def test_counts_of_a_running_mixture_are_recorded_and_solved(machine):
    source = machine.folder / "tiny"
    make(Family("qwen3-moe"), source)
    ranks = "roles.decode.parallelism={data: 2, expert: 2}"
    shape = ("roles.decode.replicas=1", "roles.decode.cpus=0.25", "roles.prefill.cpus=0.5", ranks)
    served = serve(
        machine, "experts", f"model.source={source}", "model.dtype=float32", "model.max_context=1024", *shape
    )
    worker = next(w for w, m in served.status()["members"].items() if m["role"] == "decode")
    file, svg = str(machine.folder / "counts.npz"), str(machine.folder / "loads.svg")

    wrong = machine.run("tercet", "experts", "export", file, "--worker", "worker-0")  # its experts are on one rank
    assert wrong.returncode == 1
    assert f"worker-0 is none that has experts on several ranks: {worker}" in wrong.stderr
    idle = machine.run("tercet", "experts", "export", file, "--windows=1", "--seconds=0.5")
    assert idle.returncode == 1
    assert "nothing was counted" in idle.stderr
    assert not (machine.folder / "counts.npz").exists()
    recording = machine.start("tercet", "experts", "export", file, "--windows=3", "--seconds=2")
    number = 0
    while recording.poll() is None:
        ask(served, number % 4)
        number += 1
    assert recording.returncode == 0
    counts = read_counts(machine.folder / "counts.npz")
    layers, k = counts.load.shape[2], counts.top_k
    assert counts.load.shape[:2] == (3, 2)
    assert 0 < counts.total <= number * (TOKENS - 1) * layers * k  # the first token is the prefill worker's
    assert (counts.ranks, counts.nodes, counts.worker) == (2, 1, worker)

    shown = machine.run("tercet", "experts", "show", "--svg", svg)
    assert shown.returncode == 0, shown.stderr
    assert f"{worker}: busiest rank over mean" in shown.stdout
    rows = json.loads(machine.run("tercet", "experts", "show", "--json").stdout)
    assert rows.keys() == {worker}
    assert sum(map(sum, rows[worker]["rows"])) >= counts.computed.sum() > 0
    assert abs(counts.computed.sum() - counts.total) <= counts.total // 10  # a step may end between the two
    solved = json.loads(machine.run("tercet", "experts", "solve", file, "--json").stdout)
    assert solved["after"]["busiest"] <= solved["before"]["busiest"]
    assert solved["held_out"] is True

    with urllib.request.urlopen(f"http://127.0.0.1:{served.http}/metrics") as answer:
        series = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line[0] != "#")
    assert 0 < float(series[f'tercet_expert_balancedness{{worker="{worker}"}}']) <= 1
    ranks = [float(series[f'tercet_expert_rank_rows_total{{rank="{rank}",worker="{worker}"}}']) for rank in (0, 1)]
    assert sum(ranks) >= counts.total
    series = {name: float(value) for name, value in series.items() if name.startswith("tercet_expert_rows_total")}
    assert sum(count for name, count in series.items() if worker in name) == sum(ranks)

    assert machine.run("tercet", "down", "--name", "experts").returncode == 0
    assert served.process.wait(30) == 0, served.log
    until(lambda: not machine.left(), 20)
    gone = machine.run("tercet", "experts", "show")
    assert gone.returncode == 1
