"""One gRPC call over an HTTP/2 stream of grpclib's: messages in and out, its deadline, and its status.

A `Call` is the context that grpc.aio's servicers are given, as far as those here use it, so that the generated stubs
and grpcio's reflection servicer run over it unchanged.
"""

from __future__ import annotations

import asyncio
import inspect
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, aclosing, contextmanager
from functools import partial
from typing import Any, NoReturn, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError
from grpclib.metadata import decode_timeout, encode_grpc_message
from grpclib.protocol import Stream
from h2.exceptions import ProtocolError

from tercet.errors import Cancelled, InvalidRequest, TercetError
from tercet.wire.bodies import Bodies, Body, too_large
from tercet.wire.inflate import inflate

T = TypeVar("T")

PIECE = 16 * 1024  # bytes of a message that are asked for at once, and counted then
LATE_S = 1.0  # grace, so that a method that watches the deadline itself can end first
MOST_DETAILS = 2048  # characters of a status
HEAD = [(":status", "200"), ("content-type", "application/grpc"), ("grpc-accept-encoding", "identity,deflate,gzip")]


class Aborted(Exception):  # never leaves wire/
    """What `Call.abort` raises in the servicer."""


class Offload(Protocol):
    """Runs `work`, which parses a message of `size` bytes, on the event loop or off it."""

    async def __call__(self, call: Call, size: int, work: Callable[[], T]) -> T: ...


async def inline(call: Call, size: int, work: Callable[[], T]) -> T:
    return work()


