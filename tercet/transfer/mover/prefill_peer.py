"""What a receiver keeps of one prefill worker that is connected: its control link and its data links."""

from __future__ import annotations

import os
import secrets
import select
import threading
from dataclasses import dataclass

from tercet.transfer.links.channel import Channel, Mailbox
from tercet.transfer.mover.lander import Lander
from tercet.transfer.mover.on_device import DeviceLander
from tercet.transfer.protocol.incoming import Terms
from tercet.transfer.transports.contract import Inlet, Transport


@dataclass(eq=False)
class Link:
    """A data link of a pair."""

    channel: Channel
    inlet: Inlet
    lander: Lander | DeviceLander
    thread: threading.Thread


class PrefillPeer:
    """One prefill worker, connected."""

    def __init__(self, transport: Transport, channel: Channel, terms: Terms, worker_id: str) -> None:
        self.id = secrets.token_hex(16)
        self.transport = transport
        self.channel = channel
        self.terms = terms
        self.quiet_fd = os.eventfd(0)  # readable once the writer has said, in a new HELLO, that this pair is over
        self.mailbox = Mailbox(channel, worker_id)
        self.thread = threading.current_thread()  # the reader of the control link
        self.links: list[Link] = []
        self.over = False
        self.said_goodbye = False

    @property
    def _ends(self) -> list[int]:
        """Readable once nothing more will be written."""
        return [self.quiet_fd, *(link.inlet.death_fd for link in self.links if link.inlet.death_fd is not None)]

    def await_end(self, stop_fd: int) -> bool:
        """Block until its process is dead or has said that it writes no more (True), or until `stop_fd` is readable
        (False)."""
        poller, ends = select.poll(), self._ends
        for fd in (*ends, stop_fd):
            poller.register(fd, select.POLLIN)
        return any(fd in ends for fd, _ in poller.poll())

    def close(self) -> None:
        """It has ended."""
        for fd in self._ends:
            os.close(fd)

    def shutdown(self) -> None:
        self.channel.shutdown()
        for link in list(self.links):
            link.channel.shutdown()
