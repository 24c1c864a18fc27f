"""`tercet experts`: what `solve` says of a file of counts, the picture, and what is counted between two looks."""

from __future__ import annotations

import contextlib
import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from tercet.cluster import experts
from tercet.cluster.cli import app
from tercet.cluster.counts_file import write_counts
from tercet.cluster.experts import chosen_of
from tercet.cluster.heat_map import MOST_COLUMNS, MOST_ROWS, heat_map, save_svg
from tercet.cluster.windows import Look
from tercet.cluster.windows import look_at as looked
from tercet.distributed.routed import Routed
from tercet.errors import ClusterError, SpecError
from tests.unit.test_experts_weighing import counts_of


@pytest.fixture
def file(tmp_path):
    write_counts(tmp_path / "counts.npz", counts_of())
    return str(tmp_path / "counts.npz")


def run(*args: str):
    return CliRunner().invoke(app, ["experts", *args])


def test_solve_says_what_a_placement_would_be_worth(file):
    shown = run("solve", file)
    assert shown.exit_code == 0, shown.output
    for told in (
        "before: busiest rank over mean",
        "after: busiest rank",
        "experts that they lack",
        "tercet experts apply",
    ):
        assert told in shown.output


@pytest.mark.parametrize("policy", ["ilp", "eplb"])
def test_solve_as_json(file, policy):
    shown = run("solve", file, "--policy", policy, "--json")
    found = json.loads(shown.stdout)
    assert np.array(found["phy2log"]).shape == (2, 12)
    assert found["before"]["busiest"] > found["after"]["busiest"]
    assert len(found["layers"]) == (2 if policy == "ilp" else 0)
    assert found["fetched_bytes"] == 1000 * sum(found["fetched"])


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--policy", "best"], "none of ilp, eplb and keep"),
        (["--policy", "keep"], "dispatch must be weighted"),
        (["--objective", "all"], "balance, internode, internode_dedup"),
        (["--objective", "interlayer"], "needs pairs, which were not counted"),
        (["--dispatch", "odd"], "even, weighted"),
        (["--nodes", "3"], "do not divide"),
        (["--redundancy", "1"], "take 0, 4, 8"),
        (["--policy", "eplb", "--max-moved-bytes", "5"], "takes no objective"),
        (["--svg", "/none/a.svg"], "--svg /none/a.svg: cannot be written"),
    ],
)
def test_what_solve_cannot_do_is_refused(file, args, told):
    shown = run("solve", file, *args)
    assert isinstance(shown.exception, SpecError)
    assert told in str(shown.exception)


def test_the_picture_is_an_image_without_links(file, tmp_path):
    svg = tmp_path / "loads.svg"
    assert run("solve", file, "--svg", str(svg)).exit_code == 0
    root = ET.parse(svg).getroot()
    text = "".join(root.itertext())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "before" in text
    assert "after" in text
    assert svg.read_text().count("http") == svg.read_text().count("http://www.w3.org/2000/svg")
    with pytest.raises(ClusterError, match="none/loads"):
        save_svg(tmp_path / "none" / "loads.svg", "t", heat_map({"a": np.ones((2, 2))}))


def drawn(loads: np.ndarray) -> list[str]:
    console = Console(width=200, no_color=True)
    with console.capture() as said:
        console.print(heat_map({"now": loads}))
    return [line.rstrip() for line in said.get().splitlines()]


def test_a_line_is_a_rank_and_a_column_a_layer():
    lines = drawn(np.array([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 4.0], [1.4, 0.6, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]))
    assert lines[1:5] == ["0  . +", "1  . -", "2  . .", "3  .#."]


@pytest.mark.parametrize(("layers", "ranks"), [(1, 1), (61, 33), (58, 320), (200, 3)])
def test_any_number_of_ranks_and_layers_fits(layers, ranks):
    loads = np.ones((layers, ranks))
    loads[-1, -1] = 100
    lines = drawn(loads)[1:-1]
    assert len(lines) == min(ranks, MOST_ROWS)
    assert all(len(line) <= MOST_COLUMNS + 12 for line in lines)
    assert ranks == 1 or lines[-1].endswith("#")


@pytest.mark.parametrize(
    "args", [["--time-limit", "0"], ["--time-limit", "nan"], ["--time-limit", "inf"], ["--seed", "-1"]]
)
def test_numbers_that_are_none_are_refused(file, args):
    assert run("solve", file, *args).exit_code == 2


def test_a_file_that_cannot_be_written_is_said_before_anything_is_recorded(tmp_path):
    for path in (tmp_path, tmp_path / "none" / "a.npz"):
        with pytest.raises(SpecError, match="cannot be written"):
            raise run("export", str(path)).exception


