"""Runs and packing against a brute-force oracle: where each (layer, head, token) of the model lies in either cache."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.errors import PeerMismatch
from tercet.transfer.memory import digest
from tercet.transfer.memory.digest import digests_in_place, digests_of
from tercet.transfer.memory.layout import ITEMSIZE, KvLayout, Pair, Units, runs_of
from tercet.transfer.memory.pack import Cells, Scratch, convert, pieces_of

DEGREES = (1, 2, 3, 4, 8)
SIZES = (8, 16, 32, 64, 128, 256)


def layout(**changes) -> KvLayout:
    base = {"layers": 2, "blocks": 6, "block_size": 16, "kv_heads": 4, "head_dim": 4, "dtype": "bfloat16"}
    return KvLayout(**(base | changes))


def units_for(side: KvLayout, unit: int, count: int, skip: int, rng) -> Units:
    per_block = side.block_size // unit
    need = -(-(skip % per_block + count) // per_block)
    blocks = rng.permutation(side.blocks)[:need].tolist()
    return Units(blocks, skip % per_block, count)


def oracle(side: KvLayout, units: Units, unit: int, layer: int, part: int, head: int, token: int) -> slice:
    """The bytes of one row, by index arithmetic of the simplest kind: a cache of numbers, looked up by axis."""
    at = units.skip * unit + token
    block, within = units.blocks[at // side.block_size], at % side.block_size
    axes = (layer - side.first_layer, block, part, within, head - side.heads.start)
    if side.order == "HND":
        axes = (*axes[:3], axes[4], axes[3])
    row = int(np.ravel_multi_index(axes, side.shape[:-1])) * side.row_bytes
    return slice(row, row + side.row_bytes)


def gathered(cells: Cells) -> np.ndarray:
    return cells.gather(Scratch())


def check(src: KvLayout, dst: KvLayout, count: int, skip: int, seed: int = 0) -> None:
    """Both ways of moving give the oracle's bytes at the oracle's places, and touch nothing else."""
    pair, rng = Pair(src, dst), np.random.default_rng(seed)
    source = rng.integers(0, 256, src.total_bytes, dtype=np.uint8)
    before = rng.integers(0, 256, dst.total_bytes, dtype=np.uint8)
    expected, by_runs, by_pack = before.copy(), before.copy(), before.copy()
    ours, theirs = (units_for(side, pair.unit, count, skip, rng) for side in (src, dst))
    for layer in pair.layers:
        for part, head, token in itertools.product(range(src.parts), pair.heads, range(count * pair.unit)):
            where = (pair.unit, layer, part, head, token)
            expected[oracle(dst, theirs, *where)] = source[oracle(src, ours, *where)]
    for at, to, size in runs_of(pair, pair.layers, ours, theirs):
        by_runs[to : to + size] = source[at : at + size]
    cells, there = (
        Cells(side, memory.data, pair.layers, units, pair.unit, pair.heads)
        for side, memory, units in ((src, source, ours), (dst, by_pack, theirs))
    )
    packed = gathered(cells)
    assert packed.nbytes == len(pair.layers) * count * pair.unit_bytes
    there.scatter(packed)
    for place in (cells, there):
        assert not place.contiguous or list(place.pieces()) == list(pieces_of(packed))
    assert np.array_equal(by_runs, expected)
    assert np.array_equal(by_pack, expected)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("src_order", "dst_order"), list(itertools.product(("NHD", "HND"), repeat=2)))
def test_every_pair_of_degrees_gives_each_destination_every_head_once(kv_heads, src_order, dst_order):
    for src_size, dst_size in itertools.product(DEGREES, DEGREES):
        for dst_rank in range(dst_size):
            dst = layout(kv_heads=kv_heads, tp_size=dst_size, tp_rank=dst_rank, order=dst_order)
            got = []
            for src_rank in range(src_size):
                src = layout(kv_heads=kv_heads, tp_size=src_size, tp_rank=src_rank, order=src_order)
                try:
                    pair = Pair(src, dst)
                except PeerMismatch:
                    continue
                got += pair.heads
                if (src_rank + dst_rank) % 3 == 0:
                    check(src, dst, count=3, skip=1)
            assert sorted(got) == list(dst.heads)


@pytest.mark.parametrize(("src_size", "dst_size"), list(itertools.product(SIZES, SIZES)))
def test_every_pair_of_block_sizes(src_size, dst_size):
    big = max(src_size, dst_size)
    blocks = 2 * big // min(src_size, dst_size) + 1
    check(
        layout(block_size=src_size, blocks=blocks, layers=1, kv_heads=2, head_dim=1),
        layout(block_size=dst_size, blocks=blocks, layers=1, kv_heads=2, head_dim=1),
        count=big // min(src_size, dst_size) + 1,
        skip=1,
    )


SIDES = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from([8, 16, 32]),
        "order": st.sampled_from(["NHD", "HND"]),
        "tp_size": st.sampled_from(DEGREES),
        "tp_rank": st.integers(0, 7),
        "first_layer": st.integers(0, 2),
        "layers": st.integers(1, 3),
    }
)


@settings(max_examples=150, deadline=None)
@given(src=SIDES, dst=SIDES, mla=st.booleans(), count=st.integers(1, 4), skip=st.integers(0, 3), seed=st.integers(0, 9))
def test_any_pair_of_layouts(src, dst, mla, count, skip, seed):
    model = {"model_layers": 5, "kv_heads": 1 if mla else 4, "parts": 1 if mla else 2, "head_dim": 9 if mla else 2}
    sides = [layout(**(side | model | {"tp_rank": side["tp_rank"] % side["tp_size"]})) for side in (src, dst)]
    try:
        Pair(*sides)
    except PeerMismatch:  # no layer or head in common
        return
    check(*sides, count, skip, seed)


def test_neighbouring_blocks_move_as_one_run():
    pair = Pair(layout(), layout(blocks=9))
    runs = runs_of(pair, range(1, 2), Units([2, 3, 4, 0], 0, 4), Units([5, 6, 8, 0], 0, 4))
    size = layout().block_bytes
    assert runs[0] == ((6 + 2) * size, (9 + 5) * size, 2 * size)
    assert [length // size for _, _, length in runs] == [2, 1, 1]


def test_the_digest_knows_neither_degree_nor_order_nor_place():
    whole, rng, layers = layout(layers=3), np.random.default_rng(3), range(1, 3)
    memory = rng.integers(0, 256, whole.total_bytes, dtype=np.uint8)
    units = Units([3, 1], 0, 2)
    every = pieces_of(gathered(Cells(whole, memory.data, layers, units, 16)))
    reference = digests_of(every, layers, range(7, 9), range(4))
    assert reference.shape == (2, 2, 4)
    for order, rank in itertools.product(("NHD", "HND"), range(2)):
        part = layout(layers=3, tp_size=2, tp_rank=rank, order=order, blocks=3)
        pair, share = Pair(whole, part), np.zeros(part.total_bytes, dtype=np.uint8)
        there = Cells(part, share.data, layers, Units([0, 2], 0, 2), 16, pair.heads)
        there.scatter(gathered(Cells(whole, memory.data, layers, units, 16, pair.heads)))
        found = digests_of(pieces_of(gathered(there)), layers, range(7, 9), pair.heads)
        assert np.array_equal(found, reference[..., 2 * rank : 2 * rank + 2])


@pytest.mark.parametrize(
    ("changes", "in_place"),
    [
        ({}, False),
        ({"kv_heads": 1}, True),
        ({"tp_size": 4, "tp_rank": 2}, True),
        ({"kv_heads": 1, "parts": 1, "block_size": 32}, True),
        ({"order": "HND"}, False),
        ({"order": "HND", "parts": 1}, True),
    ],
)
def test_what_lies_as_packed_is_digested_where_it_lies(changes, in_place, monkeypatch):
    side = layout(layers=3, **changes)
    memory = np.random.default_rng(0).integers(0, 256, side.total_bytes, dtype=np.uint8)
    cells = Cells(side, memory.data, range(1, 3), Units([3, 1], 0, 2), 16)
    assert cells.contiguous == in_place
    pieces = list(pieces_of(gathered(cells)))
    assert not in_place or list(cells.pieces()) == pieces
    axes = (range(1, 3), range(5, 7), side.heads)
    monkeypatch.setattr(digest, "AT_ONCE", 1)  # a unit at a time
    assert np.array_equal(digests_in_place(cells, Scratch(), *axes), digests_of(pieces, *axes))


BITS = np.zeros((2, 2, 4, 2, 4, 4), dtype=np.uint8)


@given(bit=st.integers(0, 8 * BITS.size - 1))
def test_any_flipped_bit_changes_exactly_one_digest(bit):
    axes = (range(2), range(2), range(4))
    packed = BITS.copy()
    before = digests_of(pieces_of(packed), *axes)
    packed.reshape(-1)[bit // 8] ^= 1 << bit % 8
    assert (digests_of(pieces_of(packed), *axes) != before).sum() == 1


def test_equal_bytes_at_another_place_have_another_digest():
    same = digests_of(pieces_of(BITS), range(2), range(2), range(4))
    assert len(np.unique(same)) == same.size


@pytest.mark.parametrize(("dtype", "scale", "error"), [("float8_e4m3fn", 1.0, 0.07), ("int8", 0.05, 0.04)])
def test_conversion_is_declared_and_close(dtype, scale, error):
    src, dst = layout(), layout(dtype=dtype, scale=scale)
    with pytest.raises(PeerMismatch, match="dtype is bfloat16 at the source"):
        Pair(src, dst)
    pair = Pair(src, dst, convert=True)
    values = torch.randn(2, 4, 2, 16, 4).clamp(-3, 3).bfloat16()
    packed = values.view(torch.uint8).numpy()
    there = convert(pair, packed)
    assert there.nbytes == packed.nbytes // 2
    back = torch.from_numpy(convert(Pair(dst, src, convert=True), there)).view(torch.bfloat16)
    assert (back.float() - values.float()).abs().max() <= error * (3 if dtype == "float8_e4m3fn" else 1)
    assert pair.unit_bytes == Pair(src, src).unit_bytes * ITEMSIZE[dtype] // 2


def test_zero_clears_only_its_units():
    side = layout(block_size=32)
    memory = np.ones(side.total_bytes, dtype=np.uint8)
    Cells(side, memory.data, range(1, 2), Units([4], 1, 1), 16).zero()
    cells = memory.reshape(2, 6, 2, 32, -1)
    assert cells[1, 4, :, 16:].sum() == 0
    assert cells.sum() == memory.size - cells[1, 4, :, 16:].size


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({"kv_heads": 2}, "kv_heads is 4 at the source, 2 at the destination"),
        ({"head_dim": 8}, "head_dim"),
        ({"parts": 1}, "parts"),
        ({"layers": 3}, "model_layers"),
        ({"dtype": "float32"}, "dtype"),
    ],
)
def test_what_cannot_be_moved_is_refused_by_name(changes, want):
    with pytest.raises(PeerMismatch, match=want):
        Pair(layout(), layout(**changes))


@pytest.mark.parametrize("changes", [{"tp_rank": 1}, {"order": "DNH"}, {"dtype": "int4"}, {"blocks": 0}, {"scale": 0}])
def test_a_senseless_layout_is_refused(changes):
    with pytest.raises(PeerMismatch, match="no KV layout"):
        layout(**changes)
