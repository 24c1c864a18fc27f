"""What recorded counts say another placement would be worth: held to the ranks' own choice of replicas, and to brute
force."""

from __future__ import annotations

import io
import itertools
import os
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tercet.cluster import counts_file
from tercet.cluster.counts_file import read_counts, write_counts
from tercet.distributed.expert_map import ExpertMap, default_map
from tercet.errors import ClusterError, SpecError, UnsupportedSpec
from tercet.placement.expert_counts import Counts
from tercet.placement.experts.keeping import NEAR
from tercet.placement.experts.model import Dispatch, Objective
from tercet.placement.experts.weighing import Wish, max_over_mean, served, weigh


def counts_of(
    seed: int = 0, windows: int = 3, replicas: int = 4, layers: int = 2, experts: int = 8, **changed
) -> Counts:
    """Four ranks, two nodes, skewed."""
    rng = np.random.default_rng(seed)
    load = rng.poisson(rng.gamma(0.5, 400, (1, 1, layers, experts)), (windows, replicas, layers, experts))
    phy2log = np.repeat(default_map(experts, 4, 4).phy2log.numpy(), layers, axis=0)
    computed = np.repeat(load.sum(axis=(1, 3))[:, :, None] // 4, 4, axis=2)
    made = Counts(load.astype(np.int64), computed, phy2log, 2, 2, 1000, 1.0, "worker-1")
    return replace(made, **changed)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 500])
@pytest.mark.parametrize("seed", range(3))
def test_rows_go_to_the_slots_that_ranks_choose(seed, rows):
    """In steps of few rows, too, as decode has them."""
    rng = np.random.default_rng(seed)
    experts, ranks, each, total = 6, 3, 3, 3000
    held = np.concatenate([rng.permutation(experts), rng.integers(experts, size=ranks * each - experts)])
    there = ExpertMap(torch.from_numpy(held[None]), experts, each)
    asked = rng.choice(experts, size=(ranks, total), p=rng.dirichlet(np.ones(experts)))
    sent = np.array([np.bincount(each, minlength=experts) for each in asked])[:, None]
    found = np.zeros(ranks * each)
    for rank in range(ranks):
        for turn, first in enumerate(range(0, total, rows)):
            batch = torch.from_numpy(asked[rank, first : first + rows])[:, None]
            found += np.bincount(there.choose(batch, rank, turn=turn).flatten().numpy(), minlength=len(found))
    expected = served(held[None], sent.astype(float))[0]
    assert expected.sum() == pytest.approx(found.sum())
    assert found == pytest.approx(expected, rel=0.1, abs=100)


@pytest.mark.parametrize("seed", range(3))
def test_few_placements_are_better(seed):
    """Each expert once, two ranks of two slots: all there are. What is near the best one is kept, if fewer move."""
    load = np.random.default_rng(seed).integers(1, 1000, (1, 2, 1, 4))
    counts = Counts(load, np.ones((1, 1, 2), np.int64), np.arange(4)[None], 1, 1, 1, 1.0, "w")
    tokens = load.sum(axis=(0, 1))[0]
    halves = [tokens[list(pair)].sum() for pair in itertools.combinations(range(4), 2)]
    least = min(max(half, tokens.sum() - half) for half in halves)
    found = weigh(counts, Wish())
    assert least <= found.after.max() <= least * (1 + NEAR)
    assert found.before.sum() == found.after.sum() == tokens.sum()
    assert not found.held_out


@pytest.mark.parametrize("policy", ["ilp", "eplb"])
@pytest.mark.parametrize("seed", range(2))
def test_it_is_judged_by_the_last_window_and_solved_without_it(policy, seed):
    counts = counts_of(seed)
    found = weigh(counts, Wish(policy))
    other = counts.load.copy()
    other[-1] = other[-1, :, :, ::-1]
    again = weigh(replace(counts, load=other), Wish(policy))
    assert found.held_out
    assert (again.placement.phy2log == found.placement.phy2log).all()
    assert found.before.sum() == found.after.sum() == pytest.approx(counts.load[-1].sum())
    assert max_over_mean(found.after).mean() < max_over_mean(found.before).mean()


def held(phy2log: np.ndarray, layer: int, rank: int) -> set[int]:
    return {*phy2log[layer].reshape(4, -1)[rank].tolist()}


@pytest.mark.parametrize("wish", [Wish(), Wish("eplb"), Wish(redundancy=0), Wish(redundancy=8)])
def test_what_ranks_lack_is_fetched(wish):
    counts = counts_of()
    found = weigh(counts, wish)
    for layer, fetched in enumerate(found.fetched):
        after, before = ([held(each.phy2log, layer, rank) for rank in range(4)] for each in (found.placement, counts))
        assert fetched == sum(len(has - had) for has, had in zip(after, before, strict=True))


