"""The movers of a group's ranks as one, under orders of events that real movers seldom show."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tercet.core import Ticket
from tercet.distributed.place import Place
from tercet.engine.replicas import replica_of
from tercet.errors import PeerDown, PeerUnreachable, TercetError, WorkerDrained, WorkerLost
from tercet.roles.facts_wire import error_of, packed_fact
from tercet.roles.joint import JointReceiver, JointSender
from tercet.transfer.memory.layout import KvLayout
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
from tercet.transfer.transports.contract import Endpoint
from tercet.transfer.transports.group_endpoint import GroupEndpoint
from tests.fakes.ranks import FakeMover, FakeTalk

TICKET, OTHER = Ticket("r0", 0, 3), Ticket("r1", 2, 3)
ERROR, LATER = PeerDown("the first"), TercetError("a later one")
WHOLE = KvLayout(4, 8, 16, 12, 8, "float32")


def layouts(ranks: int) -> list[KvLayout]:
    return [replace(WHOLE, tp_size=ranks, tp_rank=rank) for rank in range(ranks)]


def endpoint(ranks: int) -> str:
    """Of a decode worker of so many tensor ranks."""
    each = [Endpoint(f"decode-0/{rank}", 3, "host", "unix", "tcp", ["shm"]).encode() for rank in range(ranks)]
    return each[0] if ranks == 1 else json.dumps([ranks, 1, 1, each])


class Sending:
    def __init__(self, ranks: int) -> None:
        self.heard: list[Any] = []
        self.talks = [FakeTalk(rank) for rank in range(1, ranks)]
        loop = asyncio.get_running_loop()
        places = [Place(rank, ranks) for rank in range(ranks)]
        self.joint = JointSender(self._own, places, layouts(ranks), loop, self.heard.append, self.talks)

    def _own(self, on_event: Callable[[Any], None]) -> FakeMover:
        self.own = FakeMover(on_event)
        return self.own

    def open(self, ticket: Ticket = TICKET, ranks: int = 2) -> str:
        return self.joint.open(ticket, endpoint(ranks), 100, time.monotonic() + 5)

    async def tell(self, rank: int, *events: Any) -> list[Any]:
        """-> all that was heard so far."""
        for event in events:
            self.own.on_event(event) if rank == 0 else self.joint.take(rank, packed_fact(event))
        await asyncio.sleep(0)
        return self.heard


class Receiving(Sending):
    def __init__(self, sources: dict[int, int]) -> None:
        self.heard: list[Any] = []
        self.talks = [FakeTalk(rank) for rank in sources if rank]
        loop = asyncio.get_running_loop()
        places = [Place(rank, len(sources)) for rank in sources]
        self.joint = JointReceiver(self._own, places, sources, loop, self.heard.append, self.talks)


# ---- sending


async def test_each_rank_opens_to_those_that_it_meets_and_their_transports_are_told():
    made = Sending(4)
    assert made.open(ranks=2) == "shm+tcp"
    assert made.own.told == [("open", TICKET, 1)]
    for talk in made.talks:
        [(kind, ticket, endpoints, num_tokens, left_s)] = talk.told
        assert (kind, ticket, len(endpoints), num_tokens) == ("open", TICKET, 1, 100)
        assert 4 < left_s <= 5


async def test_a_rank_that_holds_what_another_one_sends_has_no_part():
    """Of 4 ranks and 2 heads every second one sends."""
    made = Sending(4)
    made.joint._layouts = [replace(layout, kv_heads=2) for layout in layouts(4)]
    made.open(ranks=1)
    assert [bool(told) for told in (made.own.told, *(t.told for t in made.talks))] == [True, False, True, False]
    assert await made.tell(0, Granted(TICKET, 1)) == []
    assert await made.tell(2, Granted(TICKET, 0)) == [Granted(TICKET, 0)]
    made.joint.finish(TICKET, b"note")
    assert made.own.told[1:] == [("finish", TICKET, b"note")]
    assert [talk.told[1:] for talk in made.talks] == [[], [("finish", TICKET, b"")], []]


async def test_granted_released_and_done_once_all_ranks_are():
    made = Sending(3)
    made.open()
    for event, joined in ((Granted(TICKET, 4), Granted(TICKET, 2)), (Released(TICKET),) * 2, (OpDone(TICKET),) * 2):
        made.heard.clear()
        assert await made.tell(2, event) == []
        assert await made.tell(0, event) == []
        assert await made.tell(1, joined) == [joined]


@pytest.mark.parametrize("failing", [0, 1, 2])
async def test_the_first_failure_cancels_the_rest_and_is_heard_alone(failing):
    made = Sending(3)
    made.open()
    heard = await made.tell(failing, SendFailed(TICKET, ERROR), SendFailed(TICKET, LATER))
    assert [packed_fact(event) for event in heard] == [packed_fact(SendFailed(TICKET, ERROR))]
    told = [made.own.told[1:], *(talk.told[1:] for talk in made.talks)]
    assert [[message[0] for message in each] for each in told] == [
        [] if rank == failing else ["cancel" if rank == 0 else "stop_sending"] for rank in range(3)
    ]
    if failing:
        assert error_of(told[0][0][2]) == error_of(ERROR)
    made.heard.clear()
    for rank in (1, 0, 2):
        assert made.heard == []
        await made.tell(rank, SendFailed(TICKET, LATER), OpDone(TICKET))
    assert made.heard == [OpDone(TICKET)]


async def test_an_open_that_fails_cancels_what_was_opened_and_nothing_more_is_heard():
    made = Sending(3)
    made.talks[1].faults["open"] = PeerUnreachable("rank 2 reaches nobody")
    with pytest.raises(PeerUnreachable, match="rank 2 reaches nobody"):
        made.open()
    assert [told[0] for told in made.own.told] == ["open", "cancel"]
    assert [told[0] for told in made.talks[0].told] == ["open", "stop_sending"]
    assert made.talks[1].told == []
    for rank in (0, 1):
        await made.tell(rank, SendFailed(TICKET, LATER), OpDone(TICKET))
    assert made.heard == []
    made.talks[1].faults.clear()
    made.open(OTHER)  # another ticket is none the worse
    for rank in range(3):
        await made.tell(rank, Granted(OTHER, 0))
    assert made.heard == [Granted(OTHER, 0)]


async def test_the_peer_of_a_group_that_lost_a_rank_does_not_take_it_for_its_own_death():
    made = Sending(3)
    for question in ("open", "connect"):
        made.talks[1].faults[question] = WorkerLost("rank 2 of the group is gone")
    with pytest.raises(WorkerDrained, match="rank 2"):  # this worker may go on without it
        made.open()
    with pytest.raises(PeerDown, match="rank 2"):
        made.joint.connect(endpoint(2))
    gone = error_of(WorkerDrained("rank 2 of the group is gone"))
    assert error_of(made.own.told[1][2]) == gone
    assert made.talks[0].told[1] == ("stop_sending", TICKET, gone)


async def test_rank_0_cannot_open_and_nobody_else_is_asked():
    made = Sending(3)
    made.own.fault = PeerDown("nobody there")
    with pytest.raises(PeerDown):
        made.open()
    assert made.own.told == made.talks[0].told == made.talks[1].told == []


async def test_a_part_that_fails_while_others_open_cancels_them_once_they_are_open():
    """The first Cancel may come to a rank before the question that opens its part does."""
    made = Sending(3)
    made.own.during_open = lambda: made.joint._take(0, SendFailed(TICKET, ERROR))
    made.open()
    assert made.heard == [SendFailed(TICKET, ERROR)]
    for talk in made.talks:
        kinds = [told[0] for told in talk.told]
        assert kinds[-1] == "stop_sending"
        assert "open" in kinds


async def test_a_client_that_goes_while_ranks_open_cancels_all_of_them():
    made = Sending(3)
    made.talks[0].during = lambda: made.joint.cancel(TICKET, ERROR)
    made.open()
    assert made.own.told[-1][0] == "cancel"
    assert [talk.told[-1][0] for talk in made.talks] == ["stop_sending"] * 2


async def test_what_is_unknown_or_over_is_passed_over():
    made = Sending(2)
    made.joint.finish(TICKET, b"")
    made.joint.cancel(TICKET, ERROR)
    await made.tell(1, OpDone(TICKET))
    made.open()
    for rank in (0, 1):
        await made.tell(rank, OpDone(TICKET))
    await made.tell(1, SendFailed(TICKET, ERROR))
    assert made.heard == [OpDone(TICKET)]
    told = len(made.own.told), len(made.talks[0].told)
    made.joint.cancel(TICKET, ERROR)
    assert (len(made.own.told), len(made.talks[0].told)) == told


async def test_connect_raises_the_first_fault_and_only_what_rank_0_sends_alone_is_known_to_be_connected():
    made = Sending(2)
    made.talks[0].faults["connect"] = PeerDown("rank 1 cannot")
    with pytest.raises(PeerDown, match="rank 1 cannot"):
        made.joint.connect(endpoint(2))
    assert not made.joint.connected(endpoint(2))
    assert Sending(1).joint.connected(endpoint(2))


# ---- receiving


async def test_all_ranks_admit_refuse_and_cancel_with_as_many_sources_as_send_to_each():
    made = Receiving({0: 1, 1: 2})
    made.joint.admit(TICKET, 1, [5, 6])
    made.joint.refuse(OTHER, "full")
    made.joint.cancel(TICKET, ERROR)
    assert made.own.told == [("admit", TICKET, 1, [5, 6], 1), ("refuse", OTHER, "full"), ("cancel", TICKET, ERROR)]
    assert made.talks[0].told == [
        ("admit", TICKET, 1, [5, 6], 2),
        ("refuse", OTHER, "full"),
        ("stop_receiving", TICKET, error_of(ERROR)),
    ]


EVENTS = {
    "complete": [Noted(TICKET, b"n"), Complete(TICKET, 10, 0.25)],
    "complete without a note": [Complete(TICKET, 10, 0.5)],
    "failed": [ReceiveFailed(TICKET, ERROR), Quiesced(TICKET, 2)],
    "noted, then failed": [Noted(TICKET, b"n"), ReceiveFailed(TICKET, ERROR), Quiesced(TICKET, 1)],
}


@given(st.data())
async def test_in_any_order_each_fact_is_told_once_and_the_last_one_last(data):
    fates = [data.draw(st.sampled_from(sorted(EVENTS))) for _ in range(3)]
    left, told = {rank: list(EVENTS[fate]) for rank, fate in enumerate(fates)}, list[Any]()
    made = Receiving(dict.fromkeys(range(3), 1))
    made.joint.admit(TICKET, 0, [1])
    while left:
        assert not any(isinstance(event, Complete | Quiesced) for event in made.heard)
        rank = data.draw(st.sampled_from(sorted(left)))
        told.append(left[rank].pop(0))
        await made.tell(rank, told[-1])
        left = {rank: events for rank, events in left.items() if events}
    kinds = [type(event) for event in made.heard]
    good = all(fate.startswith("complete") for fate in fates)
    before = itertools.takewhile(lambda event: not isinstance(event, ReceiveFailed), told)
    assert kinds.count(Noted) == any(isinstance(event, Noted) for event in before)
    assert kinds.count(ReceiveFailed) == (not good)
    assert kinds[-1] is (Complete if good else Quiesced)
    assert sum(kind in (Complete, Quiesced) for kind in kinds) == 1
    if good:
        assert made.heard[-1].num_bytes == 30
    assert not made.joint._joints


async def test_a_rank_that_fails_stops_those_that_still_receive():
    made = Receiving({0: 1, 1: 1, 2: 1})
    made.joint.admit(TICKET, 0, [1])
    await made.tell(1, Complete(TICKET, 10, 0.1))
    await made.tell(2, ReceiveFailed(TICKET, ERROR))
    assert made.own.told[-1][0] == "cancel"
    assert [talk.told[-1][0] for talk in made.talks] == ["admit", "admit"]


async def test_counts_of_all_ranks_are_added_up():
    made = Receiving({0: 1, 1: 1, 2: 1})
    for rank in (1, 2):
        made.joint.counts[rank] = {"receive_dropped": 3, "receive_refused": 4, "corrupt": 5, "send_dropped": 100}
    assert (made.joint.dropped().total(), made.joint.refused().total(), made.joint.corrupt()) == (8, 10, 11)
    sending = Sending(2)
    sending.joint.counts[1] = {"send_dropped": 7}
    assert sending.joint.dropped().total() == 9


# ---- a rank that is lost


async def test_what_a_lost_rank_had_ends_and_the_rest_goes_on():
    made = Sending(2)
    made.open()
    gone = WorkerDrained("rank 1 is lost")
    made.joint.lose(1, gone)
    assert [packed_fact(event) for event in made.heard] == [packed_fact(SendFailed(TICKET, gone))]
    await made.tell(0, SendFailed(TICKET, LATER), OpDone(TICKET))
    assert made.heard[1:] == [OpDone(TICKET)]
    with pytest.raises(WorkerDrained, match="rank 1 of the group is lost"):
        made.open(OTHER)  # goes on elsewhere, and this worker is none the worse
    made.joint.regain(made.talks[0])
    assert made.open(OTHER) == "shm+tcp"


async def test_blocks_of_a_lost_rank_are_quiet():
    made = Receiving({0: 1, 1: 1})
    made.joint.admit(TICKET, 0, [1])
    await made.tell(0, Complete(TICKET, 10, 0.1))
    made.joint.lose(1, PeerDown("rank 1 is lost"))
    assert [type(event) for event in made.heard] == [ReceiveFailed, Quiesced]
    made.joint.lose(1, PeerDown("again"))
    assert len(made.heard) == 2


def of_replicas(*ranks: str) -> str:
    return json.dumps([1, 1, len(ranks), ranks])


async def test_counts_of_a_lost_rank_are_kept():
    made = Receiving({0: 1, 1: 1})
    made.joint.counts[1] = {"corrupt": 5}
    made.joint.lose(1, PeerDown("rank 1 is lost"))
    made.joint.counts[1] = {"corrupt": 2}  # its successor begins anew
    assert made.joint.corrupt() == 1 + 5 + 2


async def test_nothing_goes_to_a_replica_whose_rank_is_lost():
    """Neither is it dialled; the next attempt at a request gets another one."""
    made, here = Sending(1), endpoint(1)
    first = Ticket("r", 0, 3)._replace(attempt=replica_of(Ticket("r", 0, 3), 2))  # goes to replica 0
    degraded = of_replicas(here, "")
    assert made.joint.open(first, degraded, 100, time.monotonic() + 5) == "shm"
    made.joint.connect(degraded)
    assert [told[0] for told in made.own.told] == ["open", "connect"]
    with pytest.raises(WorkerDrained, match="replica 1 of decode-0/0 is lost"):
        made.joint.open(first._replace(attempt=first.attempt + 1), degraded, 100, time.monotonic() + 5)
    assert len(made.own.told) == 2
    assert made.joint.open(first._replace(attempt=first.attempt + 1), of_replicas(here, here), 100, 9e9) == "shm"


@pytest.mark.parametrize(("tensor", "pipeline", "data"), [(1, 1, 3), (2, 1, 2), (2, 3, 2), (1, 2, 1)])
def test_a_replica_stands_while_all_its_ranks_do(tensor, pipeline, data):
    each = Endpoint("decode-0", 3, "host", "unix", "tcp", ["shm"]).encode()
    for lost in range(tensor * pipeline * data):
        ranks = tuple("" if rank == lost else each for rank in range(tensor * pipeline * data))
        group = GroupEndpoint.decode(GroupEndpoint(tensor, pipeline, data, ranks).encode())
        own = Place(lost, tensor, pipeline, data).data_rank
        assert [group.stands(replica) for replica in range(data)] == [replica != own for replica in range(data)]
