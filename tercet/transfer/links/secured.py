"""TLS on a connected TCP socket, for code that speaks to plain sockets.

    channel <──socket pair──> pump (a thread) <──TLS over TCP──> the peer's pump <──socket pair──> channel

An SSL object takes no reader and writer at once, cannot fill several buffers in one call, and may hold back bytes that
no poll shows. So one thread has it to itself, and everybody else has a socket as ever: what it sends is in the kernel
when a call returns, and its end is seen at the other end, behind all that was sent before.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
import time

from tercet.errors import PeerDown, PeerMismatch
from tercet.tls import PeerTls
from tercet.transfer.links.wires import BUFFER, tune_tcp

PIECE = 1 << 18  # bytes that are taken at once from either side
LAST_S = 5.0  # for the last bytes to a peer that does not take them


def wrapped(sock: socket.socket, tls: PeerTls, *, dialled: bool) -> ssl.SSLSocket:
    """A connection before its handshake. It has the socket from now on. Raises PeerDown."""
    try:
        tune_tcp(sock)
        if dialled:
            return tls.client().wrap_socket(sock, do_handshake_on_connect=False, server_hostname=tls.name)
        return tls.server().wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
    except (OSError, ValueError) as error:  # it is gone already
        sock.close()
        raise PeerDown(f"the TLS handshake broke: {error}") from error


def secured(spoken: ssl.SSLSocket, tls: PeerTls) -> socket.socket:
    """The handshake, within the socket's timeout. -> a socket in place of this one, which is closed with it. Raises
    PeerDown, PeerMismatch; then it is closed."""
    timeout_s = spoken.gettimeout()
    try:
        spoken.do_handshake()
        if spoken.server_side:  # OpenSSL checks the name of servers only
            tls.check(spoken.getpeercert())
        ours, theirs = socket.socketpair()
    except BaseException as error:
        spoken.close()
        if isinstance(error, ssl.SSLCertVerificationError):
            raise PeerMismatch(f"the peer's certificate is refused: {error.verify_message}") from error
        if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            raise PeerMismatch(f"no TLS with the peer: {error.reason or error}") from error
        if isinstance(error, OSError):
            raise PeerDown(f"the TLS handshake broke: {error}") from error
        raise
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
    theirs.settimeout(timeout_s)
    threading.Thread(target=_Pump(spoken, ours).run, name="kv-tls", daemon=True).start()
    return theirs


class _Pump:
    """Both directions, until either side ends. Its thread alone uses it."""

    def __init__(self, spoken: ssl.SSLSocket, plain: socket.socket) -> None:
        self._spoken, self._plain = spoken, plain
        spoken.setblocking(False)
        plain.setblocking(False)
        self._out, self._in = memoryview(b""), memoryview(b"")  # on their way to the peer, and from it
        self._buffer = memoryview(bytearray(PIECE))  # of what comes
        self._deadline: float | None = None  # time.monotonic(), once our side will send no more
        self._blocked_by_write = False  # TLS waits for room in the kernel

    def run(self) -> None:
        with self._spoken, self._plain, contextlib.suppress(OSError):
            while self._deadline is None or (self._out and time.monotonic() < self._deadline):
                self._wait()
                self._from_peer()
                self._to_peer()
            self._say_goodbye()

    def _wait(self) -> None:
        if self._spoken.pending() and not self._in:
            return
        poll = select.poll()
        sends = self._blocked_by_write or bool(self._out)
        for sock, gives, takes in ((self._plain, not self._out, self._in), (self._spoken, not self._in, sends)):
            if events := (select.POLLIN if gives else 0) | (select.POLLOUT if takes else 0):
                poll.register(sock, events)
        poll.poll(None if self._deadline is None else LAST_S * 1000)

    def _from_peer(self) -> None:
        """Raises OSError at the end of either."""
        if not self._in:
            self._in = self._taken()
        if self._in:
            try:
                self._in = self._in[self._plain.send(self._in) :]
            except BlockingIOError:
                return
            except BrokenPipeError:  # our side has ended; what it sent before still goes out
                self._in = memoryview(b"")

    def _to_peer(self) -> None:
        if not self._out:
            with contextlib.suppress(BlockingIOError):
                self._out = memoryview(self._plain.recv(PIECE))
                if not self._out:
                    self._deadline = time.monotonic() + LAST_S
        if self._out:
            with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
                while self._out:  # TLS takes 16 KiB a call
                    self._out = self._out[self._spoken.send(self._out) :]

    def _taken(self) -> memoryview:
        """What has come; TLS gives 16 KiB a call."""
        self._blocked_by_write, filled = False, 0
        try:
            while filled < PIECE:
                count = self._spoken.recv_into(self._buffer[filled:])
                filled += count
                if not count:
                    break
        except ssl.SSLWantReadError:
            return self._buffer[:filled]
        except ssl.SSLWantWriteError:
            self._blocked_by_write = True
            return self._buffer[:filled]
        if not filled:
            raise ConnectionError("the peer has ended")
        return self._buffer[:filled]

    def _say_goodbye(self) -> None:
        """So that the peer can tell an end from a cut. What it still sends is not awaited."""
        with contextlib.suppress(ssl.SSLError):
            self._spoken.unwrap()
