"""The handover's state machines under every interleaving that hypothesis can think of."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.core import Ticket
from tercet.errors import LeaseExpired, ProtocolViolation, TransferError
from tercet.transfer.memory.layout import KvLayout, Pair
from tercet.transfer.protocol import facts, inbound, outbound
from tercet.transfer.protocol.effects import Cut, Send
from tercet.transfer.protocol.fake import LAYERS, FakeLink
from tercet.transfer.protocol.incoming import Terms
from tercet.transfer.protocol.messages import (
    MAX_BODY,
    MAX_NOTE,
    Abort,
    AbortAck,
    Data,
    Grant,
    Heartbeat,
    Offer,
    Release,
    Resend,
    Written,
    encode,
)
from tercet.transfer.protocol.outgoing import Outgoing

TICKETS = [Ticket(f"r{n}", 0, 1) for n in range(3)]
SOURCE = {t: [10 * n, 10 * n + 1] for n, t in enumerate(TICKETS)}
DESTINATION = {t: [2 * n, 2 * n + 1] for n, t in enumerate(TICKETS)}


def run_to_end(link: FakeLink) -> None:
    """No more faults: deliver everything, then let leases run out, then prove the writer's end."""
    for _ in range(4):
        while choices := link.choices():
            choices[0]()
        link.pass_time(11.0, heartbeats=False)
    while choices := link.choices():
        choices[0]()
    link.prefill_dies()


def check_facts(link: FakeLink) -> None:
    """Each ticket ended once on each side, nothing is leased, nothing is read any more."""
    assert link.leased == {}
    assert link.reading == [{}]
    assert link.live() == []
    counts = Counter((type(e), e.ticket) for e in link.events)
    assert all(n == 1 for n in counts.values()), counts
    for ticket in TICKETS:
        received = {type(e) for e in link.events if e.ticket == ticket and isinstance(e, facts.ReceiveEvent)}
        if facts.Complete in received:
            assert received == {facts.Noted, facts.Complete}
        elif received:
            assert received - {facts.Noted} == {facts.ReceiveFailed, facts.Quiesced}


@pytest.mark.parametrize("one_sided", [True, False])
def test_without_faults_every_ticket_completes(one_sided):
    link = FakeLink(one_sided=one_sided)
    for ticket in TICKETS:
        link.admit(ticket, DESTINATION[ticket])
        link.open(ticket, SOURCE[ticket])
    while choices := link.choices():
        choices[0]()
    for ticket in TICKETS:
        for layer in range(LAYERS):
            link.push(ticket, layer)
        link.finish(ticket)
    while choices := link.choices():
        choices[0]()
    assert sum(isinstance(e, facts.Complete) for e in link.events) == 3
    assert sum(isinstance(e, facts.OpDone) for e in link.events) == 3
    check_facts(link)


def actions(link: FakeLink, pushed: dict[Ticket, int]) -> list:
    """What the workers may do now, as they would: compute after the grant, layer by layer, then say so."""
    moves = list(link.choices())
    for ticket in TICKETS:
        events = {type(e) for e in link.events if e.ticket == ticket}
        if facts.Granted in events and ticket in link.reading[0] and pushed.get(ticket, 0) <= LAYERS:
            moves.append(lambda t=ticket: advance(link, t, pushed))
    return moves


def advance(link: FakeLink, ticket: Ticket, pushed: dict[Ticket, int]) -> None:
    layer = pushed.get(ticket, 0)
    pushed[ticket] = layer + 1
    if layer < LAYERS:
        link.push(ticket, layer)
    else:
        link.finish(ticket)


FAULTS = ("cancel_inbound", "cancel_outbound", "drop", "duplicate", "pass_time", "death")


