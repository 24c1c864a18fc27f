"""What a server needs to listen: how many connections its files allow, its address in words, why it cannot."""

from __future__ import annotations

import errno
import ipaddress
import os
import resource
import socket
from contextlib import suppress

from tercet.errors import ClusterError

SPARE_FILES = 256  # descriptors reserved for everything else; asyncio accepts 100 at a time before one is closed
MOST_FILES = 65536  # what is asked of the system; more would serve nobody
FEWEST = 16  # connections, however few files there may be
EVERYWHERE = "::"


def most_connections(wanted: int) -> int:
    """`wanted`, or what the process may open beside what it has open already. Raises its soft limit if it can."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ceiling = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < ceiling:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (ceiling, hard))
            soft = ceiling
    if soft == resource.RLIM_INFINITY:
        return wanted
    room = soft - len(os.listdir("/proc/self/fd")) - SPARE_FILES
    return min(wanted, max(FEWEST, room))


def listen_error(host: str, port: int, error: OSError, setting: str = "") -> ClusterError:
    """An OSError of `listen`, by what is wrong. setting: the spec's key of host and port, if it has one."""
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        hint = f"; set {setting}.host" if setting else ""
        return ClusterError(f"{host} is no address of this machine ({error.strerror}){hint}")
    what = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be opened ({error})"
    hint = f"free it or set {setting}.port" if setting else "a free one is needed"
    return ClusterError(f"port {port} on {host} {what}; {hint}")


def is_loopback(host: str) -> bool:
    """Whether nobody outside this machine reaches it; by what a name stands for here, if it is one."""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(each).is_loopback for each in found)


def address(host: str, port: int) -> str:
    """host:port, with the brackets that IPv6 needs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
