"""Digests of moved KV, one for each (layer, head, unit), the same whatever the tensor-parallel degree, the order in
memory or the transport.

    digest = xxh3_64(key rows of the unit, then value rows; seed = layer, head, unit)

XXH3 is not a cryptographic hash: it detects corruption, not forgery; the handshake decides who may write at all.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import xxhash
from numpy.typing import NDArray

from tercet.transfer.memory.pack import Cells, Memory, Scratch, pieces_of

Digests = NDArray[np.uint64]
AT_ONCE = 256 << 10  # bytes gathered at a time for their digests, so that they stay in a core's cache


def digests_of(pieces: Iterable[Memory], layers: range, units: range, heads: range) -> Digests:
    """Digests of the bytes of each (layer, unit, head), in the order of memory/pack.py: [layers, units, heads]."""
    axes = [np.arange(axis.start, axis.stop, dtype=np.uint64) for axis in (layers, units, heads)]
    layer, unit, head = np.ix_(*axes)
    seeds = (layer << np.uint64(48)) ^ (head << np.uint64(32)) ^ unit
    found = map(xxhash.xxh3_64_intdigest, pieces, seeds.ravel().tolist())
    return np.fromiter(found, dtype=np.uint64, count=seeds.size).reshape(seeds.shape)


def digests_in_place(cells: Cells, scratch: Scratch, layers: range, units: range, heads: range) -> Digests:
    """Likewise, of units that lie in a cache."""
    if cells.contiguous:
        return digests_of(cells.pieces(), layers, units, heads)
    step = max(1, AT_ONCE // cells.packed(scratch, 1).nbytes)
    found = [
        digests_of(pieces_of(cells.gather(scratch, first, step)), layers, units[first : first + step], heads)
        for first in range(0, len(units), step)
    ]
    return np.concatenate(found, axis=1)
