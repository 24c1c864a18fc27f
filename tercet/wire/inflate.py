"""Decompresses what clients sent, up to a limit."""

from __future__ import annotations

import zlib

from tercet.errors import InvalidRequest, UnsupportedMedia
from tercet.wire.bodies import too_large

WINDOW_BITS = {"gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}  # as HTTP and gRPC name them


def inflate(encoding: str, data: bytes, max_bytes: int) -> bytes:
    """Raises UnsupportedMedia for another encoding, InvalidRequest for bytes that are not in it, BodyTooLarge."""
    bits = WINDOW_BITS.get(encoding)
    if bits is None:
        raise UnsupportedMedia(f"the body's encoding {encoding!r:.40} is not read here; gzip and deflate are")
    inflater = zlib.decompressobj(bits)
    try:
        plain = inflater.decompress(data, max_bytes + 1)
    except zlib.error as error:
        raise InvalidRequest(f"the body is not {encoding}, as its head says: {error}") from error
    if len(plain) > max_bytes:
        raise too_large(max_bytes)
    if not inflater.eof or inflater.unused_data:
        raise InvalidRequest(f"the body is not one whole {encoding} stream")
    return plain