def test_few_moves_are_kept_to():
    counts = counts_of()
    for slots in (0, 1, 3):
        assert weigh(counts, Wish(max_moved_bytes=slots * 1000)).fetched.sum() <= slots
    with pytest.raises(SpecError, match="leave redundancy out"):
        weigh(counts, Wish(max_moved_bytes=1000, redundancy=8))


@pytest.mark.parametrize("seed", range(2))
def test_a_placement_that_ranks_would_not_gain_by_is_not_advised(seed):
    """The solver shares evenly among replicas; ranks take their own first, and their requests may be uneven."""
    rng = np.random.default_rng(seed)
    uneven = counts_of(seed).load * rng.integers(1, 9, (1, 4, 1, 1))
    counts = counts_of(load=uneven, phy2log=default_map(8, 16, 4).phy2log.numpy().repeat(2, axis=0))
    found = weigh(replace(counts, load=uneven[:1], computed=counts.computed[:1]), Wish())
    assert (found.after.max(axis=1) <= found.before.max(axis=1)).all()
    kept = (found.placement.phy2log == counts.phy2log).all(axis=1)
    assert (kept | ~found.kept).all()


def test_whether_a_rank_may_be_lost():
    twice = counts_of(phy2log=default_map(8, 8, 4).phy2log.numpy().repeat(2, axis=0))
    assert weigh(twice, Wish(max_moved_bytes=0)).survives == (True, True)
    assert weigh(twice, Wish(redundancy=0)).survives == (True, False)
    assert weigh(counts_of(), Wish(redundancy=24)).survives == (False, True)


@pytest.mark.parametrize("seed", range(6))
def test_a_group_that_survives_a_rank_goes_on_doing_so(seed):
    """The solver keeps each expert on two ranks, and gains by what else there is."""
    row = [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 4, 5, 6, 7, 0, 6, 7, 0, 1, 2]
    counts = counts_of(seed, phy2log=np.array([row] * 2))
    found = weigh(counts, Wish())
    assert found.survives == (True, True)
    assert found.topology.least_replicas == 2
    assert found.after.max(axis=1).sum() <= found.before.max(axis=1).sum() * 1.05  # on a window that it did not know
    assert weigh(counts_of(seed), Wish()).topology.least_replicas == 1


def test_weighted_is_by_the_placements_shares():
    counts = counts_of()
    found = weigh(counts, Wish(dispatch=Dispatch.WEIGHTED, objective=Objective.INTERNODE))
    assert found.after.sum() == pytest.approx(counts.load[-1].sum())
    assert found.placement.layers[0].cross_node < 0.5
    with pytest.raises(UnsupportedSpec, match="dispatch must be weighted"):
        weigh(counts, Wish(objective=Objective.INTERNODE))
    with pytest.raises(SpecError, match="pair"):
        weigh(counts, Wish(objective=Objective.INTERLAYER))


def test_other_shapes():
    counts = counts_of()
    assert weigh(counts, Wish(redundancy=8)).topology.slots_per_gpu == 4
    assert weigh(counts, Wish(nodes=4)).topology.nodes == 4
    for redundancy in (3, -4, 28, 10**9):
        with pytest.raises(SpecError, match=r"take 0, 4, 8 \.\.\. at most 24"):
            weigh(counts, Wish(redundancy=redundancy))
    for nodes in (3, 0, -2):
        with pytest.raises(SpecError, match=f"nodes {nodes}: 4 ranks do not divide"):
            weigh(counts, Wish(nodes=nodes))


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"load": np.zeros((3, 4, 2, 8), np.int64)}, "nothing was counted"),
        ({"load": np.ones((3, 4, 2, 8), np.int64) * np.array([1, 1, 0])[:, None, None, None]}, "nothing was counted"),
        ({"load": np.ones((3, 4, 2, 8), np.int64) * np.array([0, 0, 1])[:, None, None, None]}, "nothing was counted"),
        (
            {"computed": np.ones((1, 2, 1), np.int64), "nodes": 1, "load": np.ones((1, 1, 2, 8), np.int64)},
            "one rank has all",
        ),
    ],
)
def test_what_cannot_be_weighed_is_said(changed, match):
    with pytest.raises(SpecError, match=match):
        weigh(counts_of(**changed), Wish())


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"load": np.zeros((0, 4, 2, 8), np.int64)}, "load is"),
        ({"load": np.zeros((4, 2, 8), np.int64)}, "load is"),
        ({"load": -np.ones((3, 4, 2, 8), np.int64)}, "below 0"),
        ({"load": np.full((3, 4, 2, 8), 2**62)}, "load has values"),
        ({"computed": -np.ones((3, 2, 4), np.int64)}, "computed has values"),
        ({"computed": np.ones((2, 2, 4), np.int64)}, "computed is"),
        ({"computed": np.ones((3, 2), np.int64)}, "computed is"),
        ({"computed": np.ones((3, 2, 5), np.int64)}, "do not fit 5 ranks"),
        ({"computed": np.ones((3, 2, 0), np.int64)}, "computed is"),
        ({"load": np.ones((3, 3, 2, 8), np.int64)}, "3 data replicas"),
        ({"load": np.ones((3, 4, 3, 8), np.int64)}, "computed is"),
        ({"load": np.ones((3, 4, 2, 9), np.int64)}, "each of 9 experts"),
        ({"phy2log": np.zeros((2, 12), np.int64)}, "each of 8 experts"),
        ({"phy2log": np.full((2, 12), 8)}, "each of 8 experts"),
        ({"phy2log": np.full((2, 12), -1)}, "each of 8 experts"),
        ({"phy2log": np.zeros((2, 0), np.int64)}, "phy2log is"),
        ({"phy2log": np.zeros(2, np.int64)}, "phy2log is"),
        ({"phy2log": np.array(0)}, "phy2log is"),
        ({"nodes": 3}, "3 nodes"),
        ({"nodes": 0}, "0 nodes"),
        ({"top_k": 0}, "cannot be"),
        ({"top_k": 9}, "cannot be"),
        ({"expert_bytes": 0}, "cannot be"),
        ({"expert_bytes": 2**63}, "cannot be"),
        *(({"window_s": value}, "cannot be") for value in (-1.0, float("nan"), float("inf"))),
    ],
)
def test_counts_that_cannot_be_are_refused(changed, match):
    with pytest.raises(SpecError, match=match):
        counts_of(**changed)


