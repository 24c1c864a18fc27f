"""Digests of moved KV, one for each (layer, head, unit), the same whatever the tensor-parallel degree, the order in
memory or the transport.

    digest = xxh3_64(key rows of the unit, then value rows; seed = layer, head, unit)

XXH3 is no cryptographic hash: it finds corruption, not forgery; who may write at all is settled by the handshake.
"""

from __future__ import annotations

import numpy as np
import xxhash
from numpy.typing import NDArray

from tercet.transfer.pack import Bytes

Digests = NDArray[np.uint64]


def digests_of(packed: Bytes, layer: int, first_head: int, first_unit: int) -> Digests:
    """Digests of a packed buffer (transfer/pack.py), shape [units, heads]."""
    units, heads = packed.shape[:2]
    flat, size = packed.reshape(-1).data, packed.nbytes // (units * heads)
    digest = xxhash.xxh3_64_intdigest
    found = [
        digest(
            flat[n * size : (n + 1) * size],
            seed=(layer << 48) ^ ((first_head + n % heads) << 32) ^ (first_unit + n // heads),
        )
        for n in range(units * heads)
    ]
    return np.array(found, dtype=np.uint64).reshape(units, heads)
