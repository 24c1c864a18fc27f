"""What the transfer conformance suite asks of a sender and a receiver, asked of groups of them: one ticket, several
sources and destinations, whole when every part stands. What ends a ticket before is in test_group_ends.py."""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import replace

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tercet.core import Ticket
from tercet.errors import DigestMismatch, TercetError
from tercet.transfer.protocol import facts
from tercet.transfer.protocol.incoming import Source
from tercet.transfer.transports.group_endpoint import meets
from tests.group_movers import COMBINATIONS, MARK, SHAPES, GroupPair, eventually
from tests.group_ranks import WHOLE
from tests.integration.test_transfer_conformance import (  # noqa: F401  # the same behaviours, of the pair below
    test_cancel_at_the_receiver_is_proven_by_the_sender,
    test_cancel_at_the_sender_fails_and_quiesces_the_receiver,
    test_full_prefix_hit_moves_no_byte,
    test_goodbye_quiesces_everything,
    test_offer_before_admission_is_granted_at_admission,
    test_stale_epoch_is_rejected,
)
from tests.movers import EPOCH, NOTE, flipping, ticket_of

each = pytest.mark.parametrize(("name", "shape"), COMBINATIONS)


@pytest.fixture(params=[pytest.param(each.values, marks=each.marks, id="-".join(each.values)) for each in COMBINATIONS])
def pair(request):
    name, shape = request.param
    made = GroupPair(name, *SHAPES[shape])
    yield made
    made.stop()


@pytest.fixture
def group():
    """Makes one."""
    made: list[GroupPair] = []

    def make(name: str, shape: str, **changes: object) -> GroupPair:
        made.append(GroupPair(name, *SHAPES[shape], **changes))
        made[0].wipe(MARK)
        return made[0]

    yield make
    for one in made:
        one.stop()


@each
@pytest.mark.parametrize("integrity", [True, False])
@pytest.mark.parametrize("links", [1, 2])
def test_every_byte_stands_where_the_oracle_says_and_nothing_else_changed(group, name, shape, integrity, links):
    """Prompts with a half block at their end, and with hits of which the source has more or less."""
    made = group(name, shape, integrity=integrity, links=links)
    source = [3, 6, 7, 0, 5]
    for number, (tokens, first, blocks) in enumerate(
        [(37, 0, [5, 2, 7, 1, 4]), (24, 1, [4, 0]), (5, 0, [3]), (16, 2, [])]
    ):
        for attempt in (0, 1):  # of other replicas, if there are any
            made.hand_over(Ticket(f"r{number}", attempt, EPOCH), tokens, source, first, blocks)
    assert not any(mover.dropped()["Data"] for mover in made.d.movers.values())


@pytest.mark.parametrize(
    ("shape", "senders"),
    [("TP 2 to 1", {0, 1}), ("1 to TP 4", {0}), ("TP 4 to 1", {0, 2}), ("TP 4 to TP 4", {0, 1, 2, 3})],
)
def test_what_several_ranks_hold_is_sent_by_one_of_them_to_each_that_needs_it(group, shape, senders):
    made = group("tcp", shape)
    made.grant(ticket_of(), 0, [1], 1)
    sending = {rank for rank, mover in made.p.movers.items() if mover.live()}
    made.push_all(ticket_of(), [4])
    made.next(facts.Noted)
    assert made.next(facts.Complete).num_bytes == made.expect(ticket_of(), 8, [4], 0, [1])
    assert sending == senders


@pytest.mark.parametrize("name", ["shm", "tcp"])
@pytest.mark.parametrize("shape", ["TP 2 to 1", "PP 2 to TP 2", "TP 4 to 1", "TP 4 to TP 4", "PP 2 to data 2"])
def test_all_parts_but_one_complete_nothing(group, name, shape):
    made = group(name, shape)
    made.grant(ticket_of(), 0, [1], 1)
    *others, last = made.senders()
    for rank in others:
        made.push_all_at(rank, ticket_of(), [3])
        made.sender._tell(rank, "finish", ticket_of(), b"" if rank else NOTE)
    left = sum(meets(made.p.layouts[last], made.d.layouts[rank]) for rank in made.d.ranks_of(ticket_of()))
    assert eventually(lambda: sum(not source.stands for source in sources(made, ticket_of())) == left)
    made.next(facts.Noted)
    time.sleep(0.05)
    assert made.events.empty()
    assert made.sent.empty()
    made.push_all_at(last, ticket_of(), [3])
    made.sender._tell(last, "finish", ticket_of(), b"")
    assert made.next(facts.Complete).num_bytes == made.expect(ticket_of(), 8, [3], 0, [1])
    assert made.untouched()


