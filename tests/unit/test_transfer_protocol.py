"""The handover's state machines under every interleaving that hypothesis can think of."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.transfer import inbound, outbound
from tercet.transfer.effects import Send
from tercet.transfer.fake import LAYERS, FakeLink
from tercet.transfer.layout import KvLayout, Pair
from tercet.transfer.messages import Commit, Offer, Resend, Ticket

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
    link.decode_dies()


def check_facts(link: FakeLink) -> None:
    """Each ticket ended once on each side, nothing is leased, nothing is read any more."""
    assert link.leased == {}
    assert link.reading == {}
    assert link.inbound.live() == link.outbound.live() == []
    counts = Counter((type(e).__module__, type(e).__name__, e.ticket) for e in link.events)
    assert all(n == 1 for n in counts.values()), counts
    for ticket in TICKETS:
        received = {type(e) for e in link.events if e.ticket == ticket and type(e).__module__ == inbound.__name__}
        if inbound.Complete in received:
            assert received == {inbound.Committed, inbound.Complete}
        elif received:
            assert received - {inbound.Committed} == {inbound.Failed, inbound.Quiesced}


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
        link.commit(ticket)
    while choices := link.choices():
        choices[0]()
    assert sum(isinstance(e, inbound.Complete) for e in link.events) == 3
    assert sum(isinstance(e, outbound.OpDone) for e in link.events) == 3
    check_facts(link)


def actions(link: FakeLink, pushed: dict[Ticket, int]) -> list:
    """What the workers may do now, as they would: compute after the grant, layer by layer, then commit."""
    moves = list(link.choices())
    for ticket in TICKETS:
        events = {type(e) for e in link.events if e.ticket == ticket}
        if outbound.Granted in events and ticket in link.reading and pushed.get(ticket, 0) <= LAYERS:
            moves.append(lambda t=ticket: advance(link, t, pushed))
    return moves


def advance(link: FakeLink, ticket: Ticket, pushed: dict[Ticket, int]) -> None:
    layer = pushed.get(ticket, 0)
    pushed[ticket] = layer + 1
    if layer < LAYERS:
        link.push(ticket, layer)
    else:
        link.commit(ticket)


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
    assert sum(isinstance(e, inbound.Complete) for e in link.events) == len(TICKETS)
    check_facts(link)


def strike(link: FakeLink, name: str, number: int) -> None:
    match name:
        case "death":
            link.prefill_dies()
            link.decode_dies()
        case "pass_time":
            link.pass_time(float(number % 12), heartbeats=number % 2 == 0)
        case "drop" | "duplicate":
            getattr(link, name)(number)
        case _:
            getattr(link, name)(TICKETS[number % 3])


PAIR = Pair(*[KvLayout(1, 8, 16, kv_heads=1, head_dim=8, dtype="float32")] * 2)
TERMS = inbound.Terms(PAIR, one_sided=True, fenceable=False)


def test_an_offer_that_fits_no_memory_fails_by_name():
    """The peer says how many units there are; nothing is allocated for more than were leased."""
    machine = inbound.Inbound(epoch=1, lease_s=1.0)
    machine.admit(TICKETS[0], 0, [3], now=0.0)
    effects = machine.on_message("peer", TERMS, Offer(TICKETS[0], 1 << 60), 0.0)
    assert [type(e) for e in effects] == [inbound.Failed, Send, inbound.Quiesced]


def test_a_resend_before_the_grant_fails_by_name():
    machine = outbound.Outbound(lease_s=1.0)
    machine.open(TICKETS[0], "peer", PAIR, 16, deadline=9.0, now=0.0)
    effects = machine.on_message("peer", Resend(TICKETS[0], 1, 0, 0), 0.0)
    assert "before any was granted" in str(effects[0].error)
    assert machine.live() == []


def test_a_commit_whose_top_tokens_do_not_match_fails_by_name():
    machine = inbound.Inbound(epoch=1, lease_s=1.0)
    machine.admit(TICKETS[0], 0, [3], now=0.0)
    machine.on_message("peer", TERMS, Offer(TICKETS[0], 1), 0.0)
    commit = Commit(TICKETS[0], 0, 1, None, [5, 6], [-0.5], 0, 0.0, 0.0, 0.0, "")
    assert isinstance(machine.on_message("peer", TERMS, commit, 0.0)[0], inbound.Failed)
