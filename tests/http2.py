"""HTTP/2 by hand, for what no library would send: frames, heads, and a client that says them to a port."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Iterable

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
ALTSVC = 10
END_STREAM, END_HEADERS, PADDED = 0x1, 0x4, 0x8
GENERATE = b"/tercet.v1.Inference/Generate"


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def head(path: bytes = GENERATE, **changes: bytes | None) -> list[tuple[bytes, bytes]]:
    """The headers of a gRPC call; a change to None leaves one out. `_` stands for `-`, a leading one for `:`."""
    fields: dict[bytes, bytes | None] = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": path,
        b":authority": b"a",
        b"te": b"trailers",
        b"content-type": b"application/grpc",
    }
    fields |= {name.encode().replace(b"_", b"-"): value for name, value in changes.items()}
    return [(name, value) for name, value in fields.items() if value is not None]


def block(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """HPACK, every field a literal that is never indexed."""
    return b"".join(b"\x10" + _string(name) + _string(value) for name, value in headers)


def _string(text: bytes) -> bytes:
    return _integer(len(text)) + text


def _integer(value: int) -> bytes:
    """With a prefix of 7 bits."""
    if value < 127:
        return bytes([value])
    out, value = [127], value - 127
    while value >= 128:
        out.append(value % 128 + 128)
        value //= 128
    return bytes([*out, value])


def opened(*frames: bytes) -> bytes:
    """A connection's beginning, and then these."""
    return PREFACE + frame(SETTINGS) + b"".join(frames)


def call(headers: Iterable[tuple[bytes, bytes]], stream: int = 1, flags: int = END_HEADERS) -> bytes:
    return frame(HEADERS, flags, stream, block(headers))


def message(data: bytes, prefix: bytes | None = None) -> bytes:
    """A gRPC message."""
    return (struct.pack(">BI", 0, len(data)) if prefix is None else prefix) + data


async def said_to(
    address: str, data: bytes, seconds: float = 1.0, enough: Callable[[bytes], object] = lambda _: False
) -> bytes:
    """Say `data` to host:port. -> what comes back until it is enough, the other side closes or `seconds` are over."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    answer = b""
    try:
        writer.write(data)
        async with asyncio.timeout(seconds):
            while not enough(answer) and (piece := await reader.read(65536)):
                answer += piece
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.close()
    return answer


def frames_of(answer: bytes) -> list[tuple[int, int, int, bytes]]:
    """(kind, flags, stream, payload) of each frame."""
    found = []
    while len(answer) >= 9:
        length = int.from_bytes(answer[:3], "big")
        if len(answer) < 9 + length:
            break
        found.append((answer[3], answer[4], int.from_bytes(answer[5:9], "big"), answer[9 : 9 + length]))
        answer = answer[9 + length :]
    return found
