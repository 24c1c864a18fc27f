"""Digests of KV by Triton and by torch against the function itself in Python's integers, and what they must find."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.triton_interpreter import DEVICE

triton = pytest.importorskip("triton")

from tercet.kernels import digest  # noqa: E402 # after the helper
from tercet.kernels.triton.digest import TILE, unit_digests  # noqa: E402

REFERENCE = digest.unit_digests_reference
BOTH = pytest.mark.parametrize("digests", [unit_digests, REFERENCE], ids=["triton", "torch"])
ONES = (1 << 64) - 1


def mix(x: int) -> int:
    for factor in digest.MIX:
        x = (x ^ x >> digest.SHIFT) * factor & ONES
    return x ^ x >> digest.SHIFT


def oracle(rows: torch.Tensor, blocks: list[int], subs: list[int], first: tuple[int, int, int]) -> list[int]:
    """The digests in the order of [layers, units, heads], as unsigned numbers."""
    found = []
    for layer, unit, head in itertools.product(range(rows.shape[0]), range(len(blocks)), range(rows.shape[3])):
        seed = mix((first[0] + layer) << 48 ^ (first[2] + head) << 32 ^ (first[1] + unit))
        words = rows[layer, blocks[unit], subs[unit], head].flatten().tolist()
        keys = ((seed + at * digest.GAMMA) & ONES for at in range(len(words)))
        found.append(mix(seed ^ sum(mix(word & ONES ^ key) for word, key in zip(words, keys, strict=True)) & ONES))
    return found


def unsigned(digests: torch.Tensor) -> list[int]:
    return [number & ONES for number in digests.flatten().tolist()]


def random_rows(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    info = torch.iinfo(dtype)
    numbers = np.random.default_rng(seed).integers(info.min, info.max, shape, dtype=np.int64, endpoint=True)
    return torch.from_numpy(numbers).to(dtype).to(DEVICE)


def ints(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=DEVICE)


@st.composite
def caches(draw):
    """Some units of a part of a cache, in either order of it, whose begin is not aligned to more than a word."""
    dtype = draw(st.sampled_from([torch.int64, torch.int32, torch.int16, torch.uint8]))
    layers, blocks, per_block, parts, tokens, heads, words = (
        draw(st.integers(1, most)) for most in (2, 4, 3, 2, 8, 3, 33)
    )
    inner = (per_block, tokens, heads) if (nhd := draw(st.booleans())) else (heads, per_block, tokens)
    shape, skip = (layers, blocks, parts, *inner, words), draw(st.integers(0, 3))
    flat = random_rows((skip + int(np.prod(shape)),), dtype, draw(st.integers(0, 9)))
    rows = flat[skip:].view(shape).permute((0, 1, 3, 5, 2, 4, 6) if nhd else (0, 1, 4, 3, 2, 5, 6))
    some = draw(st.integers(0, heads - 1))
    count = draw(st.integers(0, 3))
    where = [draw(st.lists(st.integers(0, n - 1), min_size=count, max_size=count)) for n in (blocks, per_block)]
    first = draw(st.tuples(st.integers(0, 200), st.integers(0, 1 << 20), st.integers(0, 500)))
    return rows[:, :, :, some:], *where, first


@settings(max_examples=40, deadline=None)
@given(caches())
def test_both_are_the_function(case):
    rows, blocks, subs, first = case
    expected = oracle(rows, blocks, subs, first)
    for digests in (unit_digests, REFERENCE):
        found = digests(rows, ints(*blocks), ints(*subs), first)
        assert found.shape == (rows.shape[0], len(blocks), rows.shape[3])
        assert found.dtype == torch.int64
        assert unsigned(found) == expected


@pytest.mark.parametrize("words", [1, TILE // 32 - 1, TILE // 32, TILE // 32 + 1, 3 * TILE // 32])
def test_units_of_any_number_of_tiles(words):
    rows = random_rows((1, 1, 1, 1, 2, 16, words), torch.int64)
    assert unsigned(unit_digests(rows, ints(0), ints(0), (3, 4, 5))) == oracle(rows, [0], [0], (3, 4, 5))


def of(digests, rows: torch.Tensor) -> list[int]:
    """Of block 0 and block 1, each one unit."""
    return unsigned(digests(rows, ints(0, 1), ints(0, 0), (0, 0, 0)))


def two_units(seed: int = 0) -> torch.Tensor:
    return random_rows((1, 2, 1, 1, 2, 4, 8), torch.int64, seed)


@BOTH
def test_every_flipped_bit_is_found(digests):
    rows = two_units()
    before = of(digests, rows)
    for word, bit in itertools.product((0, 7, 31, 32, 63), range(64)):
        flipped = rows.clone()
        flipped[0, 0].view(-1)[word] ^= (1 << bit) - ((1 << 64) if bit == 63 else 0)
        after = of(digests, flipped)
        assert after[0] != before[0]
        assert after[1] == before[1]


@BOTH
@pytest.mark.parametrize("seed", range(3))
def test_swapped_words_are_found(digests, seed):
    """Also such that differ in the top bit alone, which a plain sum of products would not notice."""
    rows = two_units(seed)
    flat = rows[0, 0].view(-1)
    flat[40] = flat[3] ^ torch.iinfo(torch.int64).min
    before = of(digests, rows)
    for one, other in ((0, 1), (3, 40), (31, 32), (0, 63)):
        swapped = rows.clone()
        there = swapped[0, 0].view(-1)
        there[one], there[other] = flat[other].clone(), flat[one].clone()
        assert of(digests, swapped)[0] != before[0]


@BOTH
def test_swapped_parts_tokens_and_blocks_are_found(digests):
    rows = two_units()
    before = of(digests, rows)
    assert of(digests, rows.flip(4))[0] != before[0]
    assert of(digests, rows.flip(5))[0] != before[0]
    swapped = of(digests, rows.flip(1))
    assert swapped[0] not in before
    assert swapped[1] not in before


@BOTH
def test_zeroed_and_repeated_bytes_are_found(digests):
    rows = two_units()
    before = of(digests, rows)
    for words in (slice(0, 64), slice(0, 1), slice(8, 16), slice(63, 64)):
        zeroed = rows.clone()
        zeroed[0, 0].view(-1)[words] = 0
        assert of(digests, zeroed)[0] != before[0]
    blank = torch.zeros_like(rows)
    assert len(set(of(digests, blank))) == 2  # not even two empty units look the same
    rows[0, 1] = rows[0, 0]
    assert len(set(of(digests, rows))) == 2


@BOTH
def test_the_same_bytes_elsewhere_have_another_digest(digests):
    rows = two_units()
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (0, 2**31, 0)]
    found = {unsigned(digests(rows, ints(0), ints(0), first))[0] for first in places}
    assert len(found) == len(places)


def test_many_changes_at_once_never_cancel_out():
    """Of 2,000 units that differ in two words, which have one sum, or in all, no two have one digest."""
    rows, numbers = torch.zeros(1, 2000, 1, 1, 1, 1, 4, dtype=torch.int64), torch.arange(1000)
    rows[0, :1000, 0, 0, 0, 0, :2] = torch.stack([numbers, -numbers], dim=-1)
    rows[0, 1000:, 0, 0, 0, 0] = random_rows((1000, 4), torch.int64).cpu()
    zero = torch.tensor([0])
    seen = [REFERENCE(rows, torch.tensor([block]), zero, (0, 0, 0)).item() for block in range(2000)]
    assert len(set(seen)) == len(seen)


def test_words_that_are_apart_are_refused():
    rows = random_rows((1, 1, 1, 1, 1, 2, 8), torch.int64)[..., ::2]
    with pytest.raises(ValueError, match="2 apart"):
        unit_digests(rows, ints(0), ints(0), (0, 0, 0))


COMPILED = """
import torch, triton
from tests import triton_compiler
from tercet.kernels.triton.digest import unit_digests
torch.cuda.get_device_capability = lambda *_: (9, 0)
triton_compiler.driver.set_active(triton_compiler.NoDriver())
triton_compiler.JITFunction.__getitem__ = triton_compiler.compile_only
rows = torch.zeros(2, 8, 2, 1, 16, 4, 32, dtype=torch.int64).permute(0, 1, 3, 5, 2, 4, 6)
for units, first in ((1, (0, 0, 0)), (2, (1, 1, 1)), (3, (16, 32, 16)), (16, (5, 7, 3)), (17, (1, 16, 2))):
    unit_digests(rows, *torch.zeros(2, units, dtype=torch.int64), first)
"""


def test_one_kernel_serves_all_transfers_of_a_layout(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", COMPILED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*/_digest.cubin"))) == 1