@settings(max_examples=600, deadline=None)
@given(
    one_sided=st.booleans(),
    faults=st.lists(st.tuples(st.sampled_from(FAULTS), st.integers(0, 60), st.integers(0, 1000)), max_size=8),
    choices=st.randoms(use_true_random=False),
)
def test_any_order_of_messages_and_faults_keeps_the_ledger(one_sided, faults, choices):
    """`faults` strike at given steps; in between, any of what may happen next does."""
    link = FakeLink(one_sided=one_sided)
    pushed: dict[Ticket, int] = {}
    starts = [lambda t=t: link.admit(t, DESTINATION[t]) for t in TICKETS]
    starts += [lambda t=t: link.open(t, SOURCE[t]) for t in TICKETS]
    for step in range(61):
        for name, when, number in faults:
            if when == step:
                strike(link, name, number)
        moves = actions(link, pushed) + starts
        if moves:
            move = choices.choice(moves)
            if move in starts:
                starts.remove(move)
            move()
    run_to_end(link)
    check_facts(link)


@settings(max_examples=100, deadline=None)
@given(one_sided=st.booleans(), choices=st.randoms(use_true_random=False))
def test_reordered_and_duplicated_messages_alone_fail_nothing(one_sided, choices):
    link = FakeLink(one_sided=one_sided)
    pushed: dict[Ticket, int] = {}
    for ticket in TICKETS:
        link.open(ticket, SOURCE[ticket])
        link.admit(ticket, DESTINATION[ticket])
    for _ in range(60):
        if choices.random() < 0.3:
            link.duplicate(choices.randrange(1000))
        if moves := actions(link, pushed):
            choices.choice(moves)()
    while moves := actions(link, pushed):
        moves[0]()
    assert sum(isinstance(e, facts.Complete) for e in link.events) == len(TICKETS)
    check_facts(link)


def strike(link: FakeLink, name: str, number: int) -> None:
    match name:
        case "death":
            (link.prefill_dies if number % 2 else link.decode_dies)()
        case "pass_time":
            link.pass_time(float(number % 12), heartbeats=number % 2 == 0)
        case "drop" | "duplicate":
            getattr(link, name)(number)
        case _:
            getattr(link, name)(TICKETS[number % 3])


PAIR = Pair(*[KvLayout(1, 8, 16, kv_heads=1, head_dim=8, dtype="float32")] * 2)
TERMS = Terms(PAIR, one_sided=True, fenceable=False)


def test_an_offer_that_fits_no_memory_fails_by_name():
    """The peer says how many units there are; nothing is allocated for more than were leased."""
    machine = inbound.Inbound(epoch=1, lease_s=1.0)
    machine.admit(TICKETS[0], 0, [3], now=0.0)
    effects = machine.on_message("peer", TERMS, Offer(TICKETS[0], 1 << 60), 0.0)
    assert [type(e) for e in effects] == [facts.ReceiveFailed, Send, facts.Quiesced]


def test_a_resend_before_the_grant_fails_by_name():
    machine = outbound.Outbound(lease_s=1.0)
    machine.open(TICKETS[0], {"peer": PAIR}, 16, deadline=9.0, now=0.0)
    effects = machine.on_message("peer", Resend(TICKETS[0], 1, 0, 0), 0.0)
    assert "before any was granted" in str(effects[0].error)
    assert machine.live() == []


@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("heads", [1, 8, 128])
def test_the_digests_of_the_largest_write_fit_its_message(block_size, heads):
    """However small a unit is: here a head's row has four bytes."""
    layout = KvLayout(4, 8, block_size, heads, 2, "bfloat16")
    pair = Pair(layout, layout)
    shard = Outgoing(TICKETS[0], "d", pair, 1 << 20, 1.0, outbound.MAX_LARGE_WRITE, 1.0, 1.0, 0.0)
    digests = bytes(8 * shard.most_units * heads)
    assert len(encode(Data(TICKETS[0], 0, 1, 0, shard.most_units, 0, False, digests))) < MAX_BODY


def test_a_note_is_bounded():
    Written(TICKETS[0], 0, 0.0, bytes(MAX_NOTE))
    with pytest.raises(ProtocolViolation, match="a note of 65537 bytes"):
        Written(TICKETS[0], 0, 0.0, bytes(MAX_NOTE + 1))


def written(num_bytes):
    return Written(TICKETS[0], num_bytes, 0.0, b"note")


def granted_outbound(lease_s=10.0):
    """Two units of one layer are granted, at the time 0."""
    machine = outbound.Outbound(lease_s)
    machine.open(TICKETS[0], {"peer": PAIR}, 32, deadline=99.0, now=0.0)
    machine.on_message("peer", Grant(TICKETS[0], 0, [5, 6]), 0.0)
    return machine


