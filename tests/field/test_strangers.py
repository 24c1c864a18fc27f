"""Whatever a stranger sends to a decode worker's transfer port ends that connection, counted and by name."""

from __future__ import annotations

import random
import socket
import threading
from typing import Any

import msgpack
import pytest

from tercet import secret
from tercet.transfer.links.wires import dial_tcp
from tercet.transfer.protocol import messages, proof
from tercet.transfer.protocol.messages import HEADER, MAGIC, Hello
from tercet.transfer.transports.contract import Endpoint
from tests.movers import LAYOUT, Pair, Receiving, ticket_of


@pytest.fixture(scope="module")
def target():
    made = Receiving("tcp")
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def faults(monkeypatch) -> list[Any]:
    """What threads let out; nothing may."""
    seen: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    return seen


LAYOUT_FIELDS = [getattr(LAYOUT, name) for name in LAYOUT.__dataclass_fields__]
GOOD = [messages.VERSION, "stranger", "m", LAYOUT_FIELDS, "tcp", "", [], b"n" * 16, b"p" * 32]
ODD: list[Any] = [
    *(None, True, -1, 2**63, 2**64 - 1, 0.5, float("nan"), "", "\ud800", "x" * 5000, b"", b"\xff\xfe", b"\x80" * 300),
    *([], [[]], [None], {}, {"a": 1}, {b"\xff": 1}, [[[[[[[[]]]]]]]], msgpack.Timestamp(1), msgpack.ExtType(5, b"x")),
]


def frame(body: bytes, kind: type = Hello) -> bytes:
    return HEADER.pack(MAGIC, messages._KIND_OF[kind], len(body), 0) + body


def not_utf8(body: bytes) -> bytes:
    """The same message with text that is no UTF-8."""
    return body.replace(b"stranger", b"\xff\xfe\xfdanger")


def bodies() -> list[bytes]:
    packed = [not_utf8(msgpack.packb(GOOD)), msgpack.packb(GOOD)[:-5], b"\xc1", b"\xdd\xff\xff\xff\xff", b"\x91" * 4000]
    for at in range(len(GOOD)):
        for odd in ODD:
            values = [*GOOD[:at], odd, *GOOD[at + 1 :]]
            packed.append(msgpack.packb(values, unicode_errors="surrogatepass"))
    rng = random.Random(3)
    for _ in range(300):
        body = bytearray(msgpack.packb(GOOD))
        for _ in range(rng.randrange(1, 6)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        packed.append(bytes(body))
    return packed


def send(target: Receiving, raw: bytes) -> bytes:
    """-> all that comes back until the end."""
    answer = b""
    with dial_tcp(Endpoint.decode(target.endpoint).tcp[0], 5.0) as sock:
        sock.settimeout(10)
        try:
            sock.sendall(raw)
            sock.shutdown(socket.SHUT_WR)
            while piece := sock.recv(4096):
                answer += piece
        except ConnectionError:
            pass
    return answer


def test_no_hello_raises_into_the_log(target, faults):
    before = sum(target.mover.refused().values())
    sent = bodies()
    for body in sent:
        send(target, frame(body))
    assert faults == []
    assert sum(target.mover.refused().values()) - before == len(sent)
    assert set(target.mover.refused()) <= {"peer_mismatch", "protocol_violation", "peer_down"}
    served(target)


def test_no_other_first_message_raises_either(target, faults):
    for kind in messages._KINDS:
        for body in (b"", b"\x90", b"\xff", msgpack.packb(GOOD), msgpack.packb([b"\xff"] * 3)):
            send(target, frame(body, kind))
    assert faults == []
    served(target)


def test_the_secret_never_crosses_the_wire():
    """Neither end's bytes have it, nor anything that could be replayed: a second connection takes no old HELLO."""
    made = Receiving("tcp", token="a secret of the cluster")
    try:
        first = dial_tcp(Endpoint.decode(made.endpoint).tcp[0], 5.0)
        challenge = taken(first, messages.Challenge)
        bare = Hello(messages.VERSION, "prefill-0", "m", LAYOUT_FIELDS, "tcp", "", [], secret.nonce())
        hello = messages.encode(proof.signed(bare, "a secret of the cluster", challenge.nonce))
        first.sendall(hello)
        taken(first, messages.Welcome)
        answer = send(made, hello)  # replayed
        assert b"does not know this cluster's token" in answer
        assert b"a secret" not in hello + answer
        first.close()
    finally:
        made.stop()


def test_a_decode_worker_that_does_not_know_the_secret_is_not_written_to():
    """The challenge goes both ways: whoever took over the port gets no KV."""
    made = Pair("tcp", token="right")
    made.mover._config = made.mover._config.__class__(**(made.mover._config.__dict__ | {"token": "wrong"}))
    try:
        with pytest.raises(Exception, match="decode-0 does not know this cluster's token"):
            made.open(ticket_of(), 1)
    finally:
        made.stop()


def taken(sock: socket.socket, kind: type) -> Any:
    number, body, _ = messages.decode_header(sock.recv(HEADER.size, socket.MSG_WAITALL))
    message = messages.decode_body(number, sock.recv(body, socket.MSG_WAITALL))
    assert isinstance(message, kind), message
    return message


def served(target: Receiving) -> None:
    """The next peer is served."""
    made = Pair("tcp")
    made.mover.stop()
    made.mover, made.region, made.events, made.endpoint = target.mover, target.region, target.events, target.endpoint
    made.move(ticket_of(random.randrange(10**9)), [3], [1])
    made.sender.stop()
