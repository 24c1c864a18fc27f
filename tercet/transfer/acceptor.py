"""The front door of a decode worker's mover: listens, greets, turns away. Who may come in is served elsewhere."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import Counter
from collections.abc import Callable

from tercet.errors import PeerDown, PeerMismatch, ProtocolViolation
from tercet.transfer.channel import Channel
from tercet.transfer.messages import Hello, Refuse
from tercet.transfer.transport import HANDSHAKE_S, MoverConfig, check_hello
from tercet.transfer.wires import listen_tcp, listen_unix

MAX_HELLO = 8192
MAX_CONNECTIONS = 1024


class Acceptor:
    """One thread a listener and one a connection, which calls `serve`; the connection is closed when that returns."""

    def __init__(self, config: MoverConfig, serve: Callable[[Channel, Hello], None]) -> None:
        self._config = config
        self._serve = serve
        self._lock = threading.Lock()
        self._listeners: list[socket.socket] = []
        self._num_connections = 0
        self._stopping = threading.Event()
        self._refused: Counter[str] = Counter()

    def listen(self, *hosts: str) -> tuple[str, list[str]]:
        """-> the address of a Unix socket, and a TCP address for each host."""
        listener, unix = listen_unix()
        found = [listen_tcp(host) for host in hosts]
        for each in (listener, *(listener for listener, _ in found)):
            self._listeners.append(each)
            threading.Thread(target=self._accept_loop, args=(each,), name="kv-accept", daemon=True).start()
        return unix, [address for _, address in found]

    def refused(self) -> Counter[str]:
        """Error code -> connections turned away or cut off for it."""
        with self._lock:
            return Counter(self._refused)

    def count_refused(self, code: str) -> None:
        with self._lock:
            self._refused[code] += 1

    def stop(self) -> None:
        """Let nobody in any more."""
        self._stopping.set()
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def _accept_loop(self, listener: socket.socket) -> None:
        while not self._stopping.is_set():
            try:
                sock, _ = listener.accept()
            except OSError:  # the listener is closed, or for now there is no descriptor left
                self._stopping.wait(0.1)
                continue
            with self._lock:
                full = self._num_connections >= MAX_CONNECTIONS
                self._num_connections += not full
            if full:
                self.count_refused("overloaded")
                sock.close()
            else:
                threading.Thread(target=self._greet, args=(Channel(sock),), name="kv-serve", daemon=True).start()

    def _greet(self, channel: Channel) -> None:
        """One connection, from its HELLO to its end."""
        try:
            channel.settimeout(HANDSHAKE_S)
            hello, _ = channel.receive(MAX_HELLO)
            if not isinstance(hello, Hello):
                raise ProtocolViolation(f"expected HELLO, got {type(hello).__name__}")
            check_hello(hello, self._config.token, self._config.fingerprint)
            self._serve(channel, hello)
        except (PeerDown, PeerMismatch, ProtocolViolation) as error:
            self.count_refused(error.code())
            if isinstance(error, PeerMismatch):
                with contextlib.suppress(PeerDown):
                    channel.send(Refuse(error.code(), str(error)))
        finally:
            channel.shutdown()
            channel.close()
            with self._lock:
                self._num_connections -= 1