def sources(made: GroupPair, ticket: Ticket) -> list[Source]:
    """The parts of a ticket at all ranks of the destination whose share is not whole."""
    of = [mover._inbound._tickets.get(ticket) for mover in made.d.movers.values()]
    return [source for incoming in of if incoming is not None for source in list(incoming.sources.values())]


@each
def test_a_flipped_bit_at_one_rank_is_found_and_only_its_block_fetched_again(name, shape):
    flips = [5]
    source, destination = SHAPES[shape]
    last = GroupPair.last_sender(source, destination, ticket_of())
    made = GroupPair(name, source, destination, ways={last: flipping(name, flips)})
    try:
        made.hand_over(ticket_of(), 40, [3, 6, 7, 0, 1], 1, [5, 2, 0, 4])
        assert flips == []
        assert {rank: mover.resent() for rank, mover in made.p.movers.items() if mover.resent()} == {last: 1}
        assert sum(mover.corrupt() for mover in made.d.movers.values()) == 1
        for member in made.d.members.values():
            member.tell_counts()
        assert eventually(lambda: made.mover.corrupt() == 1)
    finally:
        made.stop()


@each
def test_a_link_of_one_rank_that_corrupts_everything_fails_the_ticket_by_name(name, shape):
    source, destination = SHAPES[shape]
    last = GroupPair.last_sender(source, destination, ticket_of())
    made = GroupPair(name, source, destination, ways={last: flipping(name, list(range(1000)))})
    try:
        made.grant(ticket_of(), 0, [5], 1)
        made.push_all(ticket_of(), [3])
        failed, *_, quiet = made.until(made.events, facts.Quiesced, but=(facts.Noted,))
        assert isinstance(failed.error, DigestMismatch)
        assert quiet == facts.Quiesced(ticket_of(), 0)
        failed, _ = made.until(made.sent, facts.OpDone)
        assert isinstance(failed.error, DigestMismatch)
        assert made.live() == []
    finally:
        made.stop()


@each
def test_the_next_attempt_fetches_what_not_every_rank_has_verified(group, name, shape):
    """One rank of the source fails when it has pushed two of four blocks, the others when they have pushed all."""
    made = group(name, shape)
    ticket, again, prompt, leased = ticket_of(), Ticket("r0", 2, EPOCH), [3, 6, 7, 0], [5, 2, 0, 4]
    made.grant(ticket, 0, leased, 4)
    *others, last = made.senders()
    for rank in others:
        made.push_all_at(rank, ticket, prompt)
    made.push_all_at(last, ticket, prompt[:2])
    parts = [
        (src, dst)
        for dst in made.d.ranks_of(ticket)
        for src in (*others, last)
        if meets(made.p.layouts[src], made.d.layouts[dst])
    ]
    verified = sorted(2 if src == last else 4 for src, _ in parts)
    assert eventually(lambda: sorted(s.verified_blocks for s in sources(made, ticket)) == verified)
    made.p.movers[last].cancel(ticket, TercetError("the last rank failed"))
    assert "the last rank failed" in str(made.next(facts.ReceiveFailed).error)
    assert made.next(facts.Quiesced) == facts.Quiesced(ticket, 2)
    assert "the last rank failed" in str(made.until(made.sent, facts.OpDone)[0].error)
    made.expect(ticket, 16, prompt, 0, leased[:2])
    made.hand_over(again, 27, prompt, 2, leased[2:])


def test_connecting_makes_every_pair_that_a_ticket_may_need(group):
    made = group("tcp", "data 2 to TP 2")
    made.sender.connect(made.endpoint)
    assert [len(mover._peers) for mover in made.p.movers.values()] == [2, 2]
    assert {pair.worker_id for pair in made.sender.attested()} == {"decode-0"}
    assert made.untouched()  # probes land in the scratch
    for attempt in (0, 1):
        made.hand_over(Ticket("r0", attempt, EPOCH), 9, [3, 4], 0, [5, 2])
    assert [len(mover._peers) for mover in made.p.movers.values()] == [2, 2]


