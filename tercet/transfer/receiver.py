"""The decode side of the KV mover: listens on every transport, lands bytes, and reports the facts of each ticket.

Threads: one acceptor a transport, one reader and one writer a connection, one clock. All state is `Inbound`, behind
one lock. `on_event` is called under that lock, in order, on a mover thread; it must be quick and must not call back
into the receiver.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

from tercet.errors import PeerDown, PeerMismatch, ProtocolViolation, TercetError
from tercet.transfer.channel import Channel, Pump
from tercet.transfer.digest import block_digest
from tercet.transfer.effects import Send
from tercet.transfer.inbound import Committed, Complete, Cut, Effect, Failed, Inbound, Quiesced
from tercet.transfer.messages import VERSION, Data, Goodbye, Hello, Message, Refuse, Ticket, Welcome
from tercet.transfer.region import Region
from tercet.transfer.transport import Endpoint, Transport, hello_fault, host_id

Event = Committed | Complete | Failed | Quiesced
HANDSHAKE_S = 5.0
MAX_HELLO = 4096
MAX_CONNECTIONS = 256


@dataclass(frozen=True)
class MoverConfig:
    """What both sides of a mover need to know of themselves."""

    worker_id: str
    fingerprint: str
    token: str
    lease_s: float
    heartbeat_s: float
    integrity: bool


class _Connection:
    """One prefill worker, connected."""

    def __init__(self, transport: Transport, channel: Channel, pidfd: int | None) -> None:
        self.transport = transport
        self.channel = channel
        self.pidfd = pidfd
        self.said_goodbye = False
        self.pump: Pump[Message]


class KvReceiver:
    def __init__(
        self,
        config: MoverConfig,
        epoch: int,
        region: Region,
        transports: Sequence[Transport],
        on_event: Callable[[Event], None],
    ) -> None:
        self._config = config
        self._epoch = epoch
        self._region = region
        self._transports = tuple(transports)
        self._on_event = on_event
        layout = region.layout
        self._inbound = Inbound(epoch, layout.layers, layout.block_bytes, config.lease_s, config.integrity)
        self._lock = threading.Lock()
        self._connections: set[_Connection] = set()
        self._listeners: list[socket.socket] = []
        self._stopping = threading.Event()
        self._stop_read, self._stop_write = os.pipe()
        self._refused: Counter[str] = Counter()  # error code -> connections turned away or cut off for it

    # ---- verbs, any thread

    def start(self, host: str) -> Endpoint:
        """Listen. -> the endpoint that prefill workers connect to."""
        addresses = {}
        for transport in self._transports:
            listener, addresses[transport.name] = transport.listen(host)
            self._listeners.append(listener)
            self._spawn(self._accept_loop, transport, listener)
        self._spawn(self._clock)
        return Endpoint(self._epoch, host_id(), addresses)

    def admit(self, ticket: Ticket, first_block: int, blocks: Sequence[int]) -> None:
        with self._lock:
            self._run(self._inbound.admit(ticket, first_block, blocks, time.monotonic()))

    def refuse(self, ticket: Ticket, reason: str) -> None:
        with self._lock:
            self._run(self._inbound.refuse(ticket, reason))

    def cancel(self, ticket: Ticket, error: TercetError) -> None:
        with self._lock:
            self._run(self._inbound.cancel(ticket, error))

    def live(self) -> list[Ticket]:
        with self._lock:
            return self._inbound.live()

    def dropped(self) -> Counter[str]:
        with self._lock:
            return Counter(self._inbound.dropped)

    def refused(self) -> Counter[str]:
        """Error code -> connections turned away or cut off for it."""
        with self._lock:
            return Counter(self._refused)

    def stop(self) -> None:
        """Close every connection. Tickets that are still open fail; their proof may never come, the process ends."""
        self._stopping.set()
        os.write(self._stop_write, b"x")
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.pump.finish(timeout=1.0)
        os.close(self._stop_write)  # the read end stays readable for whoever still waits for a death

    # ---- threads

    def _spawn(self, target: Callable[..., None], *args: object) -> None:
        threading.Thread(target=target, args=args, name=f"kv-{target.__name__.strip('_')}", daemon=True).start()

    def _count_refused(self, code: str) -> None:
        with self._lock:
            self._refused[code] += 1

    def _accept_loop(self, transport: Transport, listener: socket.socket) -> None:
        while not self._stopping.is_set():
            try:
                sock, _ = listener.accept()
            except OSError:  # the listener is closed, or for now there is no descriptor left
                self._stopping.wait(0.1)
                continue
            if len(self._connections) >= MAX_CONNECTIONS:
                self._count_refused("overloaded")
                sock.close()
                continue
            self._spawn(self._serve, transport, sock)

    def _serve(self, transport: Transport, sock: socket.socket) -> None:
        """The handshake; then the connection's own threads take over."""
        channel = Channel(sock)
        pidfd = None
        try:
            pidfd = transport.vet(sock)
            channel.settimeout(HANDSHAKE_S)
            self._welcome(transport, channel)
            channel.settimeout(None)
        except (PeerDown, PeerMismatch, ProtocolViolation) as error:
            self._count_refused(error.code())
            if pidfd is not None:
                os.close(pidfd)
            if isinstance(error, PeerMismatch):
                with contextlib.suppress(PeerDown):
                    channel.send(Refuse(error.code(), str(error)))
            channel.shutdown()
            channel.close()
            return
        connection = _Connection(transport, channel, pidfd)
        connection.pump = Pump(
            channel,
            self._config.worker_id,
            read=lambda: self._read(connection),
            write=channel.send,
            ended=lambda error: self._ended(connection, error),
        )
        with self._lock:
            self._connections.add(connection)
        connection.pump.start()

    def _welcome(self, transport: Transport, channel: Channel) -> None:
        hello, _ = channel.receive(MAX_HELLO)
        if not isinstance(hello, Hello):
            raise ProtocolViolation(f"expected HELLO, got {type(hello).__name__}")
        config, layout = self._config, self._region.layout
        fault = hello_fault(hello, VERSION, config.token, config.fingerprint, layout)
        if fault is not None:
            raise fault
        transport.greet(channel, Welcome(config.worker_id, self._epoch, list(astuple(layout))), self._region)

    def _read(self, connection: _Connection) -> None:
        message, payload = connection.channel.receive()
        if isinstance(message, Data):
            self._land(connection, message, payload)
            return
        connection.said_goodbye = connection.said_goodbye or isinstance(message, Goodbye)
        with self._lock:
            one_sided = connection.transport.one_sided
            self._run(self._inbound.on_message(connection, one_sided, message, time.monotonic()))

    def _land(self, connection: _Connection, data: Data, payload: int) -> None:
        with self._lock:
            blocks = self._inbound.begin_landing(connection, data)
        if blocks is None:
            connection.channel.discard(payload)
            return
        digests: list[int] | None = None
        try:
            connection.transport.land(connection.channel, payload, self._region, data.layer, blocks)
            digests = [0] * len(blocks)
            if self._config.integrity:
                digests = [
                    block_digest(self._region.block(data.layer, block), data.layer, data.index + i)
                    for i, block in enumerate(blocks)
                ]
        finally:
            with self._lock:
                self._run(self._inbound.end_landing(data, digests, time.monotonic()))

    def _ended(self, connection: _Connection, error: PeerDown | ProtocolViolation) -> None:
        if isinstance(error, ProtocolViolation):
            self._count_refused(error.code())
        with self._lock:
            self._connections.discard(connection)
            self._run(self._inbound.peer_down(connection, time.monotonic()))
        if connection.pidfd is None:
            return
        if connection.said_goodbye or self._await_death(connection.pidfd):
            with self._lock:
                self._run(self._inbound.peer_dead(connection))
        os.close(connection.pidfd)

    def _await_death(self, pidfd: int) -> bool:
        """Block until the process behind `pidfd` is dead (True) or this receiver stops (False)."""
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        poller.register(self._stop_read, select.POLLIN)
        return pidfd in [fd for fd, _ in poller.poll()]

    def _clock(self) -> None:
        while not self._stopping.wait(self._config.heartbeat_s):
            with self._lock:
                self._run(self._inbound.heartbeats())
                self._run(self._inbound.tick(time.monotonic()))

    def _run(self, effects: Sequence[Effect]) -> None:
        """Carry effects out, in order; the lock is held."""
        for effect in effects:
            if isinstance(effect, Send):
                assert isinstance(effect.peer, _Connection)
                effect.peer.pump.post(effect.message)
            elif isinstance(effect, Cut):
                assert isinstance(effect.peer, _Connection)
                effect.peer.channel.shutdown()
            else:
                self._on_event(effect)
