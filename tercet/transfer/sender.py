"""The prefill side of the KV mover: connects to decode workers, writes layers as they are computed, commits.

Threads: one reader and one writer a connection, one clock; a dial runs on the caller's thread of `connect`. All state
is `Outbound`, behind one lock. `on_event` is called under that lock, in order, on a mover thread; it must be quick and
must not call back into the sender.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple

from tercet.errors import PeerDown, PeerMismatch, ProtocolViolation, TercetError, TransferError
from tercet.transfer.channel import Channel, Pump
from tercet.transfer.digest import block_digest
from tercet.transfer.effects import Send
from tercet.transfer.messages import VERSION, Commit, Goodbye, Hello, Message, Ticket
from tercet.transfer.outbound import (
    Effect,
    Failed,
    Granted,
    OpDone,
    Outbound,
    Released,
    Seal,
    Write,
)
from tercet.transfer.receiver import HANDSHAKE_S, MoverConfig
from tercet.transfer.region import Region
from tercet.transfer.transport import Endpoint, Target, Transport, host_id

Event = Granted | Failed | Released | OpDone


class _Connection:
    """One decode worker, connected."""

    def __init__(self, endpoint: str, transport: Transport, channel: Channel, target: Target) -> None:
        self.endpoint = endpoint
        self.transport = transport
        self.channel = channel
        self.target = target
        self.pump: Pump[Message | Write | Seal]


class KvSender:
    def __init__(
        self,
        config: MoverConfig,
        region: Region,
        transports: Sequence[Transport],
        on_event: Callable[[Event], None],
    ) -> None:
        self._config = config
        self._region = region
        self._transports = {t.name: t for t in transports}  # in order of preference
        self._on_event = on_event
        self._outbound = Outbound(region.layout.block_bytes, config.lease_s)
        self._lock = threading.Lock()
        self._dialing: dict[str, threading.Lock] = {}  # endpoint -> one handshake however many ask
        self._connections: dict[str, _Connection] = {}  # endpoint -> live connection
        self._host_id = host_id()
        self._stopping = threading.Event()
        threading.Thread(target=self._clock, name="kv-clock", daemon=True).start()

    # ---- verbs, any thread

    def open(self, ticket: Ticket, endpoint: str, num_blocks: int) -> str:
        """Offer a request to the decode worker at `endpoint`; connects first if need be, which may block for some
        seconds. -> the transport's name. Raises PeerDown or PeerMismatch."""
        connection = self._connect(endpoint)
        with self._lock:
            self._run(self._outbound.open(ticket, connection, num_blocks, time.monotonic()))
            if self._connections.get(endpoint) is not connection:  # it broke between the two steps
                self._run(self._outbound.peer_down(connection))
        return connection.transport.name

    def push(self, ticket: Ticket, layer: int, first: int, blocks: Sequence[int]) -> None:
        """Prompt blocks from index `first` on stand complete in source `blocks` of `layer`."""
        with self._lock:
            self._run(self._outbound.push(ticket, layer, first, blocks))

    def commit(self, commit: Commit) -> None:
        with self._lock:
            self._run(self._outbound.commit(commit, time.monotonic()))

    def cancel(self, ticket: Ticket, error: TercetError) -> None:
        with self._lock:
            self._run(self._outbound.cancel(ticket, error))

    def live(self) -> list[Ticket]:
        with self._lock:
            return self._outbound.live()

    def dropped(self) -> Counter[str]:
        with self._lock:
            return Counter(self._outbound.dropped)

    def stop(self) -> None:
        """Empty the outboxes, tell every peer that nothing will be written any more, and close."""
        self._stopping.set()
        with self._lock:
            connections = list(self._connections.values())
            for ticket in self._outbound.live():  # no write begins after this, so GOODBYE is true
                self._run(self._outbound.cancel(ticket, PeerDown("the prefill worker stops")))
            for connection in connections:
                connection.pump.post(Goodbye("the prefill worker stops"))
        for connection in connections:
            connection.pump.finish(timeout=5.0)

    # ---- connecting

    def _connect(self, endpoint: str) -> _Connection:
        with self._lock:
            dialing = self._dialing.setdefault(endpoint, threading.Lock())
        with dialing:
            with self._lock:
                connection = self._connections.get(endpoint)
            if connection is None:
                connection = self._dial(endpoint)
            return connection

    def _dial(self, encoded: str) -> _Connection:
        endpoint = Endpoint.decode(encoded)
        transport = self._choose(endpoint)
        channel = Channel(transport.dial(endpoint.addresses[transport.name], HANDSHAKE_S))
        try:
            channel.settimeout(HANDSHAKE_S)
            channel.send(self._hello())
            target = transport.attach(channel)
            self._region.layout.require_same_blocks(target.layout)
            channel.settimeout(None)
        except (TransferError, OSError):
            channel.close()
            raise
        connection = _Connection(encoded, transport, channel, target)
        connection.pump = Pump(
            channel,
            target.worker_id,
            read=lambda: self._read(connection),
            write=lambda item: self._write(connection, item),
            ended=lambda error: self._ended(connection),
        )
        with self._lock:
            self._connections[encoded] = connection
        connection.pump.start()
        return connection

    def _choose(self, endpoint: Endpoint) -> Transport:
        for name, transport in self._transports.items():
            if name in endpoint.addresses and (not transport.one_sided or endpoint.host_id == self._host_id):
                return transport
        ours, theirs = list(self._transports), list(endpoint.addresses)
        raise PeerMismatch(f"no transport reaches the decode worker: {ours} here, {theirs} there")

    def _hello(self) -> Hello:
        config = self._config
        layout: list[object] = list(astuple(self._region.layout))
        return Hello(VERSION, config.token, config.worker_id, config.fingerprint, layout)

    # ---- threads

    def _read(self, connection: _Connection) -> None:
        message, payload = connection.channel.receive()
        if payload:
            raise ProtocolViolation("a decode worker sends no payload")
        with self._lock:
            self._run(self._outbound.on_message(connection, message, time.monotonic()))

    def _write(self, connection: _Connection, item: Message | Write | Seal) -> None:
        if isinstance(item, Write):
            self._write_blocks(connection, item)
        elif isinstance(item, Seal):
            with self._lock:
                effects = self._outbound.seal(item, time.monotonic())
            for effect in effects:
                assert isinstance(effect, Send)
                connection.channel.send(effect.message)
        else:
            connection.channel.send(item)

    def _write_blocks(self, connection: _Connection, write: Write) -> None:
        data, digests = write.data, None
        with self._lock:
            wanted = self._outbound.begin_write(data)
        try:
            if wanted:
                digests = self._digests(write)
                connection.transport.write(
                    connection.channel, connection.target, self._region, data, write.blocks, write.destinations
                )
        except PeerDown:
            digests = None
            raise
        finally:
            with self._lock:
                self._run(self._outbound.end_write(data, digests))

    def _digests(self, write: Write) -> list[int]:
        if not self._config.integrity:
            return [0] * len(write.blocks)
        layer, index = write.data.layer, write.data.index
        return [block_digest(self._region.block(layer, b), layer, index + i) for i, b in enumerate(write.blocks)]

    def _ended(self, connection: _Connection) -> None:
        with self._lock:
            if self._connections.get(connection.endpoint) is connection:
                del self._connections[connection.endpoint]
            self._run(self._outbound.peer_down(connection))
        connection.target.memory = None  # the dead peer's cache would stay mapped until a garbage collection

    def _clock(self) -> None:
        while not self._stopping.wait(self._config.heartbeat_s):
            with self._lock:
                self._run(self._outbound.heartbeats())
                self._run(self._outbound.tick(time.monotonic()))

    def _run(self, effects: Sequence[Effect]) -> None:
        """Carry effects out, in order; the lock is held."""
        for effect in effects:
            if isinstance(effect, Send):
                self._post(effect.peer, effect.message)
            elif isinstance(effect, Write | Seal):
                self._post(effect.peer, effect)
            else:
                self._on_event(effect)

    def _post(self, peer: object, item: Message | Write | Seal) -> None:
        assert isinstance(peer, _Connection)
        if not peer.pump.post(item) and isinstance(item, Write):
            self._run(self._outbound.end_write(item.data, None))