def granted_inbound(lease_s=10.0):
    machine = inbound.Inbound(epoch=1, lease_s=lease_s)
    machine.admit(TICKETS[0], 0, [5, 6], now=0.0)
    machine.on_message("peer", TERMS, Offer(TICKETS[0], 2), 0.0)
    return machine


def failure(effects):
    return next(e.error for e in effects if isinstance(e, facts.ReceiveFailed | facts.SendFailed))


@pytest.mark.parametrize("pushed", [[], [(0, [3])], [(1, [4])]])
def test_a_prefill_worker_ends_no_handover_that_is_not_whole(pushed):
    machine = granted_outbound()
    for first, blocks in pushed:
        machine.push(TICKETS[0], 0, first, blocks)
        machine.end_write("peer", machine.next_write("peer"), 0.0)
    error = failure(machine.finish(TICKETS[0], b"note", 0.0))
    assert isinstance(error, TransferError)
    assert f"{len(pushed) * PAIR.unit_bytes} KV bytes were written, {2 * PAIR.unit_bytes} were granted" in str(error)


@pytest.mark.parametrize("bytes_", [0, PAIR.unit_bytes, 3 * PAIR.unit_bytes])
def test_a_decode_worker_fails_a_written_that_is_not_whole_at_once(bytes_):
    error = failure(granted_inbound().on_message("peer", TERMS, written(bytes_), 0.0))
    assert f"{bytes_} KV bytes were written, {2 * PAIR.unit_bytes} were granted" in str(error)


def test_what_was_pushed_already_is_not_written_again():
    machine = granted_outbound()
    for blocks in ([3], [3], [3, 4]):
        machine.push(TICKETS[0], 0, 0, blocks)
    writes = [machine.next_write("peer"), machine.next_write("peer")]
    assert [(w.index, list(w.src.blocks)) for w in writes] == [(0, [3]), (1, [4])]
    assert machine.next_write("peer") is None


@pytest.mark.parametrize("side", ["prefill", "decode"])
@pytest.mark.parametrize("mark", [1, 0])  # what the peer's heartbeats say, again and again
def test_a_ticket_that_does_not_advance_fails_though_its_peer_lives(side, mark):
    machine = granted_outbound() if side == "prefill" else granted_inbound()
    terms = () if side == "prefill" else (TERMS,)
    effects = []
    for now in range(1, 40):
        machine.on_message("peer", *terms, Heartbeat([TICKETS[0]], [mark]), float(now))
        effects = machine.tick(float(now))
        if effects:
            break
    assert 10 < now <= 12
    error = failure(effects)
    assert isinstance(error, LeaseExpired)
    assert f"0 of {2 * PAIR.unit_bytes} KV bytes" in str(error)


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_ticket_that_advances_at_its_peer_lives_on(side):
    machine = granted_outbound() if side == "prefill" else granted_inbound()
    terms = () if side == "prefill" else (TERMS,)
    for now in range(1, 40):
        machine.on_message("peer", *terms, Heartbeat([TICKETS[0]], [now]), float(now))
        assert machine.tick(float(now)) == []


def test_a_ticket_that_waits_for_the_engine_advances_with_it():
    machine = granted_outbound()
    for now in range(1, 40):
        machine.on_message("peer", Heartbeat([TICKETS[0]], [0]), float(now))
        assert machine.tick(float(now), computed=now) == []
    marks = [e.message.marks for e in machine.heartbeats()]
    assert marks[0][0] > 30  # so the decode worker knows


def test_a_ticket_that_waits_for_a_busy_link_advances_with_it():
    """Another request's layers go first, for longer than a lease."""
    machine = granted_outbound()
    other = Ticket("urgent", 0, 1)
    machine.open(other, {"peer": PAIR}, 16 * 99, deadline=1.0, now=0.0)
    machine.on_message("peer", Grant(other, 0, list(range(10, 109))), 0.0)
    machine.push(TICKETS[0], 0, 0, [3, 4])
    for now in range(1, 40):
        machine.push(other, 0, now - 1, [7])
        machine.on_message("peer", Heartbeat([TICKETS[0], other], [0, now]), float(now))
        write = machine.next_write("peer")
        assert write.ticket == other
        assert machine.tick(float(now)) == []
        machine.end_write("peer", write, float(now))