class Call:
    """Faults of the client come out as TercetError: InvalidRequest, BodyTooLarge, RequestTimeout, Cancelled."""

    def __init__(
        self,
        stream: Stream,
        headers: Mapping[bytes, bytes],
        bodies: Bodies,
        max_bytes: int,
        passed: Callable[[], None],
        offload: Offload,
        served: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """`max_bytes` bounds each message, `passed` is told of each."""
        self.id = uuid.uuid4().hex
        self._stream = stream
        self._headers = headers
        self._bodies = bodies
        self._max_bytes = max_bytes
        self._passed = passed
        self._offload = offload
        self.served = served  # within it a call that was only watching is one that is served
        self.ended = False  # with its status
        self.caller: Any = None  # who it is; the server's door says so
        self._body: Body | None = None
        self._begun = False  # whether the answer's head is out
        self._code, self._details = grpc.StatusCode.OK, ""
        self._deadline: float | None = None

    # ---- what a servicer may ask

    def address(self) -> str:
        """The client's, without its port."""
        address = self._stream.connection.get_peer().addr()
        return str(address[0]) if address else ""

    def header(self, name: bytes) -> bytes:
        return self._headers.get(name, b"")

    def time_remaining(self) -> float | None:
        """Seconds until the client's deadline; None if it has set none."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    async def abort(self, code: grpc.StatusCode, details: str = "") -> NoReturn:
        self._code, self._details = code, details
        raise Aborted

    async def write(self, message: Any) -> None:
        """Waits while the client does not read."""
        data = message.SerializeToString()
        with _translated():
            if not self._begun:
                self._begun = True
                await self._stream.send_headers(HEAD)
            await self._stream.send_data(b"\0" + len(data).to_bytes(4, "big") + data)
        self._passed()

    def release(self) -> None:
        """The request's bytes are needed no longer."""
        if self._body is not None:
            self._body.release()

    # ---- what the server does with it

    async def run(self, method: Any) -> None:
        """Call one `grpc.RpcMethodHandler`, of whichever of the four kinds. Raises TimeoutError."""
        self._deadline = _deadline(self._headers.get(b"grpc-timeout"))
        left_s = self.time_remaining()
        async with asyncio.timeout(None if left_s is None else left_s + LATE_S):
            await self._run(method)

    async def _run(self, method: Any) -> None:
        if not method.request_streaming:
            await self._answer(method, await self._message(method.request_deserializer))
            return
        async with aclosing(self._messages(method.request_deserializer)) as messages:
            await self._answer(method, messages)

    async def _answer(self, method: Any, request: Any) -> None:
        behaviour = method.unary_unary or method.unary_stream or method.stream_unary or method.stream_stream
        answer = behaviour(request, self)
        if not method.response_streaming:
            await self.write(await answer)
        elif inspect.isasyncgen(answer):
            async with aclosing(answer):
                async for message in answer:
                    await self.write(message)
        else:
            await answer  # it writes by itself

    def fail(self, error: TercetError) -> None:
        """The status that `end` will send."""
        self._code, self._details = grpc.StatusCode[error.grpc_status], f"{error.code()}: {error}"

    async def end(self) -> None:
        """Send the status."""
        trailers = [("grpc-status", str(self._code.value[0]))]
        if self._details:
            trailers.append(("grpc-message", encode_grpc_message(self._details[:MOST_DETAILS])))
        with _translated():
            await self._stream.send_headers([*([] if self._begun else HEAD), *trailers], end_stream=True)
        self.ended = True

    # ---- messages

    async def _message(self, deserialize: Callable[[bytes], Any]) -> Any:
        """The only one; its bytes are held until `release`."""
        reader = _MessageReader(self._stream, self._max_bytes)
        self._body = await self._bodies.receive(reader.read, self._max_bytes)
        if reader.ended:
            raise InvalidRequest("the call has no message")
        return await self._parsed(deserialize, reader, self._body.data)

    async def _messages(self, deserialize: Callable[[bytes], Any]) -> AsyncGenerator[Any, None]:
        while True:
            reader = _MessageReader(self._stream, self._max_bytes)
            await reader.begin()  # a stream may be silent between two messages
            if reader.ended:
                return
            body = await self._bodies.receive(reader.read, self._max_bytes)
            try:
                message = await self._parsed(deserialize, reader, body.data)
            finally:
                body.release()
            yield message

    async def _parsed(self, deserialize: Callable[[bytes], Any], reader: _MessageReader, data: bytes) -> Any:
        self._passed()
        size = self._max_bytes if reader.compressed else len(data)
        return await self._offload(self, size, partial(self._parse, deserialize, reader.compressed, data))

    def _parse(self, deserialize: Callable[[bytes], Any], compressed: bool, data: bytes) -> Any:
        if compressed:
            data = inflate(self.header(b"grpc-encoding").decode("latin-1"), data, self._max_bytes)
        try:
            return deserialize(data)
        except DecodeError as error:
            raise InvalidRequest(f"the message cannot be read: {error}") from error


class _MessageReader:
    """One length-prefixed message, in pieces."""

    def __init__(self, stream: Stream, max_bytes: int) -> None:
        self._stream = stream
        self._max_bytes = max_bytes
        self._left: int | None = None  # bytes; None before the prefix
        self.compressed = False
        self.ended = False  # the stream ended instead

    async def begin(self) -> None:
        """Read the prefix."""
        prefix = await self._receive(5)
        self.ended = not prefix
        self._left = int.from_bytes(prefix[1:], "big")
        if prefix[:1] not in (b"", b"\0", b"\1"):
            raise InvalidRequest(f"the message begins with {prefix[0]}, not with 0 or 1")
        self.compressed = prefix[:1] == b"\1"
        if self._left > self._max_bytes:
            raise too_large(self._max_bytes)

    async def read(self) -> bytes:
        if self._left is None:
            await self.begin()
        assert self._left is not None
        piece = await self._receive(min(self._left, PIECE))
        self._left -= len(piece)
        if not piece and self._left:
            raise InvalidRequest("the call ended within a message")
        return piece

    async def _receive(self, size: int) -> bytes:
        try:
            with _translated():
                return await self._stream.recv_data(size)
        except AssertionError as error:  # grpclib's word for it
            raise InvalidRequest("the call ended within a message") from error


def _deadline(timeout: bytes | None) -> float | None:
    """time.monotonic() of the deadline."""
    if timeout is None:
        return None
    try:
        return time.monotonic() + decode_timeout(timeout.decode("ascii"))
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(f"grpc-timeout {timeout!r:.40} is no timeout") from error


@contextmanager
def _translated() -> Iterator[None]:
    """The connection or the stream may end at any await."""
    try:
        yield
    except (ProtocolError, ConnectionError) as error:
        raise Cancelled("the client has closed the call") from error
