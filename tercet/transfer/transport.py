"""What a transport must do for the mover, and the endpoint by which a decode worker is reached.

The receiver (decode side, one thread a connection) calls `listen`, then for each accepted socket `vet`, `greet`, and
for each DATA `land`. The sender (prefill side, writer thread) calls `dial`, `attach`, then `write` for each piece.
All raise PeerDown when the stream ends, ProtocolViolation on bytes that make no sense, PeerMismatch when the peer may
not be spoken to. `one_sided` says who places the bytes: if the writer does, only the writer's word or its proven
death can quiesce a ticket (transfer/inbound.py).
"""

from __future__ import annotations

import dataclasses
import hmac
import json
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from tercet.errors import PeerMismatch, ProtocolViolation
from tercet.transfer.channel import Channel
from tercet.transfer.layout import KvLayout
from tercet.transfer.messages import Data, Hello, Refuse, Welcome
from tercet.transfer.region import Region


@dataclass(frozen=True)
class Endpoint:
    """Where the mover of a decode worker listens; an opaque string to everybody else."""

    epoch: int
    host_id: str  # equal where shared memory reaches
    addresses: dict[str, str]  # transport name -> address

    def encode(self) -> str:
        return json.dumps([self.epoch, self.host_id, self.addresses])

    @classmethod
    def decode(cls, text: str) -> Endpoint:
        try:
            epoch, host_id, addresses = json.loads(text)
        except ValueError as error:
            raise PeerMismatch(f"no transfer endpoint: {text!r:.80}") from error
        return cls(epoch, host_id, addresses)


def host_id() -> str:
    """Equal in two processes exactly where an abstract Unix socket and a pidfd reach from one to the other."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return f"{boot}:{os.stat('/proc/self/ns/net').st_ino}:{os.stat('/proc/self/ns/pid').st_ino}:{os.getuid()}"


class Target:
    """A peer's cache as the writer sees it: its layout and, if the transport maps it, its memory."""

    def __init__(self, welcome: Welcome, memory: memoryview | None = None) -> None:
        self.layout = layout_of(welcome.layout)
        self.worker_id = welcome.worker_id
        self.epoch = welcome.epoch
        self.memory = memory


class Transport(ABC):
    name: str
    one_sided: bool

    @abstractmethod
    def listen(self, host: str) -> tuple[socket.socket, str]:
        """A listening socket and the address to give to peers."""

    @abstractmethod
    def vet(self, sock: socket.socket) -> int | None:
        """Check who connected. -> a pidfd by which its death is proven, if the transport needs one."""

    @abstractmethod
    def greet(self, channel: Channel, welcome: Welcome, region: Region) -> None:
        """Send WELCOME and whatever the writer needs to reach `region`."""

    @abstractmethod
    def land(self, channel: Channel, payload_bytes: int, region: Region, layer: int, blocks: Sequence[int]) -> None:
        """Place the payload of a DATA into `blocks`; nothing to do where the writer has placed it."""

    @abstractmethod
    def dial(self, address: str, timeout_s: float) -> socket.socket:
        """Connect to a listening peer."""

    @abstractmethod
    def attach(self, channel: Channel) -> Target:
        """Take the peer's WELCOME."""

    @abstractmethod
    def write(
        self, channel: Channel, target: Target, source: Region, data: Data, blocks: Sequence[int], dst: Sequence[int]
    ) -> None:
        """Move source `blocks` of `data.layer` to blocks `dst` of the target, and say so with `data`."""


def accept_welcome(message: object) -> Welcome:
    """The answer to our HELLO, or the error that it stands for."""
    match message:
        case Welcome():
            return message
        case Refuse(code, reason):
            raise PeerMismatch(f"the decode worker refused the connection: {code}: {reason}")
    raise ProtocolViolation(f"expected WELCOME, got {type(message).__name__}")


def hello_fault(hello: Hello, version: int, token: str, fingerprint: str, layout: KvLayout) -> PeerMismatch | None:
    """Why a peer that says `hello` may not write to us; None if it may."""
    if hello.version != version:
        return PeerMismatch(f"transfer protocol {hello.version} at {hello.worker_id}, {version} here")
    if not hmac.compare_digest(hello.token.encode(), token.encode()):
        return PeerMismatch("wrong cluster token")
    if hello.fingerprint != fingerprint:
        return PeerMismatch(f"{hello.worker_id} serves another model: {hello.fingerprint} there, {fingerprint} here")
    try:
        layout.require_same_blocks(layout_of(hello.layout))
    except PeerMismatch as error:
        return error
    return None


def layout_of(fields: Sequence[object]) -> KvLayout:
    """A peer's layout from its wire form; raises PeerMismatch unless every field is there with its type."""
    types = [str if f.type == "str" else int for f in dataclasses.fields(KvLayout)]
    if [type(value) for value in fields] != types:
        raise PeerMismatch(f"no KV layout: {fields!r:.200}")
    return KvLayout(*fields)  # type: ignore[arg-type]  # checked above
