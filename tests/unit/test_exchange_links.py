"""Frames and links of the direct exchange, within one process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tercet.distributed.exchange import DTYPES
from tercet.distributed.frames import HEADER, MAX_PAYLOAD, Frame, Kind, decode
from tercet.distributed.link import Link
from tercet.distributed.pump import await_frames, await_payloads
from tercet.errors import ProtocolViolation, RankLost
from tercet.transfer.links.channel import Channel

WANTED = Frame(Kind.DISPATCH, number=5, attempt=2, layer=3, rows=2, width=3, dtype=1, k=2)
small, large = st.integers(0, 1 << 10), st.integers(0, (1 << 32) - 1)


@given(
    st.builds(
        Frame,
        st.sampled_from(Kind),
        st.integers(0, (1 << 64) - 1),
        large,
        large,
        small,
        small,
        st.integers(0, len(DTYPES) - 1),
        small,
    )
)
def test_a_frame_is_what_its_header_says(frame):
    header = frame.encode()
    assert len(header) == HEADER.size == 40
    assert decode(header) == frame


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ((b"TCT5", 0, 0, 0, 0, 0, 0, 0, 0, 0), "begins with b'TCT5'"),
        ((b"TCX1", 3, 0, 0, 0, 0, 0, 0, 0, 0), "unknown kind 3"),
        ((b"TCX1", 0, 3, 0, 0, 0, 0, 0, 0, 0), "dtype 3"),
        ((b"TCX1", 1, 0, 0, 0, 0, 0, 1, 0, 0), "1 bytes for 0 rows"),
        ((b"TCX1", 1, 0, 0, 0, 0, 0, 1 << 40, 1 << 19, 1 << 19), "the limit is"),
    ],
)
def test_a_header_that_is_none_of_ours_or_too_large_is_refused(fields, says):
    with pytest.raises(ProtocolViolation, match=says):
        decode(HEADER.pack(*fields))


def test_a_frame_over_the_limit_is_not_sent():
    with pytest.raises(ProtocolViolation, match="over the limit"):
        Frame(Kind.COMBINE, rows=MAX_PAYLOAD // 4, width=2).encode()


@pytest.fixture
def peers():
    """rank -> (our link to it, its socket)."""
    found = {}
    for rank in (1, 2):
        ours, theirs = socket.socketpair()
        found[rank] = (Link(rank, Channel(ours)), theirs)
    yield found
    for link, theirs in found.values():
        link.close()
        theirs.close()


def say(peer: tuple[Link, socket.socket], frame: Frame, cut: int | None = None) -> bytes:
    """-> the payload that follows."""
    payload = bytes(range(frame.payload))
    peer[1].sendall((frame.encode() + payload)[:cut])
    return payload


def links_of(peers) -> list[Link]:
    return [link for link, _ in peers.values()]


def test_payloads_land_in_pieces_of_any_size_while_large_frames_go_out(peers):
    outgoing = {rank: bytes([rank]) * 3_000_000 for rank in peers}
    incoming = {rank: say(peer, WANTED) for rank, peer in peers.items()}
    with ThreadPoolExecutor() as pool:
        reads = {
            rank: pool.submit(theirs.recv, len(outgoing[rank]), socket.MSG_WAITALL)
            for rank, (_, theirs) in peers.items()
        }
        for rank, (link, _) in peers.items():
            link.send([memoryview(outgoing[rank])[:7], memoryview(b""), memoryview(outgoing[rank])[7:]])
        await_frames(links_of(peers), WANTED, 5.0)
        landed = {rank: bytearray(WANTED.payload) for rank in peers}
        for rank, (link, _) in peers.items():
            view = memoryview(landed[rank])
            link.take([view[:1], view[1:1], view[1:20], view[20:]])
        await_payloads(links_of(peers), WANTED, 5.0)
        assert landed == incoming
        assert {rank: read.result() for rank, read in reads.items()} == outgoing


@pytest.mark.parametrize("payload", [True, False])
def test_frames_of_earlier_attempts_are_dropped_and_counted(peers, payload):
    for peer in peers.values():
        for attempt in (0, 1, 1):
            say(peer, replace(WANTED, attempt=attempt, number=9, rows=2 * payload, layer=1))
        say(peer, WANTED)
    await_frames(links_of(peers), WANTED, 5.0)
    assert [(link.frame, link.dropped) for link in links_of(peers)] == [(WANTED, 3)] * 2


def test_a_payload_that_was_broken_off_ends_before_the_next_frame(peers):
    link, theirs = peers[1]
    whole = say(peers[1], replace(WANTED, attempt=1), cut=HEADER.size + 5)
    await_frames([link], replace(WANTED, attempt=1), 5.0)
    link.take([memoryview(bytearray(len(whole)))])
    with pytest.raises(RankLost):
        await_payloads([link], WANTED, 0.05)
    theirs.sendall(whole[5:])
    say(peers[1], WANTED)
    await_frames([link], WANTED, 5.0)
    assert (link.frame, link.dropped) == (WANTED, 0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"number": 6}, ["exchange 6", "exchange 5"]),
        ({"layer": 4}, ["layer 4", "layer 3"]),
        ({"kind": Kind.COMBINE}, ["combine of", "dispatch of"]),
        ({"width": 4}, [r"\(4, 1, 2\) there", r"\(3, 1, 2\) here"]),
        ({"dtype": 2}, [r"\(3, 2, 2\) there"]),
        ({"k": 1}, [r"\(3, 1, 1\) there"]),
        ({"attempt": 3}, ["rank 2 has broken off", "attempt 3", "attempt 2"]),
    ],
)
def test_a_rank_that_is_elsewhere_is_an_error_that_names_both_places(peers, change, says):
    say(peers[1], WANTED)
    say(peers[2], replace(WANTED, **change))
    with pytest.raises(ProtocolViolation, match="rank 2") as caught:
        await_frames(links_of(peers), WANTED, 5.0)
    for text in says:
        assert caught.match(text)


def test_of_a_rank_ahead_and_one_that_is_lost_the_lost_one_is_named(peers):
    say(peers[1], replace(WANTED, attempt=3))
    threading.Timer(0.1, lambda: peers[2][1].shutdown(socket.SHUT_RDWR)).start()
    with pytest.raises(RankLost, match="rank 2 has closed its link") as caught:
        await_frames(links_of(peers), WANTED, 5.0)
    assert caught.value.rank == 2


def test_bytes_that_are_no_frame_name_the_rank(peers):
    peers[2][1].sendall(b"GET / HTTP/1.1\r\n" * 3)
    with pytest.raises(ProtocolViolation, match="rank 2: not a frame"):
        await_frames([peers[2][0]], WANTED, 5.0)


@pytest.mark.parametrize("cut", [0, 1, 39, 40, 60])
def test_a_link_that_ends_or_falls_silent_anywhere_in_a_frame_is_a_lost_rank(peers, cut):
    link, theirs = peers[2]
    landed = memoryview(bytearray(WANTED.payload))

    def receive() -> None:
        if link.frame is None:
            await_frames([link], WANTED, 0.05)
            link.take([landed])
        await_payloads([link], WANTED, 0.05)

    say(peers[2], WANTED, cut=cut)
    with pytest.raises(RankLost, match=r"nothing from rank 2 for 0\.05 s in dispatch of exchange 5"):
        receive()
    theirs.close()
    with pytest.raises(RankLost, match="rank 2") as caught:
        receive()
    assert caught.value.rank == 2


def test_a_peer_that_reads_nothing_is_lost(peers):
    link, _ = peers[1]
    say(peers[1], replace(WANTED, rows=0))
    link.send([memoryview(bytes(10_000_000))])
    await_frames([link], WANTED, 0.2)
    link.take([])
    with pytest.raises(RankLost, match="rank 1"):
        await_payloads([link], WANTED, 0.2)


def repeat(action: Callable[[], object], over: threading.Event) -> threading.Thread:
    def run() -> None:
        while not over.wait(0.02):
            action()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_a_rank_that_waits_itself_is_not_taken_for_lost_but_the_silent_one_is(peers):
    """Rank 1 waits for rank 2, as we do, and says so; rank 2 has stopped."""
    over, sign = threading.Event(), Frame(Kind.WAITING, 5, 2)
    thread = repeat(lambda: say(peers[1], sign), over)
    began = time.monotonic()
    try:
        with pytest.raises(RankLost, match="rank 2") as caught:
            await_frames(links_of(peers), WANTED, 0.4)
    finally:
        over.set()
        thread.join()
    assert caught.value.rank == 2
    assert 0.4 <= time.monotonic() - began < 1.0
    heard = peers[1][1].recv(4096)  # and we have said that we wait
    assert [decode(heard[at : at + HEADER.size]) for at in range(0, len(heard), HEADER.size)][:2] == [sign, sign]
