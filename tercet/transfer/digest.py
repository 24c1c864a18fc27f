"""Digests of moved KV, one for each (layer, head, unit), the same whatever the tensor-parallel degree, the order in
memory or the transport.

    digest = xxh3_64(key rows of the unit, then value rows; seed = layer, head, unit)

XXH3 is no cryptographic hash: it finds corruption, not forgery; who may write at all is settled by the handshake.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from tercet.transfer.pack import Memory

Digests = NDArray[np.uint64]


def digests_of(pieces: Sequence[Memory], layers: range, units: range, heads: range) -> Digests:
    """Digests of the bytes of each (layer, unit, head), as transfer/pack.py gives them: [layers, units, heads]."""
    axes = [np.arange(axis.start, axis.stop, dtype=np.uint64) for axis in (layers, units, heads)]
    layer, unit, head = np.ix_(*axes)
    seeds = (layer << np.uint64(48)) ^ (head << np.uint64(32)) ^ unit
    found = map(xxhash.xxh3_64_intdigest, pieces, seeds.ravel().tolist())
    return np.fromiter(found, dtype=np.uint64, count=seeds.size).reshape(seeds.shape)
