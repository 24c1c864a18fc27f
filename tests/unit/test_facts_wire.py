"""Facts of a rank's mover on their way to rank 0."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tercet.core import Ticket
from tercet.errors import DigestMismatch, PeerDown, ProtocolViolation, TercetError, WorkerLost
from tercet.roles.facts_wire import error_of, fact_of, packed_fact
from tercet.transfer.protocol.facts import (
    Complete,
    Granted,
    Noted,
    OpDone,
    Quiesced,
    ReceiveFailed,
    Released,
    SendFailed,
)

TICKETS = st.builds(Ticket, st.text(), st.integers(0, 99), st.integers(0, 2**62))
ERRORS = st.builds(
    lambda kind, text: kind(text), st.sampled_from([PeerDown, DigestMismatch, WorkerLost, TercetError]), st.text()
)
SECONDS, COUNTS = st.floats(0, 1e6), st.integers(0, 2**62)
FACTS = st.one_of(
    st.builds(Granted, TICKETS, COUNTS),
    st.builds(SendFailed, TICKETS, ERRORS),
    st.builds(Released, TICKETS, COUNTS),
    st.builds(OpDone, TICKETS),
    st.builds(Noted, TICKETS, st.binary()),
    st.builds(Complete, TICKETS, COUNTS, SECONDS),
    st.builds(ReceiveFailed, TICKETS, ERRORS),
    st.builds(Quiesced, TICKETS, COUNTS),
)


@given(FACTS)
def test_a_fact_comes_over_as_it_was(event):
    found = fact_of(msgpack.unpackb(msgpack.packb(packed_fact(event)), use_list=True))
    assert type(found) is type(event)
    assert found.ticket == event.ticket
    if isinstance(event, SendFailed | ReceiveFailed):
        assert error_of(found.error) == error_of(event.error)
    else:
        assert found == event


@pytest.mark.parametrize("packed", [[], ["Granted"], ["Granted", ["r", 1], 2], ["Ticket", ["r", 1, 1]], [1, 2], "text"])
def test_what_is_no_fact_is_refused(packed):
    with pytest.raises(ProtocolViolation, match="no fact of a mover"):
        fact_of(packed)
