"""What ends a ticket between groups of ranks before it is whole: silence, refusals, ranks that die or stop, messages
that are lost. Every part ends then, and no block is free before every rank is quiet."""

from __future__ import annotations

import contextlib
import gc
import queue
import random
import re
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from tercet.distributed.place import Place
from tercet.errors import LeaseExpired, Overloaded, PeerDown, PeerMismatch, PeerUnreachable, TercetError, WorkerDrained
from tercet.transfer.links.channel import Mailbox
from tercet.transfer.protocol import facts
from tests.group_movers import MARK, SHAPES, GroupPair, eventually
from tests.integration.test_transfer_conformance import (  # noqa: F401  # the last three: the same, of the pair below
    SHORT,
    chaotic,
    come_through,
    num_fds,
    test_a_slow_engine_keeps_a_ticket_alive,
    test_a_ticket_without_a_sender_fails_within_its_lease,
    test_heartbeats_alone_keep_no_ticket_alive,
)
from tests.movers import CLASSES, NOTE, ticket_of

# Of what takes as long as a lease.
PAIRS = [("tcp", "TP 2 to 1"), ("shm", "PP 2 to TP 2"), ("tcp", "1 to TP 4"), ("shm", "data 2 to TP 2")]
# Those in which other ranks than rank 0 send, too: to the same rank, each to each, and each to one of its own.
SEVERAL = [("shm", "TP 2 to 1"), ("tcp", "PP 2 to TP 2"), ("ucx", "PP 2 to TP 2"), ("tcp", "TP 4 to TP 4")]
each = pytest.mark.parametrize(("name", "shape"), SEVERAL)
SOURCE, LEASED = [3, 6, 7, 0], [5, 2, 4, 1]


@pytest.fixture(params=PAIRS, ids="-".join)
def impatient(request) -> Iterator[GroupPair]:
    name, shape = request.param
    made = GroupPair(name, *SHAPES[shape], lease_s=SHORT)
    yield made
    made.stop()


@pytest.fixture
def group() -> Iterator:
    made: list[GroupPair] = []

    def make(*shape: object, **changes: object) -> GroupPair:
        made.append(GroupPair(*shape, **changes))
        return made[0]

    yield make
    for one in made:
        one.stop()


def assert_ended(made: GroupPair, *named: str) -> None:
    """At both ends, for one of these reasons, and no rank holds anything of it."""
    for failed, last, events in (
        (facts.SendFailed, facts.OpDone, made.sent),
        (facts.ReceiveFailed, facts.Quiesced, made.events),
    ):
        heard = made.until(events, last, but=(facts.Granted, facts.Noted))
        assert [type(event) for event in heard] == [failed, last]
        assert any(why in str(heard[0].error) for why in named), heard
    assert_nothing_left(made)


def assert_nothing_left(made: GroupPair) -> None:
    assert eventually(lambda: made.live() == [])
    assert eventually(lambda: not any(mover._inbound._offers for mover in made.d.movers.values()))
    assert made.sent.empty()
    assert made.events.empty()


# ---- parts that are not open


@contextlib.contextmanager
def opening(name: str, shape: str, **changes: object) -> Iterator[GroupPair]:
    """Its rank 1 is slow to open the ticket; rank 0 has opened it."""
    made = GroupPair(name, *SHAPES[shape], **changes)
    made.mover.admit(ticket_of(), 0, LEASED)
    made.p.members[1].gate.clear()
    thread = threading.Thread(target=made.open, args=(ticket_of(), 4))
    thread.start()
    try:
        assert eventually(lambda: made.d.movers[0]._inbound._tickets[ticket_of()].sources)
        yield made
    finally:
        made.p.members[1].gate.set()
        thread.join()
        made.stop()


