"""The sockets of links: TCP anywhere, abstract Unix sockets within one host."""

from __future__ import annotations

import os
import socket
import struct
import uuid
from urllib.parse import urlsplit

from tercet.errors import PeerDown, PeerMismatch

USER_TIMEOUT_MS = 5_000  # for unacknowledged data: then the peer counts as gone; the kernel's limit is 15 minutes
KEEPALIVE_S = (2, 1, 3)  # idle, interval, probes: the like for a silent connection
BUFFER = 1 << 20  # kernel buffer in bytes, each way
UCRED = struct.Struct("3i")  # pid, uid, gid


def host_id() -> str:
    """Equal in two processes of one user that reach each other by abstract Unix sockets and pidfds."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return f"{boot}:{os.stat('/proc/self/ns/net').st_ino}:{os.stat('/proc/self/ns/pid').st_ino}:{os.getuid()}"


def listen_tcp(host: str) -> tuple[socket.socket, str]:
    """host: an address, with `:port` or without, for a free port."""
    name, wanted = _split(host)
    family = socket.AF_INET6 if ":" in name else socket.AF_INET
    sock = socket.create_server((name, wanted), family=family, backlog=64)
    bound, port = sock.getsockname()[:2]
    return sock, f"[{bound}]:{port}" if family == socket.AF_INET6 else f"{bound}:{port}"


def dial_tcp(address: str, timeout_s: float) -> socket.socket:
    try:
        sock = socket.create_connection(_split(address), timeout=timeout_s)
    except OSError as error:
        raise PeerDown(f"no transfer connection to {address}: {error}") from error
    tune_tcp(sock)
    return sock


def _split(address: str) -> tuple[str, int]:
    """host, host:port, [IPv6]:port or an IPv6 alone; port 0 if it names none."""
    if address.count(":") > 1 and not address.startswith("["):
        return address, 0
    found = urlsplit(f"//{address}")
    return found.hostname or "", found.port or 0


def tune_tcp(sock: socket.socket) -> None:
    """Of a Unix socket, which may stand before TLS, there is nothing to tune."""
    if sock.family == socket.AF_UNIX:
        return
    idle, interval, probes = KEEPALIVE_S
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, probes),
        (socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER),
        (socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER),
    ):
        sock.setsockopt(level, option, value)


def listen_unix() -> tuple[socket.socket, str]:
    address = f"tercet-{uuid.uuid4().hex}"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind("\0" + address)  # abstract: no file to leave behind
    sock.listen(64)
    return sock, address


def dial_unix(address: str, timeout_s: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(timeout_s)
    try:
        sock.connect("\0" + address)
    except OSError as error:
        sock.close()
        raise PeerDown(f"no transfer connection to unix:{address}: {error}") from error
    return sock


def vet_unix(sock: socket.socket) -> int:
    """-> a pidfd of the process that connected, to prove its death. Raises PeerMismatch for another user's process."""
    pid, uid, _ = UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
    if uid != os.getuid():
        raise PeerMismatch(f"a process of user {uid} may not map the KV cache of user {os.getuid()}")
    if pid == 0:
        raise PeerMismatch("the peer lives in another PID namespace, so its death could not be proven")
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError as error:
        raise PeerDown(f"process {pid} is gone already") from error
