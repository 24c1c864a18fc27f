"""Runs of bytes that are copied in one launch, against slices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.triton_interpreter import DEVICE

triton = pytest.importorskip("triton")

from tercet.kernels.triton.copy import PIECE, copy_runs  # noqa: E402 # after the helper

SIZE = 3 * PIECE


def memory():
    return torch.randint(256, (SIZE + 64,), dtype=torch.uint8).to(DEVICE)


@st.composite
def layouts(draw):
    """Runs that do not overlap, in multiples of some word, in another order on either side."""
    word = draw(st.sampled_from([1, 2, 4, 8, 24]))
    sizes = draw(st.lists(st.sampled_from([0, 1, 3, 17, 1025, PIECE // 8, PIECE // 8 + 1]), max_size=5))
    sizes = [size * word for size in sizes]
    order = draw(st.permutations(range(len(sizes))))
    at, starts = 0, {}
    for run in order:
        starts[run] = at
        at += sizes[run] + draw(st.sampled_from([0, word]))
    runs, to = [], 0
    for run, size in enumerate(sizes):
        runs.append((starts[run], to, size))
        to += size
    return runs if max(at, to) <= SIZE else []


@settings(max_examples=40, deadline=None)
@given(layouts(), st.integers(0, 9), st.integers(0, 9))
def test_each_run_and_nothing_else(runs, source_at, target_at):
    source, target = memory(), memory()
    expected = target.clone()
    for at, to, size in runs:
        expected[target_at + to :][:size] = source[source_at + at :][:size]
    copy_runs(target.data_ptr() + target_at, source.data_ptr() + source_at, runs, DEVICE)
    assert torch.equal(target, expected)
