"""The note of the first token: what comes from a peer is checked, and a bad one fails its ticket by name."""

from __future__ import annotations

import asyncio
from dataclasses import astuple, replace
from types import SimpleNamespace

import msgpack
import pytest

from tercet.core import Leg, SamplingParams, Ticket
from tercet.engine.sequence import Sequence
from tercet.errors import InvalidRequest, ProtocolViolation
from tercet.roles.decode import Decode, _Incoming
from tercet.roles.first_token import FirstToken
from tercet.roles.legs import Legs
from tercet.tracing import UNTRACED
from tercet.transfer.protocol.facts import Complete, Noted, Quiesced, ReceiveFailed

TICKET = Ticket("r0", 0, 1)
FIRST = FirstToken(42, -0.5, ((42, -0.5), (7, float("-inf"))), 3, (("queue", 0.1), ("prefill", 0.2)), "tcp")


@pytest.mark.parametrize("first", [FIRST, replace(FIRST, logprob=None, top_logprobs=())])
def test_a_note_comes_back_as_it_was(first):
    assert FirstToken.decode(first.encode()) == first


BAD = [
    *((at, value) for at in (0, 3) for value in (-1, True, 1.0, None, "1")),
    *((1, value) for value in (1, "x", float("nan"))),
    *(
        (2, value)
        for value in (None, [7], [[7]], [[-1, 0.5]], [[7, 1]], [[7, float("nan")]], [[7, 0.5, 1]], {"7": 0.5})
    ),
    *((4, value) for value in (1, None, {}, ["queue"], [["queue", 1]], [["queue", float("nan")]], [["nap", 0.1]])),
    *((4, value) for value in ([["queue", float("inf")]], [["queue", 0.1, 0.2]], [["queue", 0.1], ["queue", 0.1]])),
    *((4, [[stage, value]]) for stage, value in (("queue", -0.1), ("prefill", float("-inf")))),
    *((at, 2**32) for at in (0, 3)),
    (1, float("inf")),
    (2, [[7, float("inf")]]),
    (5, b"tcp"),
]


@pytest.mark.parametrize(("at", "value"), BAD)
def test_each_field_is_checked(at, value):
    fields = list(astuple(FIRST))
    fields[at] = value
    with pytest.raises(ProtocolViolation, match="no first token"):
        FirstToken.decode(msgpack.packb(fields))


@pytest.mark.parametrize(
    "note", [b"", b"\xc1", b"\x93\x01", msgpack.packb([1]), msgpack.packb({}), FIRST.encode() + b"x"]
)
def test_what_is_no_note_is_refused(note):
    with pytest.raises(ProtocolViolation, match="first token"):
        FirstToken.decode(note)


class Engine:
    def __init__(self) -> None:
        self.released: list[int] = []

    def check_ids(self, ids) -> None:
        if max(ids) > 99:
            raise InvalidRequest(f"token id {max(ids)} is outside")

    def quarantine(self, _) -> None: ...

    def release(self, _, verified: int = 0) -> None:
        self.released.append(verified)


@pytest.fixture
async def decode():
    made = Decode(Legs(asyncio.get_running_loop()))
    made.legs.engine, made.failed, made.cancelled = Engine(), [], []
    made.receiver = SimpleNamespace(cancel=lambda ticket, error: made.cancelled.append(error))
    leg = Leg(TICKET, "decode", (1,) * 16, 16, SamplingParams(), 60.0)
    stream = SimpleNamespace(failed=lambda _, error: made.failed.append(error), token=None)
    timer = SimpleNamespace(cancel=lambda: None)
    active = SimpleNamespace(
        leg=leg,
        ticket=TICKET,
        stream=stream,
        timer=timer,
        sequence=Sequence(TICKET, [1], 1, None),
        unseen={},
        span=UNTRACED,
    )
    made.legs._active[TICKET] = active
    made._incoming[TICKET] = _Incoming(active)
    return made


BAD_NOTES = [b"", b"junk", replace(FIRST, token_id=100).encode(), replace(FIRST, top_logprobs=((100, 0.0),)).encode()]


@pytest.mark.parametrize("note", BAD_NOTES[1:])
async def test_a_bad_note_cancels_its_handover(decode, note):
    decode._on_event(Noted(TICKET, note))
    (error,) = decode.cancelled
    assert isinstance(error, ProtocolViolation)
    decode._on_event(ReceiveFailed(TICKET, error))
    decode._on_event(Quiesced(TICKET, 2))
    assert decode.failed == [error]
    assert decode.engine.released == [2]


@pytest.mark.parametrize("note", BAD_NOTES)
async def test_a_handover_that_was_complete_already_ends_by_name_too(decode, note):
    if note:
        decode._on_event(Noted(TICKET, note))
    decode._on_event(Complete(TICKET, 64, 0.1))
    (error,) = decode.failed
    assert isinstance(error, ProtocolViolation)
    assert "first token" in str(error)
    assert decode.engine.released == [0]
    assert not decode.settling(TICKET)
