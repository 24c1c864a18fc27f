"""Ranks of the direct exchange link up, or turn each other away, within one process."""

from __future__ import annotations

import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from tercet.distributed.direct_exchange import DirectExchange
from tercet.distributed.frames import Frame, Kind
from tercet.distributed.meeting import Group, Meeting
from tercet.distributed.pump import await_frames
from tercet.errors import InternalError, PeerMismatch, RankLost
from tercet.transfer.links.channel import Channel
from tercet.transfer.links.wires import dial_unix, listen_unix
from tercet.transfer.protocol.messages import VERSION, Challenge, Welcome
from tercet.transfer.transports.contract import Endpoint

EMPTY = Frame(Kind.DISPATCH, width=3)
GROUP = Group("model", "secret", 3, 4)


@pytest.fixture
def meetings():
    made: list[Meeting] = []

    def meet(group: Group = GROUP, rank: int = 0) -> Meeting:
        made.append(Meeting(group, rank))
        return made[-1]

    yield meet
    for meeting in made:
        meeting.stop()


@pytest.mark.parametrize("tcp", [False, True])
def test_ranks_that_agree_link_up(meetings, tcp):
    first, second = meetings(rank=0), meetings(rank=2)
    if tcp:
        second._host_id = "another"
    dialled = second.dial(0, first.endpoint)
    arrived = first.arrival(2, 5.0)
    assert (dialled.rank, arrived.rank) == (0, 2)
    assert dialled.sock.family == (socket.AF_INET if tcp else socket.AF_UNIX)
    dialled.send([memoryview(EMPTY.encode())])
    await_frames([arrived], EMPTY, 5.0)
    dialled.close()
    arrived.close()


@pytest.mark.parametrize(
    ("group", "rank", "as_rank", "says"),
    [
        (replace(GROUP, token="guess"), 1, 0, "does not know this cluster's token"),
        (replace(GROUP, name="other"), 1, 0, "another model"),
        (replace(GROUP, size=4), 1, 0, r"\[4, 4\] there, \[3, 4\] here"),
        (replace(GROUP, slots_per_rank=5), 1, 0, r"\[3, 5\] there, \[3, 4\] here"),
        (GROUP, 0, 1, "is no link to rank 0"),  # two of one number
        (replace(GROUP, size=4), 3, 0, "is no link to rank 0"),
        (GROUP, 1, 2, "it is rank 0"),
    ],
)
def test_ranks_that_do_not_agree_are_turned_away(meetings, group, rank, as_rank, says):
    listening, dialling = meetings(), meetings(group, rank)
    with pytest.raises(PeerMismatch, match=f"rank {as_rank}: .*{says}"):
        dialling.dial(as_rank, listening.endpoint)


def test_a_listener_that_does_not_know_the_secret_is_found_out(meetings):
    """Whoever listens where a rank should gets a proof, but has none to give."""
    listener, address = listen_unix()
    dialling = meetings(rank=1)

    def pretend() -> None:
        channel = Channel(listener.accept()[0])
        channel.send(Challenge(VERSION, b"n" * 16))
        channel.receive()
        channel.send(Welcome("0", 0, [GROUP.size, GROUP.slots_per_rank], "", b"", b"p" * 32))
        channel.close()

    endpoint = replace(Endpoint.decode(dialling.endpoint), unix=address).encode()
    with listener, ThreadPoolExecutor() as pool:
        pretending = pool.submit(pretend)
        with pytest.raises(PeerMismatch, match="rank 0: 0 does not know this cluster's token"):
            dialling.dial(0, endpoint)
        pretending.result()


def test_a_rank_that_is_not_there_is_lost(meetings):
    first, gone = meetings(rank=1), meetings(rank=0)
    gone.stop()
    with pytest.raises(RankLost, match="rank 0 cannot be reached") as caught:
        first.dial(0, gone.endpoint)
    assert caught.value.rank == 0
    with pytest.raises(RankLost, match=r"rank 2 did not link up with rank 1 within 0\.05 s") as caught:
        first.arrival(2, 0.05)
    assert caught.value.rank == 2
    with pytest.raises(PeerMismatch, match="no transfer endpoint"):
        first.dial(0, "nonsense")


def test_who_waits_for_a_rank_that_is_lost_is_told_and_has_the_others(meetings):
    """At once, whether it is lost before the wait or meanwhile."""
    exchange, other = DirectExchange(meetings(rank=0), 60.0), meetings(rank=2)
    with ThreadPoolExecutor() as pool:
        joining = pool.submit(exchange.join, [1, 2])
        link = other.dial(0, exchange._meeting.endpoint)
        exchange.cut(1)
        with pytest.raises(RankLost, match="rank 1 is lost") as caught:
            joining.result(20)
    assert (caught.value.rank, exchange.active) == (1, (True, False, True))
    with pytest.raises(RankLost, match="rank 1 is lost"):
        exchange.join([1])
    again = meetings(rank=1).dial(0, exchange._meeting.endpoint)
    exchange.join([1])
    assert exchange.active == (True, True, True)
    exchange.close()
    link.close()
    again.close()


def test_a_newer_link_of_a_rank_takes_the_place_of_one_that_nobody_took(meetings):
    listening = meetings()
    links = [meetings(rank=1).dial(0, listening.endpoint) for _ in range(2)]
    deadline = time.monotonic() + 5.0
    while True:  # until the first is closed at the other end
        try:
            links[0].receive()
        except RankLost:
            break
        assert time.monotonic() < deadline
    taken = listening.arrival(1, 5.0)
    taken.send([memoryview(EMPTY.encode())])
    await_frames([links[1]], EMPTY, 5.0)
    for link in (*links, taken):
        link.close()


def test_a_stranger_gets_nowhere(meetings):
    listening = meetings()
    with dial_unix(Endpoint.decode(listening.endpoint).unix, 5.0) as sock:
        sock.sendall(struct.pack("<4sB3xIQ", b"TCT5", 1, 1 << 19, 0))
        sock.settimeout(5.0)
        while sock.recv(4096):
            pass
    with pytest.raises(RankLost, match="rank 1 did not"):
        listening.arrival(1, 0.05)


def test_rows_for_a_rank_that_is_out_and_attempts_that_go_back_are_refused(meetings):
    exchange = DirectExchange(meetings(rank=1), 5.0)
    assert exchange.active == (False, True, False)
    batch = torch.ones(2, 3), torch.tensor([[4], [5]]), torch.ones(2, 1)
    received, handle = exchange.dispatch(*batch)
    assert exchange.combine(received.x, handle).tolist() == batch[0].tolist()
    with pytest.raises(RankLost, match="1 rows go to rank 2, which is out") as caught:
        exchange.dispatch(batch[0], torch.tensor([[4], [8]]), batch[2])
    assert caught.value.rank == 2
    exchange.resume(2, 0)
    for attempt in (2, 1):
        with pytest.raises(InternalError, match=f"attempt {attempt} must be above 2"):
            exchange.resume(attempt, 0)
    exchange.close()