def test_silent_layers_are_even():
    assert max_over_mean(np.zeros((2, 4))).tolist() == [1.0, 1.0]


def test_a_file_of_counts_is_read_as_it_was_written(tmp_path):
    counts = counts_of()
    write_counts(tmp_path / "a.npz", counts)
    read = read_counts(tmp_path / "a.npz")
    for name, value in vars(counts).items():
        assert np.array_equal(getattr(read, name), value), name


def zipped(method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        file.writestr("load.npy", bytes(5000))
    return out.getvalue()


def damaged() -> Iterator[bytes]:
    yield from (b"", b"PK\x03\x04", b"no numbers", np.random.default_rng(0).bytes(2000), zipped(), zipped()[:60])
    plain = io.BytesIO()
    np.save(plain, np.ones(3))
    yield plain.getvalue()
    broken = bytearray(zipped())
    broken[45:55] = b"\xff" * 10  # of the packed data
    yield bytes(broken)
    for name, at in (("encrypted", 6), ("method", 8)):
        broken = bytearray(zipped())
        for header in (b"PK\x03\x04", b"PK\x01\x02"):
            broken[broken.index(header) + at + (2 if header[2] == 1 else 0)] = {"encrypted": 1, "method": 99}[name]
        yield bytes(broken)


@pytest.mark.parametrize("content", [*damaged()], ids=itertools.count())
def test_damaged_files_are_refused(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(SpecError, match=r"a\.npz: no file of counts"):
        read_counts(tmp_path / "a.npz")


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, told in ((tmp_path, "not a file"), (tmp_path / "pipe", "not a file"), (tmp_path / "b", "there is none")):
        with pytest.raises(SpecError, match=told):
            read_counts(path)


def changes() -> Iterator[dict[str, Any]]:
    yield from ({"load": np.ones((3, 4, 2, 8))}, {"load": np.array(1)}, {"phy2log": np.array(1)}, {"more": 1})
    for name in ("nodes", "top_k", "expert_bytes"):
        yield from ({name: value} for value in (np.ones(2, int), 1.5, np.inf, 1j, "2", np.datetime64("2026-01-01")))
    yield from ({"window_s": value} for value in (np.ones(2), "x", 1j, np.nan))
    yield from ({"format": value} for value in (2, np.ones(2), "1", 1j, np.inf))
    yield {"worker": np.array({}, dtype=object)}


@pytest.mark.parametrize("changed", [*changes()], ids=itertools.count())
def test_files_with_other_values_are_refused(tmp_path, changed):
    path = tmp_path / "a.npz"
    write_counts(path, counts_of())
    np.savez(path, **(dict(np.load(path)) | {name: np.asarray(value) for name, value in changed.items()}))
    with pytest.raises(SpecError, match=r"a\.npz: no file of counts"):
        read_counts(path)


def test_a_file_without_a_value_or_too_large_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    write_counts(path, counts_of())
    good = dict(np.load(path))
    np.savez(path, **{name: value for name, value in good.items() if name != "top_k"})
    with pytest.raises(SpecError, match="should have"):
        read_counts(path)
    path.write_bytes(zipped())
    monkeypatch.setattr(counts_file, "MOST_BYTES", 4999)
    with pytest.raises(SpecError, match="unpacks to"):
        read_counts(path)


def test_a_file_is_written_at_once_or_not_at_all(tmp_path):
    write_counts(tmp_path / "a.npz", counts_of())
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    with pytest.raises(ClusterError, match="none"):
        write_counts(tmp_path / "none" / "a.npz", counts_of())
