"""Moves frames on all links of a rank at once, and notices the rank that does not come."""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Sequence

from tercet.distributed.frames import Frame, Kind
from tercet.distributed.link import Link
from tercet.errors import ProtocolViolation, RankLost

SIGNS = 4  # of life within a timeout, to ranks that may wait for this one while it waits itself


def await_frames(links: Sequence[Link], wanted: Frame, timeout_s: float) -> None:
    """Send what is queued and receive until a frame like `wanted` stands on each link; drop those of earlier attempts.
    Raises RankLost for a rank that is silent for `timeout_s` or whose link breaks, ProtocolViolation if one is at
    another exchange."""

    def stands(link: Link) -> bool:
        if link.frame is None or link.receiving:
            return False
        if link.frame.attempt < wanted.attempt:
            link.drop()
            return False
        return link.frame.attempt == wanted.attempt and _in_step(link.rank, link.frame, wanted)

    _run(links, stands, wanted, timeout_s, until_sent=False)


def await_payloads(links: Sequence[Link], wanted: Frame, timeout_s: float) -> None:
    """Send what is queued and receive what was asked for by `Link.take`. Raises as `await_frames`."""
    _run(links, lambda link: not link.receiving, wanted, timeout_s, until_sent=True)


def _in_step(rank: int, found: Frame, wanted: Frame) -> bool:
    if (found.kind, found.number, found.layer) != (wanted.kind, wanted.number, wanted.layer):
        raise ProtocolViolation(f"rank {rank} is out of step: {found} came from it; this rank is at {wanted}")
    if found.shape != wanted.shape:
        raise ProtocolViolation(f"rank {rank}, {found}: width, dtype, k are {found.shape} there, {wanted.shape} here")
    return True


def _run(
    links: Sequence[Link], done: Callable[[Link], bool], wanted: Frame, timeout_s: float, *, until_sent: bool
) -> None:
    """Move bytes until all links are done, and until all is sent if that is asked for."""
    began = signed = time.monotonic()
    while True:
        open_ = [link for link in links if not done(link)]
        if not open_ and not (until_sent and any(link.sending for link in links)):
            return
        _check_ahead(open_, wanted)
        _move(links, open_, timeout_s / SIGNS)
        now = time.monotonic()
        for link in links:
            if (link.sending or link in open_) and not _is_ahead(link, wanted):
                _check_silence(link, now - max(began, link.moved), wanted, timeout_s)
        if now - signed > timeout_s / SIGNS:
            signed = now
            for link in links:
                link.sign(Frame(Kind.WAITING, wanted.number, wanted.attempt))


def _move(links: Sequence[Link], open_: Sequence[Link], wait_s: float) -> None:
    """Wait until some link can move bytes, and let it."""
    poll = select.poll()
    by_fd = {}  # socket -> link
    for link in links:
        reads = link in open_ and (link.frame is None or link.receiving)
        events = select.POLLIN * reads | select.POLLOUT * link.sending
        if events:
            poll.register(link.sock, events)
            by_fd[link.sock.fileno()] = link
    for fd, event in poll.poll(wait_s * 1000):
        link = by_fd[fd]
        if link.sending:
            link.flush()
        if link in open_ and event & ~select.POLLOUT:
            link.receive()


def _is_ahead(link: Link, wanted: Frame) -> bool:
    """Whether it has broken this attempt off."""
    return link.frame is not None and link.frame.attempt > wanted.attempt


def _check_ahead(links: Sequence[Link], wanted: Frame) -> None:
    """A rank that is ahead knows of a loss, of which this one hears by itself if it waits for others, too."""
    if links and all(_is_ahead(link, wanted) for link in links):
        rank, frame = links[0].rank, links[0].frame
        raise ProtocolViolation(f"rank {rank} has broken off: {frame} came from it; this rank is at {wanted}")


def _check_silence(link: Link, seconds: float, wanted: Frame, timeout_s: float) -> None:
    if seconds > timeout_s:
        raise RankLost(f"nothing from rank {link.rank} for {timeout_s:g} s in {wanted}", link.rank)
