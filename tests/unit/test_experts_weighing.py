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
from scipy.optimize import linprog

from tercet.cluster import counts_file
from tercet.cluster.counts_file import read_counts, write_counts
from tercet.distributed.expert_map import ExpertMap, default_map
from tercet.errors import ClusterError, SpecError, UnsupportedSpec
from tercet.placement.expert_counts import Counts
from tercet.placement.expert_shares import TURNS, check_shares
from tercet.placement.experts.keeping import NEAR
from tercet.placement.experts.model import Dispatch, Objective
from tercet.placement.experts.sharing import Sharing
from tercet.placement.experts.weighing import Wish, max_over_mean, served, weigh
from tests.few import few


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


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 500])
@pytest.mark.parametrize("seed", range(3))
def test_rows_go_to_the_slots_that_ranks_choose(seed, rows, shared):
    """In steps of few rows, too, as decode has them; by turns, and by shares."""
    rng = np.random.default_rng(seed)
    experts, ranks, each, total = 6, 3, 3, 3000
    held = np.concatenate([rng.permutation(experts), rng.integers(experts, size=ranks * each - experts)])
    there, shares = ExpertMap(torch.from_numpy(held[None]), experts, each), None
    if shared:
        shares = np.zeros((1, ranks, len(held)), np.int64)  # each rank as a node of its own
        for expert, node in itertools.product(range(experts), range(ranks)):
            slots = (held == expert).nonzero()[0]
            shares[0, node, slots] = rng.multinomial(TURNS, rng.dirichlet(np.ones(len(slots))))
        there = there.with_shares({0: shares[0].tolist()})
    asked = rng.choice(experts, size=(ranks, total), p=rng.dirichlet(np.ones(experts)))
    sent = np.array([np.bincount(each, minlength=experts) for each in asked])[:, None]
    found = np.zeros(ranks * each)
    for rank in range(ranks):
        for turn, first in enumerate(range(0, total, rows)):
            batch = torch.from_numpy(asked[rank, first : first + rows])[:, None]
            found += np.bincount(there.choose(batch, rank, turn=turn).flatten().numpy(), minlength=len(found))
    expected = served(held[None], sent.astype(float), shares)[0]
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


@pytest.mark.parametrize("seed", few(range(6), 2))
def test_a_group_that_survives_a_rank_goes_on_doing_so(seed):
    """The solver keeps each expert on two ranks, and gains by what else there is."""
    row = [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 4, 5, 6, 7, 0, 6, 7, 0, 1, 2]
    counts = counts_of(seed, phy2log=np.array([row] * 2))
    found = weigh(counts, Wish())
    assert found.survives == (True, True)
    assert found.topology.least_replicas == 2
    assert found.after.max(axis=1).sum() <= found.before.max(axis=1).sum() * 1.05  # on a window that it did not know
    assert weigh(counts_of(seed), Wish()).topology.least_replicas == 1


