"""Parts of a ticket that are heard as one, and parts of a destination that make it whole."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tercet.core import Ticket
from tercet.errors import PeerDown, PeerMismatch, TercetError
from tercet.transfer.memory.cover import flaw
from tercet.transfer.memory.layout import KvLayout, Pair
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
from tercet.transfer.protocol.shards import Cancel, ReceiveJoint, SendJoint

TICKET = Ticket("r0", 0, 1)
ERROR, LATER = TercetError("first"), PeerDown("later")


def heard(joint, *events):
    return [told for part, event in events for told in joint.take(part, event)]


def test_a_source_hears_of_its_destinations_as_of_one():
    joint = SendJoint("ab")
    assert heard(joint, ("b", Granted(TICKET, 3))) == []
    assert heard(joint, ("a", Granted(TICKET, 1))) == [Granted(TICKET, 1)]
    assert heard(joint, ("a", Released(TICKET, 5)), ("a", OpDone(TICKET))) == []
    assert heard(joint, ("b", Released(TICKET, 7)), ("b", OpDone(TICKET))) == [Released(TICKET, 12), OpDone(TICKET)]


def test_the_first_failure_of_a_destination_cancels_the_others_that_are_not_done():
    joint = SendJoint("abc")
    heard(joint, ("c", OpDone(TICKET)))
    assert heard(joint, ("b", SendFailed(TICKET, ERROR))) == [SendFailed(TICKET, ERROR), Cancel("a", ERROR)]
    assert heard(joint, ("a", SendFailed(TICKET, LATER)), ("a", OpDone(TICKET))) == []
    assert heard(joint, ("b", OpDone(TICKET))) == [OpDone(TICKET)]


def test_behind_a_failure_nothing_is_heard_but_the_end():
    """Other parts may have been granted, or have got the note, before they hear that they are given up."""
    joint = SendJoint("ab")
    heard(joint, ("a", Granted(TICKET, 0)), ("a", SendFailed(TICKET, ERROR)))
    late = Granted(TICKET, 0), SendFailed(TICKET, LATER), OpDone(TICKET)
    assert heard(joint, *(("b", event) for event in late), ("a", OpDone(TICKET))) == [OpDone(TICKET)]
    joint = ReceiveJoint("ab")
    heard(joint, ("a", ReceiveFailed(TICKET, ERROR)), ("a", Quiesced(TICKET, 1)))
    late = Noted(TICKET, b"x"), Complete(TICKET, 10, 0.1)
    assert heard(joint, *(("b", event) for event in late)) == [Quiesced(TICKET, 1)]


def test_a_group_is_complete_when_every_rank_is():
    joint = ReceiveJoint("ab")
    assert heard(joint, ("b", Noted(TICKET, b"x")), ("a", Noted(TICKET, b"x"))) == [Noted(TICKET, b"x")]
    assert heard(joint, ("b", Complete(TICKET, 10, 0.2))) == []
    assert heard(joint, ("a", Complete(TICKET, 20, 0.1))) == [Complete(TICKET, 30, 0.2)]


def test_a_group_is_quiet_when_every_rank_is_that_did_not_complete():
    joint = ReceiveJoint("abc")
    heard(joint, ("a", Complete(TICKET, 10, 0.1)))
    assert heard(joint, ("b", ReceiveFailed(TICKET, ERROR))) == [ReceiveFailed(TICKET, ERROR), Cancel("c", ERROR)]
    assert heard(joint, ("b", Quiesced(TICKET, 2)), ("c", ReceiveFailed(TICKET, LATER))) == []
    assert heard(joint, ("c", Quiesced(TICKET, 1))) == [Quiesced(TICKET, 1)]


@pytest.mark.parametrize(
    ("joint", "events"),
    [
        (SendJoint, [Granted(TICKET, 2), Released(TICKET), OpDone(TICKET)]),
        (SendJoint, [SendFailed(TICKET, ERROR), OpDone(TICKET)]),
        (ReceiveJoint, [Noted(TICKET, b"x"), Complete(TICKET, 10, 0.1)]),
        (ReceiveJoint, [ReceiveFailed(TICKET, ERROR), Quiesced(TICKET, 2)]),
    ],
)
def test_of_one_part_everything_is_heard_as_it_is(joint, events):
    assert heard(joint("a"), *(("a", event) for event in events)) == events


def part(**held: int) -> KvLayout:
    base = {"layers": 3, "model_layers": 4, "kv_heads": 4}
    return KvLayout(blocks=1, block_size=1, head_dim=1, dtype="int8", **(base | held))


PARTS = st.builds(
    lambda tp_size, rank, first, layers: part(
        tp_size=tp_size, tp_rank=rank % tp_size, first_layer=first, layers=min(layers, 4 - first)
    ),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(0, 7),
    st.integers(0, 3),
    st.integers(1, 4),
)


@given(sources=st.lists(PARTS, min_size=1, max_size=5), dst=PARTS, all_here=st.booleans())
def test_a_flaw_is_what_counting_finds(sources, dst, all_here):
    pairs = []
    for src in sources:
        try:
            pairs.append(Pair(src, dst))
        except PeerMismatch:  # nothing in common
            continue
    times = [
        sum(layer in pair.layers and head in pair.heads for pair in pairs)
        for layer, head in itertools.product(dst.window, dst.heads)
    ]
    if pairs:
        wrong = flaw(pairs, all_here)
        assert ("several sources" in (wrong or "")) == (max(times) > 1)
        assert (wrong is None) == (max(times) <= 1 and (min(times) == 1 or not all_here))