@pytest.mark.parametrize(
    ("nodes", "ranks", "found"),
    [("a", 1, 1), ("aabb", 4, 2), ("abab", 4, 1), ("aab", 3, 1), ("abcd", 4, 4), ("aabb", 2, 1), ("ab", 4, 1)],
)
def test_ranks_that_lie_node_by_node_are_on_several(nodes, ranks, found):
    routed = Routed(np.zeros((1, 1, ranks)), np.zeros((1, ranks)), np.arange(ranks)[None], 1, 8)
    assert Look(routed, [], [*nodes]).nodes == found


def test_which_worker_is_meant():
    two = {"experts": [0, 1]}
    members = {"worker-1": two, "worker-2": {}, "worker-3": two, "worker-4": {"experts": [0]}}
    assert chosen_of(members, "worker-3") == "worker-3"
    assert chosen_of({"worker-1": two, "worker-4": {"experts": [0]}}, None) == "worker-1"
    for worker, told in ((None, "say by --worker"), ("worker-4", "has no experts on several .*: worker-1, worker-3")):
        with pytest.raises(ClusterError, match=told):
            chosen_of(members, worker)
    with pytest.raises(ClusterError, match="no worker of this cluster has experts"):
        chosen_of({"worker-2": {}}, None)


def looks(*told: tuple[int, list[int]]) -> Iterator[Look]:
    """(rows so far of each expert, pids), at each look."""
    for rows, pids in told:
        routed = Routed(np.full((2, 1, 4), rows), np.full((1, 2), 4 * rows), np.arange(4)[None], 1, 8)
        others = [{"rank": rank, "pid": pid, "node": "a"} for rank, pid in enumerate(pids[1:], 1)]
        yield looked(routed, pids[0], "a", others)


def look_at(monkeypatch: pytest.MonkeyPatch, there: Iterator[Look]) -> None:
    """In place of a cluster."""
    monkeypatch.setattr(experts.ray_runtime, "joined", contextlib.nullcontext)
    monkeypatch.setattr(experts.remote, "pick", lambda name, address: "c")
    monkeypatch.setattr(experts, "_members", lambda cluster: {"w": {"experts": [0, 1]}})
    monkeypatch.setattr(experts, "_look", lambda cluster, worker, pairs: next(there))


@pytest.mark.parametrize(
    ("told", "windows"),
    [
        ([(5, [1, 2]), (7, [1, 2]), (10, [1, 2])], [2, 3]),
        ([(5, [1, 2]), (7, [1, 0]), (3, [1, 0]), (9, [1, 4]), (11, [1, 4])], [2]),  # lost, back, well again
        ([(5, [1, 2]), (70, [3, 4]), (75, [3, 4])], [5]),  # started anew, and counts more than before
        ([(5, [1, 2]), (3, [1, 2]), (4, [1, 2])], [1]),  # the controller does not know yet
        ([(5, [1, 2]), (6, [1, 0])], []),
    ],
)
def test_windows_with_a_rank_that_was_lost_or_started_anew_are_left_out(monkeypatch, told, windows):
    there, said, found = looks(*told), list[str](), []
    look_at(monkeypatch, there)
    with contextlib.nullcontext() if windows else pytest.raises(ClusterError, match="nothing was counted"):
        experts.record(None, "a", None, len(told) - 1, 0.001, found.append, said.append)
    assert len(found) == bool(windows)
    loads = found[-1].load[:, 0, 0, 0].tolist() if found else []
    assert loads == windows
    assert sum("left out" in line for line in said) == len(told) - 1 - len(windows)


def test_more_than_memory_is_refused(monkeypatch):
    there = looks((5, [1, 2]))
    look_at(monkeypatch, there)
    monkeypatch.setattr(experts, "MOST_BYTES", 1000)
    with pytest.raises(ClusterError, match="record fewer"):
        experts.record(None, "a", None, 20, 1.0, lambda counts: None, lambda line: None)


def test_what_was_recorded_is_kept_whatever_ends_it(monkeypatch):
    def interrupted() -> Iterator[Look]:
        yield from looks((5, [1, 2]), (7, [1, 2]), (10, [1, 2]))
        raise KeyboardInterrupt

    there, found = interrupted(), []
    look_at(monkeypatch, there)
    with pytest.raises(KeyboardInterrupt):
        experts.record(None, "a", None, 5, 0.001, found.append, lambda line: None)
    assert found[0].load[:, 0, 0, 0].tolist() == [2, 3]
