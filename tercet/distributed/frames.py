"""What two ranks say to each other on a link of the direct exchange.

    frame = header, 40 bytes, little-endian | payload

    DISPATCH  slots int32 [rows, k], weights float32 [rows, k], then rows of the batch [rows, width]
    COMBINE   what the experts made of rows that came [rows, width]
    WAITING   nothing: the sender is alive, and waits for another rank

Nothing else is ever sent; all sizes follow from the header and are bounded.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from tercet.distributed.exchange import DTYPES, ROUTING_BYTES
from tercet.errors import ProtocolViolation

MAGIC = b"TCX1"
HEADER = struct.Struct("<4sBBHIIQQII")  # magic, kind, dtype, k, layer, attempt, number, payload bytes, rows, width
MAX_PAYLOAD = 1 << 32


class Kind(IntEnum):
    DISPATCH = 0
    COMBINE = 1
    WAITING = 2


@dataclass(frozen=True)
class Frame:
    kind: Kind
    number: int = 0  # of the exchange
    attempt: int = 0
    layer: int = 0
    rows: int = 0
    width: int = 0  # E
    dtype: int = 0  # which of DTYPES
    k: int = 0

    @property
    def row_bytes(self) -> int:
        return self.width * DTYPES[self.dtype].itemsize

    @property
    def payload(self) -> int:
        """Bytes that follow the header."""
        routing = self.k * ROUTING_BYTES if self.kind == Kind.DISPATCH else 0
        return self.rows * (routing + self.row_bytes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """What has to be the same at all ranks."""
        return self.width, self.dtype, self.k

    def __str__(self) -> str:
        return f"{self.kind.name.lower()} of exchange {self.number}, attempt {self.attempt}, layer {self.layer}"

    def encode(self) -> bytes:
        """The header."""
        if self.payload > MAX_PAYLOAD:
            raise ProtocolViolation(f"{self}: {self.payload} bytes are over the limit of {MAX_PAYLOAD}")
        fields = (self.kind, self.dtype, self.k, self.layer, self.attempt, self.number, self.payload)
        return HEADER.pack(MAGIC, *fields, self.rows, self.width)


def decode(header: bytes) -> Frame:
    """Raises ProtocolViolation for what is no header of ours."""
    magic, kind, dtype, k, layer, attempt, number, payload, rows, width = HEADER.unpack(header)
    if magic != MAGIC:
        raise ProtocolViolation(f"not a frame of a token exchange: it begins with {magic!r}")
    if kind >= len(Kind) or dtype >= len(DTYPES):
        raise ProtocolViolation(f"unknown kind {kind} or dtype {dtype} of a frame")
    frame = Frame(Kind(kind), number, attempt, layer, rows, width, dtype, k)
    if frame.payload != payload or payload > MAX_PAYLOAD:
        raise ProtocolViolation(f"{frame}: {payload} bytes for {rows} rows of {width}; the limit is {MAX_PAYLOAD}")
    return frame
