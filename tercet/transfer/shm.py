"""Shared memory on one host: the writer maps the decode worker's cache (a memfd passed over an abstract Unix socket)
and copies into it; DATA says what has landed.

Copies: one, source cache to destination cache. Cancel: the receiver cannot fence a mapping, so a granted ticket is
quiesced by the writer's word (ABORT, ABORT_ACK, COMMIT, GOODBYE) or by its death, proven by a pidfd that was opened
while the connection stood. Waits block in the kernel; nobody polls.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import uuid
from collections.abc import Sequence

from tercet.errors import PeerDown, PeerMismatch, ProtocolViolation
from tercet.transfer.channel import Channel
from tercet.transfer.layout import plan
from tercet.transfer.messages import Data, Welcome
from tercet.transfer.region import Region
from tercet.transfer.transport import Target, Transport, accept_welcome

UCRED = struct.Struct("3i")  # pid, uid, gid


class ShmTransport(Transport):
    name = "shm"
    one_sided = True

    def listen(self, host: str) -> tuple[socket.socket, str]:
        address = f"tercet-{uuid.uuid4().hex}"
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind("\0" + address)  # abstract: no file to leave behind
        sock.listen(64)
        return sock, address

    def vet(self, sock: socket.socket) -> int | None:
        pid, uid, _ = UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
        if uid != os.getuid():
            raise PeerMismatch(f"a process of user {uid} may not map the KV cache of user {os.getuid()}")
        if pid == 0:
            raise PeerMismatch("the peer lives in another PID namespace, so its death could not be proven")
        try:
            return os.pidfd_open(pid)
        except ProcessLookupError as error:
            raise PeerDown(f"process {pid} is gone already") from error

    def greet(self, channel: Channel, welcome: Welcome, region: Region) -> None:
        channel.send(welcome, fds=[region.fd])

    def land(self, channel: Channel, payload_bytes: int, region: Region, layer: int, blocks: Sequence[int]) -> None:
        if payload_bytes:
            raise ProtocolViolation("DATA over shared memory carries no bytes")

    def dial(self, address: str, timeout_s: float) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(timeout_s)
        try:
            sock.connect("\0" + address)
        except OSError as error:
            sock.close()
            raise PeerDown(f"no transfer connection to shm:{address}: {error}") from error
        return sock

    def attach(self, channel: Channel) -> Target:
        message, fds = channel.receive_with_fds()
        try:
            welcome = accept_welcome(message)
            if len(fds) != 1:
                raise ProtocolViolation(f"WELCOME over shared memory carries {len(fds)} descriptors, not 1")
            target = Target(welcome)
            target.memory = _map(fds[0], target.layout.total_bytes)
            return target
        finally:
            for fd in fds:
                os.close(fd)

    def write(
        self, channel: Channel, target: Target, source: Region, data: Data, blocks: Sequence[int], dst: Sequence[int]
    ) -> None:
        assert target.memory is not None
        for run in plan(source.layout, target.layout, data.layer, list(zip(blocks, dst, strict=True))):
            target.memory[run.dst : run.dst + run.length] = source.view[run.src : run.src + run.length]
        channel.send(data)


def _map(fd: int, num_bytes: int) -> memoryview:
    try:
        return memoryview(mmap.mmap(fd, num_bytes))
    except (OSError, ValueError) as error:
        raise ProtocolViolation(f"the peer's KV cache cannot be mapped: {error}") from error
