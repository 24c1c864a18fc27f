"""A digest of moved KV that depends neither on the order of the blocks nor on how they were cut into messages.

    digest = sum over (layer, index) of xxh3_64(bytes of the block, seed = (layer, index))   mod 2**64

`index` counts the granted blocks of the ticket. XXH3 is no cryptographic hash: it finds corruption, not forgery;
who may write at all is settled by the handshake.
"""

from __future__ import annotations

import xxhash

MASK = (1 << 64) - 1


def block_digest(data: memoryview, layer: int, index: int) -> int:
    """Digest of one block of one layer, to be added to the sum."""
    return int(xxhash.xxh3_64_intdigest(data, seed=(layer << 32) | index))
