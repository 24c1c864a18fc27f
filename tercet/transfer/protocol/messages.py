"""Every message between a prefill and a decode worker's movers, and its frame on a stream.

    frame = magic "TCT5" | kind u8 | 3 zero bytes | body length u32 | payload length u64 | body (msgpack list) | payload

The body is the message's fields in order. Only DATA and PROBE have a payload. Bodies are bounded, types are checked,
and anything else raises ProtocolViolation: the connection is closed, nothing else happens.

    CHALLENGE D>P  the first message on every connection
    HELLO     P>D  who I am, what I speak              WELCOME   D>P  my layout, or REFUSE with a reason
    PROBE     P>D  bytes to measure a link by          PROBE_ACK D>P  they have landed
    OFFER     P>D  I have this request                 GRANT     D>P  write these blocks
    DATA      P>D  these bytes (have landed); digests  WRITTEN   P>D  that was all; a note for D's role
    RESEND    D>P  these have landed corrupt           RELEASE   D>P  all landed and verified
    REJECT    D>P  I will not take it                  HEARTBEAT both the tickets that I hold, and how far each is
    ABORT     both this ticket is over; from P it is proof that P writes no more
    ABORT_ACK P>D  proof that P writes no more
    GOODBYE   P>D  proof that P writes no more for any ticket of this connection

KV is counted in units (transfer/memory/layout.py). DATA and PROBE travel on a pair's data links, and a WRITTEN may
follow the last DATA there; all else travels on its control link.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

import msgpack

from tercet.core import Ticket
from tercet.errors import ProtocolViolation

VERSION = 5
MAGIC = b"TCT5"
HEADER = struct.Struct("<4sB3xIQ")
MAX_BODY = 1 << 20
MAX_DIGESTS = MAX_BODY // 16  # of one DATA, 8 bytes each
MAX_PAYLOAD = 1 << 32
MAX_NOTE = 1 << 16


@dataclass(frozen=True)
class Challenge:
    version: int
    nonce: bytes  # for the HELLO's proof (transfer/protocol/proof.py)


@dataclass(frozen=True)
class Hello:
    version: int
    worker_id: str
    fingerprint: str  # model
    layout: list[object]  # KvLayout, as its fields
    transport: str  # name of the one that the pair will use
    pair: str  # "": a new pair, this is its control link; else a data link of that pair
    quiet: list[str]  # earlier pairs of this process that are over: they write no more
    nonce: bytes  # for the WELCOME's proof
    proof: bytes = b""


@dataclass(frozen=True)
class Welcome:
    worker_id: str
    epoch: int
    layout: list[object]
    pair: str
    blob: bytes  # for the transport's other end
    proof: bytes = b""


@dataclass(frozen=True)
class Refuse:
    code: str  # tercet.errors
    reason: str


@dataclass(frozen=True)
class Probe:
    num_bytes: int


@dataclass(frozen=True)
class ProbeAck:
    num_bytes: int


@dataclass(frozen=True)
class Offer:
    ticket: Ticket
    num_units: int  # of the whole prompt


@dataclass(frozen=True)
class Grant:
    ticket: Ticket
    first_unit: int  # of the prompt, the first that is missing here
    blocks: list[int]  # destination blocks, from that unit on


@dataclass(frozen=True)
class Data:
    ticket: Ticket
    layer: int  # number in the model
    layers: int  # how many from that one on
    index: int  # first granted unit in this message
    count: int  # how many of them, in each layer
    resend: int  # number of the RESEND that asked for it, 0: none did
    packed: bool  # the bytes come in packed order (transfer/memory/pack.py), to be scattered
    digests: bytes  # u64 each, [layers, count, heads]; empty where integrity is off


@dataclass(frozen=True)
class Resend:
    ticket: Ticket
    number: int  # counts the RESENDs of this ticket to this source, so that duplicates are recognised
    layer: int
    index: int  # the granted unit


@dataclass(frozen=True)
class Written:
    ticket: Ticket
    num_bytes: int  # of the units that were written, each counted once
    transfer_s: float  # from the last push until the last write had ended
    note: bytes  # from the sending role to the receiving one; empty: none

    def __post_init__(self) -> None:
        if len(self.note) > MAX_NOTE:
            raise ProtocolViolation(f"a note of {len(self.note)} bytes is over the limit of {MAX_NOTE}")


@dataclass(frozen=True)
class Release:
    ticket: Ticket


@dataclass(frozen=True)
class Reject:
    ticket: Ticket
    reason: str


@dataclass(frozen=True)
class Abort:
    ticket: Ticket
    code: str
    reason: str


@dataclass(frozen=True)
class AbortAck:
    ticket: Ticket


@dataclass(frozen=True)
class Heartbeat:
    """A ticket that is named is live at the sender; if its mark has grown, it has advanced there."""

    tickets: list[Ticket]
    marks: list[int]  # one per ticket

    def __post_init__(self) -> None:
        if len(self.tickets) != len(self.marks):
            raise ProtocolViolation(f"Heartbeat names {len(self.tickets)} tickets and {len(self.marks)} marks")


@dataclass(frozen=True)
class Goodbye:
    reason: str


Message = (
    Challenge
    | Hello
    | Welcome
    | Refuse
    | Probe
    | ProbeAck
    | Offer
    | Grant
    | Data
    | Resend
    | Written
    | Release
    | Reject
    | Abort
    | AbortAck
    | Heartbeat
    | Goodbye
)
_KINDS: tuple[type[Message], ...] = get_args(Message)
_KIND_OF = {cls: number for number, cls in enumerate(_KINDS)}
_FIELDS = {cls: tuple(f.name for f in dataclasses.fields(cls)) for cls in _KINDS}
_HINTS = {cls: get_type_hints(cls) for cls in _KINDS}


def encode(message: Message, payload_bytes: int = 0) -> bytes:
    """Header and body of the frame; the caller sends `payload_bytes` after it."""
    cls = type(message)
    body: bytes = msgpack.packb([getattr(message, name) for name in _FIELDS[cls]])
    if len(body) > MAX_BODY:
        raise ProtocolViolation(f"{cls.__name__} of {len(body)} bytes is over the limit of {MAX_BODY}")
    return HEADER.pack(MAGIC, _KIND_OF[cls], len(body), payload_bytes) + body


def decode_header(header: bytes, max_body: int = MAX_BODY) -> tuple[int, int, int]:
    """-> (kind, body bytes, payload bytes)."""
    magic, kind, body, payload = HEADER.unpack(header)
    if magic != MAGIC:
        raise ProtocolViolation(f"not a Tercet transfer frame: it begins with {magic!r}")
    if kind >= len(_KINDS):
        raise ProtocolViolation(f"unknown message kind {kind}")
    if body > max_body:
        raise ProtocolViolation(f"a body of {body} bytes is over the limit of {max_body}")
    if payload > MAX_PAYLOAD or (payload and _KINDS[kind] not in (Data, Probe)):
        raise ProtocolViolation(f"a payload of {payload} bytes on {_KINDS[kind].__name__}")
    return kind, body, payload


def decode_body(kind: int, body: bytes) -> Message:
    """Rebuild a message; raises ProtocolViolation unless every field is there with its type."""
    cls = _KINDS[kind]
    try:
        values = msgpack.unpackb(body)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise ProtocolViolation(f"{cls.__name__} is no msgpack: {error}") from error
    names = _FIELDS[cls]
    if not isinstance(values, list) or len(values) != len(names):
        raise ProtocolViolation(f"{cls.__name__} must be a list of {len(names)} fields")
    checked: list[Any] = [_checked(cls, n, v) for n, v in zip(names, values, strict=True)]
    return cls(*checked)


def _checked(cls: type[Message], name: str, value: object) -> object:
    hint = _HINTS[cls][name]
    if hint is Ticket:
        return _ticket(value)
    if hint == list[Ticket] and isinstance(value, list):
        return [_ticket(v) for v in value]
    if _FITS[hint](value):
        return value
    raise ProtocolViolation(f"{cls.__name__}.{name} has the wrong type: {value!r:.80}")


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


_FITS: dict[object, Callable[[object], bool]] = {  # type of a field -> whether a value has it
    int: _is_count,
    float: lambda v: type(v) is float and 0 <= v < math.inf,
    str: lambda v: isinstance(v, str),
    bool: lambda v: isinstance(v, bool),
    bytes: lambda v: isinstance(v, bytes),
    list[int]: lambda v: isinstance(v, list) and all(map(_is_count, v)),
    list[str]: lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v),
    list[object]: lambda v: isinstance(v, list),
    list[Ticket]: lambda v: False,  # lists are handled before
}


def _ticket(value: object) -> Ticket:
    match value:
        case [str() as request_id, int() as attempt, int() as epoch] if attempt >= 0 and epoch >= 0:
            return Ticket(request_id, attempt, epoch)
    raise ProtocolViolation(f"no ticket: {value!r:.80}")
