"""What the mover requires of a transport, and the endpoint by which a decode worker is reached.

Two workers are a *pair*: one control link for messages, and data links that carry DATA. A data link has two ends:

    Inlet   decode side, used by that link's reader thread:   land, again and again; fence and close at its end
    Outlet  prefill side, used by that link's writer thread:  write, again and again; close at its end

Both are made during the link's handshake; the WELCOME carries the inlet's `blob` to the outlet. All methods raise
PeerDown when the link breaks and ProtocolViolation on invalid input. `one_sided`: the writer places the bytes, so only
its word, its proven death or a fence can quiesce a ticket (transfer/protocol/incoming.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from tercet.errors import PeerDown, PeerMismatch, ProtocolViolation, SpecError, TercetError
from tercet.tls import PeerTls
from tercet.transfer.links.channel import Channel
from tercet.transfer.memory.device import DeviceRegion, KvRegion, Mark
from tercet.transfer.memory.layout import KvLayout, Pair, Run
from tercet.transfer.memory.pack import Memory
from tercet.transfer.memory.region import Region
from tercet.transfer.protocol import proof
from tercet.transfer.protocol.messages import VERSION, Challenge, Data, Hello, Probe, Refuse, Welcome

HANDSHAKE_S = 5.0
STOP_S = 2.0  # how long the end of a mover waits for its threads


@dataclass(frozen=True)
class MoverConfig:
    """What a sender or a receiver is configured with."""

    worker_id: str
    fingerprint: str
    token: str
    lease_s: float
    heartbeat_s: float
    integrity: bool
    links: int | None = None  # data links of a pair; None: as many as the transport has by default
    convert: bool = False  # a lossy change of dtype is allowed
    tls: PeerTls | None = None  # of all connections that leave the host


@dataclass(frozen=True)
class Endpoint:
    """Where the mover of a decode worker listens; an opaque string to everybody else."""

    worker_id: str
    epoch: int
    host_id: str  # equal in two processes that can share memory
    unix: str  # address of the Unix socket
    tcp: list[str]  # one address per network interface
    transports: list[str]  # names of those it has

    def encode(self) -> str:
        return json.dumps(dataclasses.astuple(self))

    @classmethod
    def decode(cls, text: str) -> Endpoint:
        try:
            worker_id, epoch, host, unix, tcp, transports = json.loads(text)
        except (ValueError, TypeError) as error:
            raise PeerMismatch(f"no transfer endpoint: {text!r:.80}") from error
        return cls(worker_id, epoch, host, unix, tcp, transports)


@dataclass(frozen=True)
class Parcel:
    """The bytes of one DATA or PROBE on their way out."""

    message: Data | Probe
    source: Memory | int  # the cache; or a packed buffer; or the address of a cache in a GPU's memory
    runs: Sequence[Run]  # from `source` into the destination's memory, in the order in which a stream carries them
    scatter: Callable[[Memory], None] | None = None  # packed: puts the buffer into a destination that is mapped here
    after: Sequence[Mark] = ()  # in a GPU's memory: the work that the bytes come from, which may not have ended

    @property
    def views(self) -> list[memoryview]:
        assert isinstance(self.source, memoryview)
        return [self.source[at : at + size] for at, _, size in self.runs]


class Inlet(ABC):
    """The decode worker's end of a data link."""

    blob: bytes = b""  # for the WELCOME
    fds: Sequence[int] = ()  # likewise
    death_fd: int | None = None  # readable when the writer's process is dead

    def connected(self) -> None:  # noqa: B027  # most need nothing
        """The WELCOME has been sent; do the part of the setup that takes both ends."""

    @abstractmethod
    def land(self, channel: Channel, payload: int, views: Sequence[memoryview]) -> None:
        """Place the bytes of a DATA in `views`; `payload` bytes of them follow on the channel."""

    def pass_over(self, channel: Channel, payload: int, num_bytes: int) -> None:
        """Skip the bytes of a DATA, which must not be placed: `num_bytes` in all, `payload` of them on the channel."""
        channel.discard(payload)

    @abstractmethod
    def fence(self) -> bool:
        """Close this end. True: no write of the peer can land any more. Idempotent."""


class Outlet(ABC):
    """The prefill worker's end of a data link."""

    @abstractmethod
    def write(self, channel: Channel, parcel: Parcel) -> None:
        """Move the parcel and send its message. When this returns, its source may be reused and none of it will be
        written later."""

    def close(self) -> None:  # noqa: B027  # most hold nothing
        """Release the peer's memory and what the library holds."""