# ---- anything, in any order


LAYOUTS = {
    "same": WHOLE,
    "smaller, HND": replace(WHOLE, block_size=4, blocks=16, order="HND"),
    "larger": replace(WHOLE, block_size=16, blocks=4),
}


@pytest.fixture(scope="module")
def groups():
    """(transport, shape, layout of the destination) -> made once."""
    made: dict[tuple[str, str, str], GroupPair] = {}

    def get(name: str, shape: str, layout: str) -> GroupPair:
        if (name, shape, layout) not in made:
            made[name, shape, layout] = GroupPair(name, *SHAPES[shape], LAYOUTS[layout])
            made[name, shape, layout].wipe(MARK)
        return made[name, shape, layout]

    yield get
    for one in made.values():
        one.stop()


NUMBERS = itertools.count()


# Examples share their groups, so one that has failed is not tried again.
@settings(max_examples=200, deadline=None, phases=[Phase.generate], database=None, report_multiple_bugs=False)
@given(
    st.sampled_from(["shm", "tcp"]),
    st.sampled_from(sorted(SHAPES)),
    st.sampled_from(sorted(LAYOUTS)),
    st.integers(1, 64),
    st.integers(0, 16),
    st.sampled_from(["whole", "whole", "cancel at the sender", "cancel at the receiver"]),
    st.integers(0, 1 << 32),
)
def test_prompts_hits_shapes_and_orders_of_any_kind(groups, name, shape, layout, tokens, hits, fate, seed):
    made, there, ticket = groups(name, shape, layout), LAYOUTS[layout], ticket_of(next(NUMBERS))
    rng = random.Random(seed)  # not drawn bit by bit: an example that is broken off would leave a ticket
    source, needed = rng.sample(range(8), -(-tokens // WHOLE.block_size)), -(-tokens // there.block_size)
    first = min(hits, needed)
    leased = rng.sample(range(there.blocks), needed - first)
    verbs = [
        lambda: made.mover.admit(ticket, first, leased),
        lambda: made.sender.open(ticket, made.endpoint, tokens, time.monotonic() + 60),
    ]
    for verb in rng.sample(verbs, 2):
        verb()
    assert isinstance(made.sent.get(timeout=10), facts.Granted)
    pushes = pieces(made, ticket, source, rng)
    for piece in pushes if fate == "whole" else pushes[: rng.randint(0, len(pushes))]:
        made.push_at(*piece)
    if fate == "whole":
        made.sender.finish(ticket, NOTE)
        assert made.next(facts.Noted).note == NOTE
        assert made.next(facts.Complete).num_bytes == made.expect(ticket, tokens, source, first, leased)
        assert [type(event) for event in made.until(made.sent, facts.OpDone)] == [facts.Released, facts.OpDone]
        assert made.untouched()
    else:
        (made.sender if fate == "cancel at the sender" else made.mover).cancel(ticket, TercetError(fate))
        assert fate in str(made.next(facts.ReceiveFailed).error)
        verified = made.next(facts.Quiesced).verified
        assert [type(event) for event in made.until(made.sent, facts.OpDone)] == [facts.SendFailed, facts.OpDone]
        assert verified <= len(leased)
        assert made.holds(ticket, tokens, source, first, leased[:verified])
        made.wipe(MARK)  # the blocks are somebody else's
    assert eventually(lambda: made.live() == [])
    assert made.sent.empty()
    assert made.events.empty()


def pieces(
    made: GroupPair, ticket: Ticket, source: list[int], rng: random.Random
) -> list[tuple[int, Ticket, int, int, list[int]]]:
    """What the ranks push: of each layer the prompt's blocks in order, in pieces; else any order."""
    left = {(rank, layer): 0 for rank in made.p.ranks_of(ticket) for layer in made.p.layouts[rank].window}
    found = []
    while left:
        rank, layer = at = rng.choice(sorted(left))
        first, end = left[at], rng.randint(left[at] + 1, len(source))
        found.append((rank, ticket, layer, first, source[first:end]))
        left[at] = end
        if end == len(source):
            del left[at]
    return found
