"""A gRPC server over grpclib's HTTP/2, for servicers written for grpc.aio (why: docs/decisions/012).

    servicer --add_XServicer_to_server--> GrpcServer --start--> port
    stream of a client --accept--> Call --run--> servicer's method --> status

A TercetError is its gRPC status with details `code: message`; anything else that a servicer raises is an
InternalError, logged once. Every failure is counted by `on_failure`. Whom `door` refuses calls no method.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from grpclib.protocol import AbstractHandler, Stream
from h2.errors import ErrorCodes

from tercet.errors import Cancelled, DeadlineExceeded, TercetError, UnknownUrl, as_named
from tercet.wire.bodies import Bodies
from tercet.wire.connections import Connections, Guard, ServerTls
from tercet.wire.grpc_call import Aborted, Call, Offload, inline
from tercet.wire.http2 import Http2

MOST_WATCHERS = 512  # calls that only listen; one more ends the oldest
LAST_WORD_S = 5.0  # for a status to a client that does not read
CONTENT_TYPES = (b"application/grpc", b"application/grpc+proto")


@dataclass(frozen=True)
class GrpcLimits:
    max_message_bytes: int
    max_streams: int  # of one connection
    watching: frozenset[str] = frozenset()  # services whose calls only listen: their clients may be closed to make room


class GrpcServer:
    """Event loop only."""

    def __init__(
        self,
        connections: Connections,
        bodies: Bodies,
        limits: GrpcLimits,
        on_failure: Callable[[type[TercetError]], None] = lambda _: None,
        offload: Offload = inline,
        door: Callable[[Call], None] = lambda _: None,
        tls: ServerTls | None = None,
    ) -> None:
        """door: says who calls (`Call.caller`), before any message is read, or raises Unauthenticated."""
        self._connections = connections
        self.bodies = bodies
        self.limits = limits
        self.on_failure = on_failure
        self.offload = offload
        self.door = door
        self._tls = tls
        self.methods: dict[bytes, tuple[Any, bool]] = {}  # path -> its RpcMethodHandler, whether it only listens
        self.open: set[_Calls] = set()
        self.watchers: dict[asyncio.Task[None], None] = {}  # the first has listened longest
        self._listener: asyncio.Server | None = None

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """What the generated `add_..._to_server` calls."""
        for name, handler in handlers.items():
            self.methods[f"/{service}/{name}".encode()] = (handler, service in self.limits.watching)

    def handler(self, service: str, name: str) -> Any:
        """A method that has been added."""
        return self.methods[f"/{service}/{name}".encode()][0]

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        """Called by the generated code too, with the same methods."""

    async def start(self, host: str, port: int) -> int:
        """-> the port. Raises OSError."""
        self._listener = await self._connections.listen(host, port, self._protocol, self._tls)
        return int(self._listener.sockets[0].getsockname()[1])

    async def stop(self, grace_s: float = 0.0) -> None:
        """Close the port, give running calls `grace_s` seconds, then end them."""
        if self._listener is not None:
            self._listener.close()
        tasks = [task for client in self.open for task in client.tasks.values()]
        if tasks and grace_s:
            await asyncio.wait(tasks, timeout=grace_s)
        for client in list(self.open):
            client.guard.cut("stopped")
        if tasks:
            await asyncio.wait(tasks)

    def _protocol(self, guard: Guard) -> Http2:
        return _Calls(self, guard).http2


class _Calls(AbstractHandler):
    """The calls of one connection."""

    def __init__(self, server: GrpcServer, guard: Guard) -> None:
        self._server = server
        self.guard = guard
        self.http2 = Http2(self, guard, server.limits.max_streams)
        self.tasks: dict[Stream, asyncio.Task[None]] = {}

    def accept(self, stream: Stream, headers: Any, release_stream: Callable[[], None]) -> None:
        def end(task: asyncio.Task[None]) -> None:  # also of a task that is cancelled before it has begun
            del self.tasks[stream]
            release_stream()

        self._server.open.add(self)
        self.tasks[stream] = asyncio.get_running_loop().create_task(self._serve(stream, dict(headers)))
        self.tasks[stream].add_done_callback(end)

    def cancel(self, stream: Stream) -> None:
        task = self.tasks.get(stream)
        if task is not None:
            task.cancel()

    def close(self) -> None:
        self._server.open.discard(self)
        for task in self.tasks.values():
            task.cancel()

    async def _serve(self, stream: Stream, headers: dict[bytes, bytes]) -> None:
        server = self._server
        max_bytes = server.limits.max_message_bytes
        call = Call(stream, headers, server.bodies, max_bytes, self.http2.earn, server.offload, self._served)
        try:
            if refusal := _refusal(headers):
                self.http2.refused()
                await stream.send_headers(refusal, end_stream=True)
                return
            method, watching = server.methods.get(headers.get(b":path", b""), (_UNKNOWN, False))
            await self._run(call, method, watching)
            await self._say_last_word(call)
        except asyncio.CancelledError:
            server.on_failure(Cancelled)
            raise
        finally:
            call.release()
            if stream.closable:
                stream.reset_nowait(ErrorCodes.NO_ERROR if call.ended else ErrorCodes.CANCEL)

    async def _run(self, call: Call, method: Any, watching: bool) -> None:
        """The method, with every failure told to the call."""
        task = asyncio.current_task()
        assert task is not None
        try:
            self._server.door(call)
            if watching:
                self._make_room_for_watcher(task)
            with self.guard.serving(watching=watching):
                await call.run(method)
        except Aborted:
            pass
        except TimeoutError:
            self._failed(call, DeadlineExceeded("the call's deadline has passed"))
        except Exception as error:  # noqa: BLE001  # a boundary: whatever it is, the client is told a name
            self._failed(call, as_named(error, call.id))
        finally:
            self._server.watchers.pop(task, None)

    @contextmanager
    def _served(self) -> Iterator[None]:
        """For a call that only watched: its client is not closed to make room any more. Raises Overloaded."""
        with self.guard.serving():
            task = asyncio.current_task()
            assert task is not None
            self._server.watchers.pop(task, None)
            yield

    def _failed(self, call: Call, error: TercetError) -> None:
        if error.http_status < 500:
            self.http2.refused()
        self._server.on_failure(type(error))
        call.fail(error)

    def _make_room_for_watcher(self, task: asyncio.Task[None]) -> None:
        watchers = self._server.watchers
        if len(watchers) >= MOST_WATCHERS:
            next(iter(watchers)).cancel()
        watchers[task] = None

    async def _say_last_word(self, call: Call) -> None:
        """The status; a client that does not take it loses its connection."""
        try:
            async with asyncio.timeout(LAST_WORD_S):
                await call.end()
        except TimeoutError:
            self.guard.cut("does_not_read")
        except Cancelled:
            pass


async def _unknown(messages: object, call: Call) -> None:
    raise UnknownUrl("there is no such method")


_UNKNOWN: Any = grpc.stream_unary_rpc_method_handler(_unknown)  # answered before any message is read


def _refusal(headers: dict[bytes, bytes]) -> list[tuple[str, str]]:
    """The HTTP answer to what is no gRPC request, as gRPC's protocol over HTTP/2 has it; empty if it is one."""
    if headers.get(b":method") != b"POST":
        return [(":status", "405"), ("allow", "POST")]
    if headers.get(b"content-type", b"").partition(b";")[0] not in CONTENT_TYPES:
        return [(":status", "415")]
    return []