def test_a_write_that_does_not_end_fails_its_ticket_and_is_then_cut_off():
    machine = granted_outbound()
    machine.push(TICKETS[0], 0, 0, [3, 4])
    write = machine.next_write("peer")
    seen = []
    for now in range(1, 40):
        machine.on_message("peer", Heartbeat([TICKETS[0]], [0]), float(now))
        seen += [(now, type(e)) for e in machine.tick(float(now), computed=now)]
    kinds = [kind for _, kind in seen]
    assert kinds[0] is facts.SendFailed
    assert Cut in kinds
    assert facts.OpDone not in kinds  # its source is still being read
    assert [type(e) for e in machine.end_write("peer", write, 40.0)] == [Send, facts.OpDone]


def test_a_unit_that_is_lost_fails_its_ticket_a_lease_after_the_written():
    machine = granted_inbound()
    machine.on_message("peer", TERMS, written(2 * PAIR.unit_bytes), 1.0)
    for now in (5.0, 10.0):
        machine.on_message("peer", TERMS, Heartbeat([TICKETS[0]], [1]), now)
    assert machine.tick(10.5) == []
    machine.on_message("peer", TERMS, Heartbeat([TICKETS[0]], [1]), 14.0)
    machine.on_message("peer", TERMS, Heartbeat([TICKETS[0]], [1]), 15.5)
    assert "has not advanced" in str(failure(machine.tick(15.5)))


# ---- several sources of one ticket


def part(**held):
    """Two layers of two heads, of which a worker holds `held`."""
    base = {"layers": 2, "blocks": 8, "block_size": 16, "kv_heads": 2, "head_dim": 8, "dtype": "float32"}
    return KvLayout(**(base | {"model_layers": 2} | held))


WHOLE = part()
LEFT, RIGHT = (part(tp_size=2, tp_rank=rank) for rank in (0, 1))
LOWER, UPPER = (part(layers=1, first_layer=first) for first in (0, 1))


def terms_of(layout, one_sided=True):
    return Terms(Pair(layout, WHOLE), one_sided, fenceable=False)


def opened_by(*layouts, sources=2, one_sided=True):
    """A ticket of one block, offered by each layout in turn. -> the machine and the effects of the last OFFER."""
    machine = inbound.Inbound(epoch=1, lease_s=10.0)
    effects = machine.admit(TICKETS[0], 0, [5], 0.0, sources)
    for number, layout in enumerate(layouts):
        effects = machine.on_message(number, terms_of(layout, one_sided), Offer(TICKETS[0], 1), 0.0)
    return machine, effects


def land(machine, number, layout, note=b""):
    """All that the source `number` has lands, and it says so."""
    pair = Pair(layout, WHOLE)
    data = Data(TICKETS[0], pair.layers.start, len(pair.layers), 0, 1, 0, False, b"")
    assert machine.begin_landing(number, data) is not None
    effects = machine.end_landing(number, data, np.ones((len(pair.layers), 1), dtype=bool), 1.0)
    message = Written(TICKETS[0], len(pair.layers) * pair.unit_bytes, 0.5, note)
    return effects + machine.on_message(number, terms_of(layout), message, 1.0)


@pytest.mark.parametrize("layouts", [(LEFT, RIGHT), (LOWER, UPPER), (UPPER, LOWER)])
def test_a_ticket_with_two_sources_is_complete_when_both_stand(layouts):
    machine, effects = opened_by(*layouts)
    assert effects == [Send(1, Grant(TICKETS[0], 0, [5]))]
    assert land(machine, 1, layouts[1]) == []
    effects = land(machine, 0, layouts[0], b"note")
    num_bytes = 2 * WHOLE.block_bytes
    assert effects == [
        facts.Noted(TICKETS[0], b"note"),
        facts.Complete(TICKETS[0], num_bytes, 0.5),
        Send(0, Release(TICKETS[0])),
        Send(1, Release(TICKETS[0])),
    ]
    assert machine.live() == []


