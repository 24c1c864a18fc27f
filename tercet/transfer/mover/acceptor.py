"""Accepts connections for a decode worker's mover: listens, does the first half of the handshake, turns strangers away.
The receiver serves those that are let in."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

from tercet import secret
from tercet.errors import Overloaded, PeerDown, PeerMismatch, ProtocolViolation
from tercet.transfer.links.channel import Channel, join_all
from tercet.transfer.links.secured import secured, wrapped
from tercet.transfer.links.wires import listen_tcp, listen_unix
from tercet.transfer.protocol.messages import VERSION, Challenge, Hello, Refuse
from tercet.transfer.transports.contract import HANDSHAKE_S, STOP_S, MoverConfig, check_hello

MAX_HELLO = 8192
MAX_CONNECTIONS = 1024
MAX_STRANGERS = 64  # connections without a valid HELLO yet; one more, and the oldest is closed


class _Gone(Exception):
    """A stranger closed its connection before its HELLO, as one does that only checks whether the port is open; or it
    was closed to make room."""


class Acceptor:
    """One thread per listener, and one per connection, which calls `serve` and then closes the connection."""

    def __init__(self, config: MoverConfig, serve: Callable[[Channel, Hello], None]) -> None:
        self._config = config
        self._serve = serve
        self._lock = threading.Lock()
        self._listeners: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._num_connections = 0  # not counting strangers
        self._strangers: dict[Channel, None] = {}  # in the order in which they came
        self._stopping = threading.Event()
        self._refused: Counter[str] = Counter()

    def listen(self, *hosts: str) -> tuple[str, list[str]]:
        """-> the address of a Unix socket, and a TCP address for each host."""
        listener, unix = listen_unix()
        found = [listen_tcp(host) for host in hosts]
        for each in (listener, *(listener for listener, _ in found)):
            self._listeners.append(each)
            self._threads.append(
                threading.Thread(target=self._accept_loop, args=(each,), name="kv-accept", daemon=True)
            )
        for thread in self._threads:
            thread.start()
        return unix, [address for _, address in found]

    def refused(self) -> Counter[str]:
        """Error code -> connections turned away or cut off for it."""
        with self._lock:
            return Counter(self._refused)

    def count_refused(self, code: str) -> None:
        with self._lock:
            self._refused[code] += 1

    def stop(self) -> None:
        """Accept no more connections."""
        self._stopping.set()
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        join_all(self._threads, STOP_S)

    def _accept_loop(self, listener: socket.socket) -> None:
        while not self._stopping.is_set():
            try:
                sock, _ = listener.accept()
            except OSError:  # the listener is closed, or for now there is no descriptor left
                self._stopping.wait(0.1)
                continue
            channel = Channel(sock)
            try:
                threading.Thread(target=self._admit, args=(channel,), name="kv-serve", daemon=True).start()
            except RuntimeError:  # for now there is no thread left
                self.count_refused("overloaded")
                channel.close()

    def _admit(self, channel: Channel) -> None:
        """Serve one connection, from its HELLO to its end."""
        admitted = False
        try:
            channel = self._secured(channel)
            hello = self._greet(channel)
            with self._lock:
                admitted = self._num_connections < MAX_CONNECTIONS
                self._num_connections += admitted
            if not admitted:
                raise Overloaded(f"{MAX_CONNECTIONS} transfer connections stand already")
            self._serve(channel, hello)
        except _Gone:
            pass
        except Overloaded as error:
            self.count_refused(error.code())
        except (PeerDown, PeerMismatch, ProtocolViolation) as error:
            self.count_refused(error.code())
            if isinstance(error, PeerMismatch):
                with contextlib.suppress(PeerDown):
                    channel.send(Refuse(error.code(), str(error)))
        finally:
            channel.shutdown()
            channel.close()
            with self._lock:
                self._num_connections -= admitted

    def _secured(self, channel: Channel) -> Channel:
        """With TLS, if that is wanted and it comes from another host."""
        if (tls := self._config.tls) is None or channel.is_local:
            return channel
        channel.settimeout(HANDSHAKE_S)
        try:
            spoken = wrapped(channel.sock, tls, dialled=False)
        except PeerDown as error:
            raise _Gone from error
        with self._stranger(Channel(spoken)):
            return Channel(secured(spoken, tls), over_tls=True)

    @contextlib.contextmanager
    def _stranger(self, channel: Channel) -> Iterator[None]:
        """It may be closed to make room. Raises _Gone if it goes away before its time is over."""
        deadline = time.monotonic() + HANDSHAKE_S
        with self._lock:
            self._strangers[channel] = None
            if len(self._strangers) > MAX_STRANGERS:
                oldest = next(iter(self._strangers))
                del self._strangers[oldest]
                oldest.shutdown()
                self._refused[Overloaded.code()] += 1
        try:
            yield
        except PeerDown as error:
            if time.monotonic() < deadline:
                raise _Gone from error
            raise
        finally:
            with self._lock:
                self._strangers.pop(channel, None)

    def _greet(self, channel: Channel) -> Hello:
        """Send a CHALLENGE and return the HELLO, if it is valid and comes in time."""
        with self._stranger(channel):
            challenge = Challenge(VERSION, secret.nonce())
            channel.deadline = time.monotonic() + HANDSHAKE_S
            channel.settimeout(HANDSHAKE_S)
            channel.send(challenge)
            hello, _ = channel.receive(MAX_HELLO)
        channel.deadline = None
        channel.settimeout(HANDSHAKE_S)
        if not isinstance(hello, Hello):
            raise ProtocolViolation(f"expected HELLO, got {type(hello).__name__}")
        check_hello(hello, self._config.token, challenge.nonce, self._config.fingerprint)
        return hello