@dataclass(frozen=True)
class LinkContext:
    """What a transport gets to make one end of a link."""

    channel: Channel
    region: KvRegion
    timeout_s: float  # how long to wait for a silent peer: the lease
    blob: bytes = b""  # the other end's
    fds: Sequence[int] = field(default=())

    @property
    def host_region(self) -> Region:
        assert isinstance(self.region, Region), "see refuse_other_memory"
        return self.region

    @property
    def device_region(self) -> DeviceRegion:
        assert isinstance(self.region, DeviceRegion), "see refuse_other_memory"
        return self.region

    @property
    def is_local(self) -> bool:
        """Whether the link is over loopback, so that sockets which a library opens besides may be, too."""
        return self.channel.sock.getsockname()[0] in ("127.0.0.1", "::1")


class Transport(ABC):
    name: ClassVar[str]
    one_sided: ClassVar[bool] = False
    fenceable: ClassVar[bool] = True
    takes_tls: ClassVar[bool] = False  # all its bytes go over the link's channel
    one_host: ClassVar[bool] = False  # reaches only within one host, over Unix sockets
    in_device_memory: ClassVar[bool] = False  # moves KV between GPUs' memories; else between those of hosts
    pack_below: ClassVar[float] = 4096  # mean bytes of a run below which units are gathered, sent once and scattered
    packs: ClassVar[bool] = True  # can send packed at all
    links: ClassVar[int] = 1  # data links of a pair, by default

    @classmethod
    def missing(cls) -> str | None:
        """Why it cannot be used here, and what to install; None if it can."""
        return None

    @abstractmethod
    def inlet(self, context: LinkContext) -> Inlet: ...

    @abstractmethod
    def outlet(self, context: LinkContext) -> Outlet: ...


def accept_challenge(message: object) -> bytes:
    """-> the nonce to answer. Raises PeerMismatch, ProtocolViolation."""
    match message:
        case Challenge(version, nonce) if version == VERSION:
            return nonce
        case Challenge(version):
            raise PeerMismatch(f"transfer protocol {version} at the decode worker, {VERSION} here")
    raise ProtocolViolation(f"expected CHALLENGE, got {type(message).__name__}")


def accept_welcome(message: object, secret: str, nonce: bytes) -> Welcome:
    """-> the WELCOME that answers our HELLO. Raises PeerMismatch, ProtocolViolation."""
    match message:
        case Welcome():
            proof.check(message, secret, nonce)
            return message
        case Refuse(code, reason):
            raise PeerMismatch(f"the decode worker refused the connection: {code}: {reason}")
    raise ProtocolViolation(f"expected WELCOME, got {type(message).__name__}")


def check_hello(hello: Hello, secret: str, nonce: bytes, fingerprint: str) -> None:
    """Raises PeerMismatch unless the sender of `hello`, which answers our `nonce`, may write to us."""
    if hello.version != VERSION:
        raise PeerMismatch(f"transfer protocol {hello.version} at {hello.worker_id}, {VERSION} here")
    proof.check(hello, secret, nonce)
    if hello.fingerprint != fingerprint:
        raise PeerMismatch(f"{hello.worker_id} serves another model: {hello.fingerprint} there, {fingerprint} here")


def refuse_other_memory(transports: Sequence[Transport], region: KvRegion) -> None:
    """Raises SpecError for a transport that cannot read and write the memory in which this worker's KV lies."""
    on_device = isinstance(region, DeviceRegion)
    for transport in transports:
        if transport.in_device_memory != on_device:
            ours, theirs = ("a GPU's memory", "host memory") if on_device else ("host memory", "a GPU's memory")
            raise SpecError(f"transfer.transport: {transport.name} moves KV in {theirs}, and here it lies in {ours}")


def pair_of(
    src: Sequence[object] | KvLayout, dst: Sequence[object] | KvLayout, transport: Transport, convert: bool
) -> Pair:
    """The pair of two layouts, if the transport can move KV between them. Raises PeerMismatch."""
    ours, theirs = (side if isinstance(side, KvLayout) else layout_of(side) for side in (src, dst))
    pair = Pair(ours, theirs, convert)
    if pair.converts and not transport.packs:
        raise PeerMismatch(f"{transport.name} cannot change the dtype on the way; use tcp or shm")
    return pair


def layout_of(fields: Sequence[object]) -> KvLayout:
    """A peer's layout from its wire form; raises PeerMismatch unless every field is there with its type."""
    types = [{"str": str, "int": int, "float": float}[str(f.type)] for f in dataclasses.fields(KvLayout)]
    if [type(value) for value in fields] != types:
        raise PeerMismatch(f"no KV layout: {fields!r:.200}")
    return KvLayout(*fields)  # type: ignore[arg-type]  # checked above


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turn what a transfer library raises into PeerDown, which ends the pair; its errors tell no more than that."""
    try:
        yield
    except TercetError:
        raise
    except Exception as error:
        raise PeerDown(f"{what}: {error}") from error
