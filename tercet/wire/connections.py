"""Limits on the connections of a process: how many, and how long each may be idle or slow.

    accept --> Guard(inner protocol) --> HEAD | IDLE | WATCHING  --serving()-->  nobody's business but the request's
                                          ^ waits for the client  <--ended-----

With TLS the handshake comes first, as a part of the first head.
Whoever waits for its client may be closed: at its phase's deadline, or, the longest idle first, when a new connection
finds no room. A connection that is being served is closed only when its client has gone, or sends so much ahead that it
could have. When as many are served as may be, some more are let in: who asks for health hears it, and whoever wants
more is told why not.

Whatever a client sends, in a turn of the loop it gets as many bytes read as are worked through in TURN_S, by what its
last ones took; then it is the others' turn.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import select
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

from tercet.errors import Overloaded, PeerMismatch, RequestTimeout, TercetError
from tercet.wire.listening import EVERYWHERE

AT_ONCE = 16 * 1024  # bytes of one connection that are read in a turn of the loop, at most
AT_LEAST = 64
TURN_S = 1e-3  # of the processor, for one connection
SWEEP_S = 1.0  # deadlines are looked at so often
BACKLOG = 100
SPARE = 16  # connections beyond the bound
FAREWELL_S = 600.0  # for the last bytes over TLS; who takes none for as long as a head may take is cut off before

log = logging.getLogger(__name__)


class ConnectionPhase(enum.Enum):
    """What a connection waits for. In the order in which connections are evicted."""

    IDLE = "idle"  # a request
    HEAD = "head"  # the rest of a request's head, or of the connection's opening
    WATCHING = "watching"  # nothing: the client listens, for as long as it likes


@dataclass(frozen=True)
class ConnectionLimits:
    most: int  # connections of this process that are served
    head_s: float
    idle_s: float

    @property
    def deadlines(self) -> dict[ConnectionPhase, float]:
        return {ConnectionPhase.IDLE: self.idle_s, ConnectionPhase.HEAD: self.head_s}


class Guarded(Protocol):
    """What a guard needs of the protocol behind it, besides being an asyncio.Protocol."""

    opens: ConnectionPhase  # HEAD: the client must speak at once, as in HTTP/2
    at_first: int  # bytes that are read in the first turn

    def farewell(self, error: TercetError | None) -> bytes:
        """The last bytes to the client; None: the connection was only idle. Also called before connection_made."""


class ServerTls(Protocol):
    """`tercet.tls`'s."""

    def server(self) -> ssl.SSLContext: ...
    def check(self, certificate: Any) -> None:
        """Of the client, as `SSLObject.getpeercert` has it. Raises PeerMismatch."""


class Connections:
    """Event loop only. `closed` counts by reason what was not closed by the client or its request."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self._all: set[Guard] = set()
        # Insertion order is age: the first of each phase has waited longest.
        self._waiting: dict[ConnectionPhase, dict[Guard, float]] = {phase: {} for phase in ConnectionPhase}
        self._sweeper: asyncio.TimerHandle | None = None
        self.buffer = memoryview(bytearray(AT_ONCE))  # shared: nobody keeps bytes in it beyond a callback
        self.closed: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._all)

    async def listen(
        self, host: str, port: int, protocol: Callable[[Guard], Guarded], tls: ServerTls | None = None
    ) -> asyncio.Server:
        """Serve `protocol` on a port, each connection behind a Guard. Raises OSError."""
        loop = asyncio.get_running_loop()

        def guard() -> Guard:
            return Guard(self, protocol, tls)

        if self._sweeper is None:
            self._sweep()
        if host == EVERYWHERE and socket.has_dualstack_ipv6():  # asyncio would leave IPv4 out
            bound = socket.create_server((host, port), family=socket.AF_INET6, dualstack_ipv6=True)
            return await loop.create_server(guard, sock=bound, backlog=BACKLOG)
        return await loop.create_server(guard, host, port, backlog=BACKLOG)

    def close(self) -> None:
        """Close whatever is still open."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        for guard in list(self._all):
            guard.cut("stopped")
            guard.leave()

    # ---- what guards say

    def admit(self, guard: Guard) -> None:
        """Make room for one more. Raises Overloaded when every connection is being served."""
        if len(self._all) >= self.limits.most + SPARE:
            oldest = next((guard for phase in ConnectionPhase for guard in self._waiting[phase]), None)
            if oldest is None:
                raise self._full()
            oldest.cut("evicted", Overloaded("the connection was closed to make room for another"))
        self._all.add(guard)

    def serve(self) -> None:
        """One more is to be served. Raises Overloaded when as many are as may be."""
        if len(self._all) - sum(map(len, self._waiting.values())) >= self.limits.most:
            raise self._full()

    def _full(self) -> Overloaded:
        return Overloaded(f"all {self.limits.most} connections are in use (limits.max_connections)")

    def wait(self, guard: Guard, phase: ConnectionPhase) -> None:
        """The guard waits for its client from now on."""
        self._waiting[phase][guard] = asyncio.get_running_loop().time()

    def forget(self, guard: Guard, phase: ConnectionPhase | None) -> None:
        if phase is not None:
            self._waiting[phase].pop(guard, None)

    def lost(self, guard: Guard) -> None:
        self._all.discard(guard)

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        pause = min(SWEEP_S, *(s / 4 for s in self.limits.deadlines.values()))
        self._sweeper = loop.call_later(pause, self._sweep)  # first: whatever follows, it goes on
        for phase, limit_s in self.limits.deadlines.items():
            for guard in self._overdue(self._waiting[phase], loop.time() - limit_s):
                guard.overdue(limit_s)
        self._part_from_gone()

    def _overdue(self, waiting: dict[Guard, float], before: float) -> list[Guard]:
        found = []
        for guard, since in waiting.items():
            if since > before:
                break
            found.append(guard)
        return found

    def _part_from_gone(self) -> None:
        """While reading is paused the loop does not see a client disconnect, so the socket is asked. Unread data that
        fills its buffers hides even the FIN, so a client may not send ahead for long."""
        now, poll, paused = asyncio.get_running_loop().time(), select.poll(), {}
        for guard in list(self._all):
            unread_s = guard.unread_s(now)
            if unread_s > self.limits.head_s:
                guard.cut("sent_ahead")
            elif unread_s >= 0:
                descriptor = guard.bare.get_extra_info("socket").fileno()
                paused[descriptor] = guard
                poll.register(descriptor, select.POLLRDHUP)
        for descriptor, _ in poll.poll(0):
            paused[descriptor].part()