@each
@pytest.mark.parametrize("at", ["sender", "mover"])
def test_a_ticket_that_is_given_up_while_some_parts_are_open_ends_at_all(name, shape, at):
    with opening(name, shape) as made:
        getattr(made, at).cancel(ticket_of(), TercetError("given up"))
        assert "given up" in str(made.next(facts.ReceiveFailed).error)
        made.next(facts.Quiesced)
        failed = made.sent.get(timeout=10)
        assert isinstance(failed, facts.SendFailed)
        assert "given up" in str(failed.error)
        time.sleep(0.1)
        assert made.sent.empty()  # rank 1 may still open it, and push
        made.p.members[1].gate.set()
        assert made.sent.get(timeout=10) == facts.OpDone(ticket_of())
        assert_nothing_left(made)


@each
def test_a_ticket_with_one_of_its_senders_fails_within_its_lease_and_names_the_lack(name, shape):
    """However lively the other one is."""
    with opening(name, shape, lease_s=SHORT) as made:
        error = made.next(facts.ReceiveFailed).error
        assert isinstance(error, LeaseExpired)
        assert re.search("no word of r0 from (1 of its 2 sources|its prefill worker) for 1 s", str(error))
        made.next(facts.Quiesced)
        made.p.members[1].gate.set()
        assert [type(event) for event in made.until(made.sent, facts.OpDone)] == [facts.SendFailed, facts.OpDone]
        assert_nothing_left(made)


@pytest.mark.parametrize("shape", ["TP 2 to 1", "PP 2 to TP 2", "TP 4 to TP 4"])
def test_a_rank_that_cannot_open_fails_the_open_by_name_and_ends_the_other_parts(group, shape):
    made = group("tcp", *SHAPES[shape], ways={1: CLASSES["shm"]()})
    made.mover.admit(ticket_of(), 0, LEASED)
    with pytest.raises((PeerMismatch, PeerUnreachable), match="shm"):
        made.open(ticket_of(), 4)
    made.next(facts.ReceiveFailed)
    made.next(facts.Quiesced)
    assert_nothing_left(made)


