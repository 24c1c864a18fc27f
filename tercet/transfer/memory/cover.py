"""Whether sources that each hold a part of a destination's layers and heads cover it exactly once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tercet.transfer.memory.layout import KvLayout, Pair


def flaw(pairs: Sequence[Pair], all_here: bool) -> str | None:
    """Why these sources do not give their one destination every layer of every head exactly once; None if they do.

    all_here: no further source will come, so what is missing now stays missing.
    """
    dst = pairs[0].dst
    times = np.zeros((len(dst.window), len(dst.heads)), dtype=np.int64)  # [layers, heads], how many sources give it
    for pair in pairs:
        times[_within(pair.layers, dst.window), _within(pair.heads, dst.heads)] += 1
    if (times > 1).any():
        return f"{_named(times > 1, dst)} come from several sources"
    if all_here and not times.all():
        return f"{_named(times == 0, dst)} come from no source"
    return None


def _within(part: range, whole: range) -> slice:
    return slice(part.start - whole.start, part.stop - whole.start)


def _named(wrong: NDArray[np.bool_], dst: KvLayout) -> str:
    """The smallest ranges of layers and heads of the model that contain all the wrong ones."""
    layers, heads = (np.flatnonzero(wrong.any(axis=axis)) for axis in (1, 0))
    first_layer, first_head = dst.window.start, dst.heads.start
    return (
        f"of layers {first_layer + layers[0]} to {first_layer + layers[-1]}, "
        f"heads {first_head + heads[0]} to {first_head + heads[-1]}"
    )