@pytest.mark.parametrize("objective", [Objective.INTERNODE, Objective.INTERNODE_DEDUP])
def test_fewer_rows_leave_their_node(objective):
    """Requests of each node prefer experts of their own."""
    rng = np.random.default_rng(0)
    load = rng.poisson(rng.gamma(0.5, 400, (1, 4, 2, 8)), (3, 4, 2, 8)).astype(np.int64)
    counts = counts_of(load=load)
    found = weigh(counts, Wish(dispatch=Dispatch.WEIGHTED, objective=objective))
    assert found.after.sum() == pytest.approx(counts.load[-1].sum())
    assert found.crossing[1] < found.crossing[0]
    for when, (phy2log, shares) in enumerate(((counts.phy2log, None), (found.placement.phy2log, found.shares))):
        placed = ExpertMap(torch.from_numpy(phy2log.astype(np.int64)), 8, 3)
        if shares is not None:
            placed = placed.with_shares(dict(enumerate(shares.tolist())))
        crossed = 0
        for rank, layer, expert in itertools.product(range(4), range(2), range(8)):
            asked = torch.full((int(load[-1, rank, layer, expert]), 1), expert)
            slots = placed.choose(asked, rank, layer)
            crossed += int((slots // 6 != rank // 2).sum())
        assert crossed / load[-1].sum() == pytest.approx(found.crossing[when], abs=0.02)


def test_other_objectives_are_refused_by_name():
    counts = counts_of()
    with pytest.raises(UnsupportedSpec, match="dispatch must be weighted"):
        weigh(counts, Wish(objective=Objective.INTERNODE))
    with pytest.raises(SpecError, match="pair"):
        weigh(counts, Wish(objective=Objective.INTERLAYER))
    for wish in (Wish("keep"), Wish("keep", Objective.INTERNODE, Dispatch.WEIGHTED)):
        with pytest.raises(SpecError, match="policy keep solves shares for the busiest rank"):
            weigh(counts, wish)
    for more in ({"redundancy": 4}, {"max_moved_bytes": 5}):
        with pytest.raises(SpecError, match="policy keep moves nothing"):
            weigh(counts, Wish("keep", dispatch=Dispatch.WEIGHTED, **more))


@pytest.mark.parametrize("seed", range(5))
def test_shares_alone_are_the_best_there_are_for_the_busiest_rank(seed):
    """Against the linear programme  min t:  what each slot gets of its expert's rows, no rank more than t."""
    counts = counts_of(seed)
    known = counts.load[:-1].sum(axis=(0, 1)).astype(float)
    found = weigh(counts, Wish("keep", dispatch=Dispatch.WEIGHTED))
    assert (found.placement.phy2log == counts.phy2log).all()
    assert not found.fetched.any()
    sent = replace(counts, load=counts.load[:-1].sum(axis=0, keepdims=True), computed=counts.computed[:1])
    loads = served(counts.phy2log, sent.of_windows(slice(None)), found.shares).reshape(2, 4, 3).sum(axis=2)
    for layer, row in enumerate(counts.phy2log):
        cost = np.array([0.0] * 12 + [1.0])
        sums = np.array([[*(row == expert).astype(float), 0.0] for expert in range(8)])
        most = np.array([[*(np.arange(12) // 3 == rank).astype(float), -1.0] for rank in range(4)])
        best = linprog(cost, most, np.zeros(4), sums, known[layer]).fun
        assert best - 1e-6 <= loads[layer].max() <= best + known[layer].max() / TURNS * 3
    now = weigh(replace(counts, shares=found.shares), Wish("keep", dispatch=Dispatch.WEIGHTED))
    assert now.kept.all()
    assert (now.shares == found.shares).all()
    assert (now.before == now.after).all()


@pytest.mark.parametrize("seed", few(range(8), 2))
@pytest.mark.parametrize(
    "wish",
    [
        Wish(),
        Wish(max_moved_bytes=3000),
        Wish(dispatch=Dispatch.WEIGHTED),
        Wish("keep", dispatch=Dispatch.WEIGHTED),
        Wish(dispatch=Dispatch.WEIGHTED, objective=Objective.INTERNODE),
    ],
)
def test_a_rank_may_have_an_expert_twice_before(wish, seed):
    """EPLB places so. No expert is lost by what is found behind it, and no row."""
    rng = np.random.default_rng(seed)
    rows = [[*range(8), *rng.integers(0, 8, 4)] for _ in range(2)]
    row = np.array([rng.permutation(row) for row in rows])
    row[0, :3] = (3, 3, row[0, 2])
    row[0, 3:] = rng.permutation([e for e in range(8) if e not in row[0, :3]] * 2)[:9]
    missing = [e for e in range(8) if e not in row[0]]
    row[0, 12 - len(missing) :] = missing
    if {*row[0].tolist()} != {*range(8)}:
        row[0] = [3, 3, 0, 1, 2, 4, 5, 6, 7, 3, 3, 0]
    found = weigh(counts_of(seed, phy2log=row), wish)
    assert all({*layer} == {*range(8)} for layer in found.placement.phy2log.tolist())
    assert found.after.sum() == pytest.approx(found.before.sum())
    if found.shares is not None:
        for layer, shares in zip(found.placement.phy2log, found.shares, strict=True):
            if shares.any():
                check_shares(layer, shares, 4)


@pytest.mark.parametrize("seed", range(5))
def test_shares_are_the_best_where_a_rank_has_an_expert_twice(seed):
    rng = np.random.default_rng(seed)
    row = np.array([[3, 3, 0, 1, 2, 4, 5, 6, 7, 3, 4, 0]] * 2)
    known = rng.gamma(0.5, 400, (2, 8))
    shares = Sharing(row.reshape(2, 4, 3), 8, np.ones(4)).solve(known)
    for layer in range(2):
        cost = np.array([0.0] * 12 + [1.0])
        sums = np.array([[*(row[layer] == expert).astype(float), 0.0] for expert in range(8)])
        most = np.array([[*(np.arange(12) // 3 == rank).astype(float), -1.0] for rank in range(4)])
        best = linprog(cost, most, np.zeros(4), sums, known[layer]).fun
        assert shares[layer].sum(axis=1).max() == pytest.approx(best, rel=1e-3)
        assert np.bincount(row[layer], shares[layer].ravel()) == pytest.approx(known[layer])


def test_experts_that_follow_each_other_come_to_lie_together():
    """Expert e of a layer is always followed by e + 1 of the next."""
    pairs = np.zeros((3, 1, 8, 8), np.int64)
    pairs[:, 0, range(8), [1, 2, 3, 4, 5, 6, 7, 0]] = 100
    counts = counts_of(load=np.full((3, 4, 2, 8), 100), pairs=pairs)
    found = weigh(counts, Wish(objective=Objective.INTERLAYER))
    assert found.staying is not None
    before, after = found.staying
    assert before < after == pytest.approx(1.0)
    assert weigh(counts, Wish()).staying[0] == before
    assert weigh(counts_of(), Wish()).staying is None


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
        ({"pairs": np.ones((2, 1, 8, 8), np.int64)}, "pairs is"),
        ({"pairs": -np.ones((3, 1, 8, 8), np.int64)}, "pairs has values below 0"),
        ({"shares": np.ones((2, 12), np.int64)}, "shares is"),
        ({"shares": np.ones((2, 1, 12), np.int64)}, "shares of expert 0 sum to"),
        ({"shares": np.ones((2, 1, 11), np.int64)}, "must be"),
        *(({"shares": np.zeros(shape, np.int64)}, "must be") for shape in ((2, 3, 12), (2, 0, 12), (2, 1, 5))),
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


@pytest.mark.parametrize("more", [False, True])
def test_a_file_of_counts_is_read_as_it_was_written(tmp_path, more):
    counts = counts_of()
    if more:
        shares = weigh(counts, Wish("keep", dispatch=Dispatch.WEIGHTED)).shares
        counts = replace(counts, shares=shares, pairs=np.arange(3 * 64).reshape(3, 1, 8, 8))
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
    yield from ({"format": value} for value in (1, 3, np.ones(2), "1", 1j, np.inf))
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
