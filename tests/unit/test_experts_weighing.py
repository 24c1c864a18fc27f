"""What recorded counts say another placement would be worth: held to the ranks' own choice of replicas, and to brute
force."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from tercet.cluster.counts_file import read_counts, write_counts
from tercet.distributed.expert_map import ExpertMap, default_map
from tercet.errors import SpecError, UnsupportedSpec
from tercet.placement.experts.keeping import NEAR
from tercet.placement.experts.model import Dispatch, Objective
from tercet.placement.experts.weighing import Counts, Wish, loads_of, max_over_mean, served, weigh


def counts_of(
    seed: int = 0, windows: int = 3, replicas: int = 4, layers: int = 2, experts: int = 8, **changed
) -> Counts:
    """Four ranks, two nodes, skewed."""
    rng = np.random.default_rng(seed)
    load = rng.poisson(rng.gamma(0.5, 400, (1, 1, layers, experts)), (windows, replicas, layers, experts))
    phy2log = np.repeat(default_map(experts, 4, 4).phy2log.numpy(), layers, axis=0)
    made = Counts(load.astype(np.int64), phy2log, 4, 2, 2, 1000, 1.0, "worker-1")
    return replace(made, **changed)


@pytest.mark.parametrize("seed", range(8))
def test_tokens_go_to_the_slots_that_ranks_choose(seed):
    rng = np.random.default_rng(seed)
    experts, ranks, each = 6, 3, 3
    held = np.concatenate([rng.permutation(experts), rng.integers(experts, size=ranks * each - experts)])
    there = ExpertMap(torch.from_numpy(held[None]), experts, each)
    sent = rng.integers(200, 2000, (ranks, 1, experts))
    found = np.zeros(ranks * each)
    for rank in range(ranks):
        rows = rng.permutation(np.repeat(np.arange(experts), sent[rank, 0]))
        slots = there.choose(torch.from_numpy(rows)[:, None], rank)
        found += np.bincount(slots.flatten().numpy(), minlength=len(found))
    expected = served(held[None], sent.astype(float))[0]
    assert expected.sum() == pytest.approx(sent.sum())
    assert found == pytest.approx(expected, rel=0.1, abs=100)


@pytest.mark.parametrize("seed", range(6))
def test_few_placements_are_better(seed):
    """Each expert once, two ranks of two slots: all there are. What is near the best one is kept, if fewer move."""
    load = np.random.default_rng(seed).integers(1, 1000, (1, 2, 1, 4))
    counts = Counts(load, np.arange(4)[None], 2, 1, 1, 1, 1.0, "w")
    tokens = load.sum(axis=(0, 1))[0]
    halves = [tokens[list(pair)].sum() for pair in itertools.combinations(range(4), 2)]
    least = min(max(half, tokens.sum() - half) for half in halves)
    found = weigh(counts, Wish())
    assert least <= found.after.max() <= least * (1 + NEAR)
    assert found.before.sum() == found.after.sum() == tokens.sum()
    assert not found.held_out


@pytest.mark.parametrize("policy", ["ilp", "eplb"])
@pytest.mark.parametrize("seed", range(4))
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
    assert ((found.placement.phy2log != counts.phy2log).sum(axis=1) == found.moved).all()


def test_few_moves_are_kept_to():
    counts = counts_of()
    for slots in (0, 1, 3):
        assert weigh(counts, Wish(max_moved_bytes=slots * 1000)).moved.sum() <= slots


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
    assert weigh(counts, Wish(redundancy=8)).moved.tolist() == [16, 16]
    assert weigh(counts, Wish(nodes=4)).topology.nodes == 4
    for wish in (Wish(redundancy=3), Wish(nodes=3), Wish(nodes=0), Wish(redundancy=-4)):
        with pytest.raises(SpecError, match="do not divide"):
            weigh(counts, wish)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"load": np.zeros((2, 4, 2, 8), np.int64)}, "nothing was counted"),
        ({"ranks": 1, "nodes": 1, "load": np.ones((1, 1, 2, 8), np.int64)}, "one rank has all"),
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
        ({"load": -np.ones((1, 4, 2, 8), np.int64)}, "below 0"),
        ({"load": np.ones((1, 3, 2, 8), np.int64)}, "3 data replicas"),
        ({"load": np.ones((1, 4, 3, 8), np.int64)}, "3 layers"),
        ({"load": np.ones((1, 4, 2, 9), np.int64)}, "each of 9 experts"),
        ({"phy2log": np.zeros((2, 12), np.int64)}, "each of 8 experts"),
        ({"phy2log": np.full((2, 12), 8)}, "each of 8 experts"),
        ({"phy2log": np.full((2, 12), -1)}, "each of 8 experts"),
        ({"phy2log": np.zeros((2, 0), np.int64)}, "phy2log is"),
        ({"phy2log": np.zeros(2, np.int64)}, "phy2log is"),
        ({"ranks": 5}, "do not fit 5 ranks"),
        ({"ranks": 0}, "do not fit 0 ranks"),
        ({"nodes": 3}, "3 nodes"),
        ({"nodes": 0}, "0 nodes"),
    ],
)
def test_counts_that_cannot_be_are_refused(changed, match):
    with pytest.raises(SpecError, match=match):
        counts_of(**changed)


def test_a_tie_has_an_even_load():
    counts = counts_of(load=np.zeros((1, 4, 2, 8), np.int64))
    assert max_over_mean(loads_of(counts)).tolist() == [1.0, 1.0]


def test_a_file_of_counts_is_read_as_it_was_written(tmp_path):
    counts = counts_of()
    write_counts(tmp_path / "a.npz", counts)
    read = read_counts(tmp_path / "a.npz")
    for name, value in vars(counts).items():
        assert np.array_equal(getattr(read, name), value), name


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(SpecError, match=r"a\.npz: no file of counts: .*No such file"):
        read_counts(path)
    for content in (b"", b"PK\x03\x04", b"no numbers", np.random.default_rng(0).bytes(2000)):
        path.write_bytes(content)
        with pytest.raises(SpecError, match="no file of counts"):
            read_counts(path)
    np.savez(path, load=np.ones(3))
    with pytest.raises(SpecError, match="of format 1"):
        read_counts(path)
    write_counts(path, counts_of())
    good = dict(np.load(path))
    for changed in (
        {"load": good["load"].astype(float)},
        {"ranks": np.ones(2, int)},
        {"more": np.ones(1)},
        {"nodes": 3},
    ):
        np.savez(path, **(good | changed))
        with pytest.raises(SpecError, match=r"a\.npz: "):
            read_counts(path)
    np.savez(path, **{name: value for name, value in good.items() if name != "top_k"})
    with pytest.raises(SpecError, match="should have"):
        read_counts(path)
    np.savez(path, allow_pickle=True, **(good | {"worker": np.array({}, dtype=object)}))
    with pytest.raises(SpecError, match="pickle"):
        read_counts(path)
