"""Every message between a prefill and a decode worker's movers, and its frame on a stream.

    frame = magic "TCT1" | kind u8 | 3 zero bytes | body length u32 | payload length u64 | body (msgpack list) | payload

The body is the message's fields in order. Only DATA over TCP has a payload. Bodies are bounded, types are checked,
and what is no frame of ours raises ProtocolViolation: the connection is closed, nothing else happens.

    HELLO     P>D  who I am, what I speak              WELCOME   D>P  where I lie, or REFUSE with a reason
    OFFER     P>D  I have this request                 GRANT     D>P  write these blocks
    DATA      P>D  these bytes (have landed)           COMMIT    P>D  that was all; digest; first token
    RELEASE   D>P  all landed and verified             REJECT    D>P  I will not take it
    ABORT     both this ticket is over; from P it is proof that P writes no more
    ABORT_ACK P>D  proof that P writes no more         HEARTBEAT both the tickets that I hold
    GOODBYE   P>D  proof that P writes no more for any ticket of this connection
"""

from __future__ import annotations

import dataclasses
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple, get_type_hints

import msgpack

from tercet.errors import ProtocolViolation

VERSION = 1
MAGIC = b"TCT1"
HEADER = struct.Struct("<4sB3xIQ")
MAX_BODY = 1 << 20
MAX_PAYLOAD = 1 << 32


class Ticket(NamedTuple):
    """One attempt to hand the KV of one request to one incarnation of a decode worker."""

    request_id: str
    attempt: int
    epoch: int


@dataclass(frozen=True)
class Hello:
    version: int
    token: str  # the cluster's secret
    worker_id: str
    fingerprint: str  # model and dtype
    layout: list[object]  # KvLayout, as its fields


@dataclass(frozen=True)
class Welcome:
    worker_id: str
    epoch: int
    layout: list[object]


@dataclass(frozen=True)
class Refuse:
    code: str  # tercet.errors
    reason: str


@dataclass(frozen=True)
class Offer:
    ticket: Ticket
    num_blocks: int  # blocks of the whole prompt


@dataclass(frozen=True)
class Grant:
    ticket: Ticket
    first_block: int  # index in the prompt of the first block that is missing here
    blocks: list[int]  # destination block of each missing one


@dataclass(frozen=True)
class Data:
    ticket: Ticket
    layer: int
    index: int  # first granted block in this message
    count: int  # how many of them


@dataclass(frozen=True)
class Commit:
    ticket: Ticket
    num_bytes: int  # all bytes that were pushed under the ticket
    digest: int  # transfer/digest.py; 0 where integrity is off
    token_id: int  # the first token, sampled from the prompt's last logits
    logprob: float | None
    top_ids: list[int]
    top_logprobs: list[float]
    cached_tokens: int
    queue_s: float
    prefill_s: float
    transfer_s: float  # first token sampled until the last write had ended
    transport: str


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
    tickets: list[Ticket]


@dataclass(frozen=True)
class Goodbye:
    reason: str


Message = (
    Hello | Welcome | Refuse | Offer | Grant | Data | Commit | Release | Reject | Abort | AbortAck | Heartbeat | Goodbye
)
_KINDS: tuple[type[Message], ...] = (
    Hello,
    Welcome,
    Refuse,
    Offer,
    Grant,
    Data,
    Commit,
    Release,
    Reject,
    Abort,
    AbortAck,
    Heartbeat,
    Goodbye,
)
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
    if payload > MAX_PAYLOAD or (payload and _KINDS[kind] is not Data):
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
    if hint == list[int] and isinstance(value, list) and all(type(v) is int and v >= 0 for v in value):
        return value
    if hint == list[float] and isinstance(value, list) and all(isinstance(v, float) for v in value):
        return value
    if hint == list[object] and isinstance(value, list):
        return value
    if hint is int and type(value) is int and value >= 0:
        return value
    if hint in (float, float | None) and isinstance(value, float):
        return value
    if (hint is str and isinstance(value, str)) or (hint == float | None and value is None):
        return value
    raise ProtocolViolation(f"{cls.__name__}.{name} has the wrong type: {value!r:.80}")


def _ticket(value: object) -> Ticket:
    match value:
        case [str() as request_id, int() as attempt, int() as epoch] if attempt >= 0 and epoch >= 0:
            return Ticket(request_id, attempt, epoch)
    raise ProtocolViolation(f"no ticket: {value!r:.80}")
