"""transfer.min_bandwidth: which pair misses it."""

from __future__ import annotations

import pytest

from tercet.core import PairState
from tercet.roles.router.pairs import slow_pair

FAST, SLOW = PairState("decode-0", "tcp", 2e9, 1e-4), PairState("decode-1", "tcp", 1e6, 1e-4)
BROKEN = PairState("decode-1", fault="connection refused")


@pytest.mark.parametrize(
    ("states", "floor", "want"),
    [
        ([FAST, SLOW], 0, ""),
        ([FAST, SLOW], 1e6, ""),
        (
            [FAST, SLOW],
            1e8,
            "prefill-0 to decode-1: 1,000,000 bytes/s by tcp; transfer.min_bandwidth is 100,000,000",
        ),
        ([FAST], 1e8, "prefill-0 to decode-1: not measured yet"),
        ([FAST, BROKEN], 1e8, "prefill-0 to decode-1: connection refused"),
    ],
)
def test_the_pair_that_misses_the_floor_is_named(states, floor, want):
    found = slow_pair({"prefill-0": states}, ["decode-0", "decode-1"], floor)
    assert found.startswith(want)
    assert bool(found) == bool(want)