@pytest.mark.parametrize("name", ["shm", pytest.param("tcp", marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_refused_ticket_ends_at_every_rank(group, name, shape):
    made = group(name, *SHAPES[shape])
    for ticket in (ticket_of(), ticket_of()._replace(attempt=1)):  # of other replicas, if there are any
        made.open(ticket, 4)
        offers = [made.d.movers[rank]._inbound._offers for rank in made.d.ranks_of(ticket)]
        assert eventually(lambda offers=offers, ticket=ticket: all(ticket in each for each in offers))
        made.mover.refuse(ticket, "no room")
        failed, _ = made.until(made.sent, facts.OpDone)
        assert isinstance(failed.error, Overloaded)
        assert str(failed.error) == "no room"
        assert_nothing_left(made)


@pytest.mark.parametrize(("name", "shape"), SEVERAL[:2])
def test_a_slow_rank_keeps_alive_what_the_others_have_done(group, name, shape):
    made = group(name, *SHAPES[shape], lease_s=SHORT)
    made.grant(ticket_of(), 0, LEASED, 4)
    made.push_all_at(0, ticket_of(), SOURCE)
    made.sender._tell(0, "finish", ticket_of(), NOTE)
    time.sleep(2 * SHORT)
    made.push_all_at(1, ticket_of(), SOURCE)
    made.sender._tell(1, "finish", ticket_of(), b"")
    made.next(facts.Noted)
    made.next(facts.Complete)


# ---- a rank that dies, or stops


def midway(group, name: str, sends: bool, **changes: object) -> GroupPair:
    """Rank 1 of the source, or of the destination, is a process of its own. A ticket of four blocks is on its way."""
    shape = (Place(tensor=2), Place()) if sends else (Place(), Place(tensor=2))
    made = group(name, *shape, apart={sends: [1]}, **changes)
    made.grant(ticket_of(), 0, LEASED, 4)
    for rank in made.p.ranks_of(ticket_of()):
        for layer in (0, 1):
            made.push_at(rank, ticket_of(), layer, 0, SOURCE)
    if sends:
        made.p.apart[1].next("half")
    return made


def assert_free(made: GroupPair) -> None:
    """The blocks are somebody else's, and what comes late for them changes none."""
    made.wipe(MARK)
    made.push_all(ticket_of(), SOURCE)
    time.sleep(0.2)
    assert made.untouched()


def assert_lost(made: GroupPair, sends: bool) -> None:
    """The next ticket that needs the rank is told so, and rank 0 has no part of it for long."""
    with pytest.raises(WorkerDrained if sends else PeerDown, match="rank 1 of the group" if sends else None):
        made.open(ticket_of(1), 4)
    assert_nothing_left(made)


@pytest.mark.parametrize(("name", "sends"), [("shm", True), ("tcp", True), ("tcp", False)])
def test_a_rank_that_is_killed_ends_the_parts_of_the_others(group, name, sends):
    made = midway(group, name, sends)
    made.side(sends).apart[1].process.kill()
    assert_ended(made, "rank 1", "is gone")
    assert_free(made)
    assert_lost(made, sends)


@pytest.mark.parametrize("name", ["shm", pytest.param("tcp", marks=pytest.mark.slow)])
def test_a_rank_of_the_source_that_stops_cannot_change_a_block_that_is_free(group, name):
    """Where its writes cannot be fenced off, no block is free until it is dead."""
    made = midway(group, name, sends=True, lease_s=SHORT)
    process = made.p.apart[1].process
    process.send_signal(signal.SIGSTOP)
    made.next(facts.ReceiveFailed)
    assert [type(event) for event in made.until(made.sent, facts.OpDone)] == [facts.SendFailed, facts.OpDone]
    if not CLASSES[name].fenceable:
        with pytest.raises(queue.Empty):
            made.events.get(timeout=1.0)
        process.kill()
    made.next(facts.Quiesced, 20)
    assert_free(made)
    assert_lost(made, sends=True)


def test_a_rank_of_the_destination_that_stops_ends_the_parts_of_the_others(group):
    made = midway(group, "shm", sends=False, lease_s=SHORT)
    made.d.apart[1].process.send_signal(signal.SIGSTOP)
    assert_ended(made, "no word of r0 from its decode worker", "rank 1 of the group is gone")
    assert_free(made)


# ---- nothing leaks


@pytest.mark.parametrize(
    ("name", "shape"), [("shm", "PP 2 to TP 2"), pytest.param("tcp", "TP 2 to 1", marks=pytest.mark.slow)]
)
def test_lost_doubled_and_late_messages_leak_nothing_at_any_rank(name, shape, monkeypatch):
    monkeypatch.setattr(Mailbox, "post", chaotic(random.Random(5), 0.06))
    made = GroupPair(name, *SHAPES[shape], lease_s=SHORT)
    try:
        for ticket, block in come_through(made, 6):
            assert made.holds(ticket, 8, [block], 0, [block])
        monkeypatch.undo()
        assert eventually(lambda: made.live() == [])
    finally:
        monkeypatch.undo()
        made.stop()


@pytest.mark.parametrize("name", ["shm", "tcp", "ucx"])
def test_no_file_descriptor_and_no_thread_is_left(name):
    for _ in range(2):  # what the libraries keep is there after that
        live_a_little(GroupPair(name, *SHAPES["PP 2 to TP 2"]))
    fds, threads = held()
    for shape in SHAPES.values():
        live_a_little(GroupPair(name, *shape))
    assert eventually(lambda: held()[0] <= fds and held()[1] <= threads), (fds, threads, held())


def held() -> tuple[int, int]:
    """File descriptors and threads. A cache is mapped until nothing refers to it, and threads on their way out do."""
    gc.collect()
    return num_fds(), threading.active_count()


def live_a_little(made: GroupPair) -> None:
    """Move KV, give a ticket up, and stop with one under way."""
    made.move(ticket_of(), SOURCE, LEASED)
    made.until(made.sent, facts.OpDone)
    made.grant(ticket_of(1), 0, LEASED, 4)
    made.sender.cancel(ticket_of(1), TercetError("given up"))
    assert_ended(made, "given up")
    made.grant(ticket_of(2), 0, LEASED, 4)
    made.stop()