@pytest.mark.parametrize(
    ("layouts", "named"),
    [
        ((LEFT, LEFT), "of layers 0 to 1, heads 0 to 0 come from several sources"),
        ((WHOLE, UPPER), "of layers 1 to 1, heads 0 to 1 come from several sources"),
        ((LOWER, part(layers=1, first_layer=1, tp_size=2)), "of layers 1 to 1, heads 1 to 1 come from no source"),
    ],
)
def test_sources_that_cannot_make_it_whole_fail_it_at_once_by_name(layouts, named):
    machine, effects = opened_by(*layouts)
    assert named in str(failure(effects))
    assert [e.peer for e in effects if isinstance(e, Send)] == [0, 1]  # an ABORT each
    assert machine.live() == TICKETS[:1]  # the first was granted
    assert facts.Quiesced(TICKETS[0]) in machine.on_message(0, TERMS, AbortAck(TICKETS[0]), 0.0)


def test_a_source_too_many_is_sent_away_by_name_and_hurts_nobody():
    machine, effects = opened_by(LEFT, RIGHT, WHOLE)
    ((peer, abort),) = [(e.peer, e.message) for e in effects]
    assert (peer, abort.reason) == (2, "2 sources of r0 are here already")
    land(machine, 0, LEFT, b"note")
    assert any(isinstance(e, facts.Complete) for e in land(machine, 1, RIGHT))


def test_a_source_that_never_comes_fails_the_ticket_by_name():
    machine, _ = opened_by(LEFT)
    for now in (4.0, 8.0, 12.0):
        machine.on_message(0, TERMS, Heartbeat([TICKETS[0]], [int(now)]), now)
    assert "no word of r0 from 1 of its 2 sources" in str(failure(machine.tick(12.0)))


def test_a_failed_ticket_is_quiet_when_every_source_is():
    machine, _ = opened_by(LEFT, RIGHT)
    effects = machine.peer_down(1)
    assert [(type(e.message), e.peer) for e in effects if isinstance(e, Send)] == [(Abort, 0), (Abort, 1)]
    assert machine.peer_dead(1) == []
    assert machine.heartbeats() == [effects[1]]  # only the source that may still write is asked again
    assert machine.on_message(0, TERMS, AbortAck(TICKETS[0]), 0.0) == [facts.Quiesced(TICKETS[0])]


def test_a_source_that_comes_to_a_failed_ticket_is_told_why():
    machine, _ = opened_by(LEFT)
    machine.cancel(TICKETS[0], TransferError("gone"))
    ((peer, abort),) = [(e.peer, e.message) for e in machine.on_message(1, terms_of(RIGHT), Offer(TICKETS[0], 1), 0.0)]
    assert (peer, abort.reason) == (1, "gone")
    assert machine.on_message(0, TERMS, AbortAck(TICKETS[0]), 0.0) == [facts.Quiesced(TICKETS[0])]


def test_two_notes_fail_the_ticket():
    machine, _ = opened_by(LEFT, RIGHT)
    land(machine, 0, LEFT, b"note")
    assert "two sources of r0 came with a note" in str(failure(land(machine, 1, RIGHT, b"another")))


def test_a_source_that_is_done_sees_the_other_one_advance():
    """Else it would fail the handover, though all that it waits for is a slow second half of the model."""
    machine, _ = opened_by(LOWER, UPPER)
    land(machine, 0, LOWER, b"note")
    marks = []
    for now in (4.0, 8.0, 12.0, 16.0):
        machine.on_message(1, TERMS, Heartbeat([TICKETS[0]], [int(now)]), now)
        machine.on_message(0, TERMS, Heartbeat([TICKETS[0]], [1]), now)
        assert machine.tick(now) == []
        marks.append({e.peer: e.message.marks[0] for e in machine.heartbeats()})
    assert [m[0] for m in marks] == sorted({m[0] for m in marks})
    assert len({m[1] for m in marks}) == 1  # its own word is no news to the second


def test_a_resumed_handover_counts_what_every_source_has_brought():
    machine, _ = opened_by(LEFT, RIGHT)
    land(machine, 0, LEFT)
    machine.peer_down(0)
    machine.peer_down(1)
    assert facts.Quiesced(TICKETS[0], 0) in machine.peer_dead(1)  # the other half of the block is not here