class Guard(asyncio.BufferedProtocol):
    """Wraps a protocol, between it and its transport, and enforces the limits."""

    def __init__(
        self, connections: Connections, protocol: Callable[[Guard], Guarded], tls: ServerTls | None = None
    ) -> None:
        self._connections = connections
        self._tls = tls
        self._handshake: asyncio.Task[None] | None = None  # until TLS stands; nothing else may be said before
        self._early = b""
        self._guarded = protocol(self)
        self._inner = asyncio.Protocol()  # until it is opened
        self._phase: ConnectionPhase | None = None
        self._served = 0  # requests
        self._watched = 0
        self._portion = self._guarded.at_first  # bytes that are read at once
        self._to_come_s = 0.0  # of work that they have begun
        self._unsent = 0  # bytes, when it was last looked at
        self._unread_since: float | None = None  # what has come is not read
        self._lost = False

    # ---- what the inner protocol says

    @contextmanager
    def serving(self, *, watching: bool = False, brief: bool = False) -> Iterator[None]:
        """A request is being served. Raises Overloaded when as many are as may be, but not if it is
        `watching` (it only listens, and may be closed to make room) or `brief` (it is answered at once)."""
        if not (watching or brief or self._served):
            self._connections.serve()
        self._count(1, watching)
        try:
            yield
        finally:
            self._count(-1, watching)

    def opened(self) -> None:
        """The connection's opening is complete (HTTP/2)."""
        if self._phase is ConnectionPhase.HEAD:
            self._enter(ConnectionPhase.IDLE)

    def begun(self, seconds: float) -> None:
        """What was read has begun work that will take about so long, later."""
        self._to_come_s += seconds

    def fault(self, reason: str) -> None:
        """Count a connection that the inner protocol closes."""
        self._connections.closed[reason] += 1

    def _count(self, change: int, watching: bool) -> None:
        if watching:
            self._watched += change
        else:
            self._served += change
        wanted = None if self._served else ConnectionPhase.WATCHING if self._watched else ConnectionPhase.IDLE
        if wanted is not self._phase:
            self._enter(wanted)

    def _enter(self, phase: ConnectionPhase | None) -> None:
        self._connections.forget(self, self._phase)
        self._phase = phase
        if phase is not None and not self._lost:  # one that is closing may wait long for a client that does not read
            self._connections.wait(self, phase)

    # ---- how it ends

    def overdue(self, limit_s: float) -> None:
        """The client has kept us waiting for `limit_s`, unless it is still reading its last answer."""
        unsent = self._unsent_bytes()
        if self._phase is ConnectionPhase.IDLE and unsent and unsent != self._unsent:
            self._unsent = unsent
            self._enter(ConnectionPhase.IDLE)
        elif self._phase is ConnectionPhase.HEAD:
            self.cut("slow_head", RequestTimeout(f"the request's head did not come within {limit_s:g} s"))
        else:
            self.cut("idle")

    def unread_s(self, now: float) -> float:
        """For how long the inner protocol has not wanted to read, as far as was asked; negative: it reads."""
        if self.bare.is_closing() or (not self.transport.is_closing() and self.transport.is_reading()):
            return -1.0
        if self.transport.is_closing() and (unsent := self.bare.get_write_buffer_size()) != self._unsent:
            self._unsent, self._unread_since = unsent, None  # TLS ends, and its last bytes are on their way
        if self._unread_since is None:
            self._unread_since = now
        return now - self._unread_since

    def cut(self, reason: str, error: TercetError | None = None) -> None:
        """Say why, if the client is in the middle of a request, and close; what it does not take at once is dropped."""
        self.fault(reason)
        self._connections.forget(self, self._phase)
        secured = self.transport is not self.bare
        if (self._tls is not None and not secured) or (secured and self.transport.is_closing()):
            self.bare.abort()  # before the handshake's end no word of ours could be read, and then it was said
            return
        if not self._unsent_bytes() and not self.transport.is_closing():
            self.transport.write(self._guarded.farewell(error if self._phase is not ConnectionPhase.IDLE else None))
        if self._unsent_bytes():
            self.bare.abort()
        elif not self.transport.is_closing():
            self.transport.close()

    def part(self) -> None:
        """From a client that has gone."""
        if self._tls is None:
            self.transport.close()
        else:
            self.bare.abort()

    def leave(self) -> None:
        """Do not wait for the client to end TLS, as it should."""
        if self._tls is not None:
            self.bare.abort()

    def _unsent_bytes(self) -> int:
        """TLS counts neither what is below it, nor, once it is closing, anything."""
        below = self.bare.get_write_buffer_size()
        if self.transport is self.bare or self.transport.is_closing():
            return below
        return below + self.transport.get_write_buffer_size()

    # ---- what the transport says

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = self.bare = cast("asyncio.Transport", transport)  # bare: below TLS
        try:
            self._connections.admit(self)
        except Overloaded as error:
            self.cut("refused", error)
            return
        if self._tls is None:
            self._open()
            return
        self.transport.pause_reading()
        self._enter(ConnectionPhase.HEAD)
        self._handshake = asyncio.get_running_loop().create_task(self._secure(self._tls))

    def _open(self) -> None:
        self._inner = cast("asyncio.Protocol", self._guarded)
        self._enter(self._guarded.opens)
        self._inner.connection_made(self.transport)

    async def _secure(self, tls: ServerTls) -> None:
        """The handshake, in the time that a head has; the connection counts meanwhile."""
        loop, bare = asyncio.get_running_loop(), self.bare
        if bare.is_closing():  # cut off before this began
            return
        try:
            secured = await loop.start_tls(
                bare,
                self,
                tls.server(),
                server_side=True,
                ssl_handshake_timeout=self._connections.limits.head_s,
                ssl_shutdown_timeout=FAREWELL_S,
            )
            if secured is None:  # it was lost meanwhile
                raise ConnectionError("it ended in the middle")
            tls.check(secured.get_extra_info("peercert"))
        except (OSError, PeerMismatch) as error:
            log.info("a TLS handshake failed: %s", error)
            self.fault("tls_handshake")
            bare.abort()
            self.connection_lost(error)  # in the middle of a handshake nobody else says so
            return
        self.transport, self._handshake = secured, None
        if not self._lost:
            self._open()
            early, self._early = self._early, b""
            if early:
                self._take(early)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._connections.buffer[: self._portion]

    def buffer_updated(self, nbytes: int) -> None:
        self._unread_since = None
        data = bytes(self._connections.buffer[:nbytes])
        if self._handshake is not None:  # what came with the handshake's end
            self._early += data
            return
        self._take(data)

    def _take(self, data: bytes) -> None:
        if self._phase is ConnectionPhase.IDLE and self._guarded.opens is ConnectionPhase.IDLE:
            self._enter(ConnectionPhase.HEAD)
        nbytes, start, self._to_come_s = len(data), time.thread_time(), 0.0
        self._inner.data_received(data)
        took = time.thread_time() - start + self._to_come_s
        fitting = int(nbytes * TURN_S / took) if took > TURN_S else 2 * self._portion
        self._portion = min(max(fitting, AT_LEAST), AT_ONCE)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def connection_lost(self, error: BaseException | None) -> None:
        if self._lost:
            return
        self._lost = True
        self._connections.forget(self, self._phase)
        self._connections.lost(self)
        self._inner.connection_lost(cast("Exception | None", error))

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()
