"""By what weights of experts cross to and from one rank during a move: a sender, a receiver, and memory at both.

A ticket is some experts for one rank. From when it is opened until it has landed, or nothing of it can be written any
more, its memory is in use; `close` waits for that.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from tercet.core import Ticket
from tercet.errors import Cancelled, DeadlineExceeded, TercetError
from tercet.kernels.moe import Experts
from tercet.roles.expert_staging import ExpertStaging, format_of
from tercet.roles.part import Identity
from tercet.transfer.mover.receiver import KvReceiver
from tercet.transfer.mover.sender import KvSender
from tercet.transfer.protocol.facts import (
    Complete,
    Granted,
    OpDone,
    Quiesced,
    ReceiveEvent,
    ReceiveFailed,
    SendEvent,
    SendFailed,
)
from tercet.transfer.transports.table import AUTO, in_device_memory, usable


class ExpertLinks:
    """`take` and `give` may run at once, each for one ticket after the other."""

    def __init__(self, who: Identity, rank: int, fingerprint: str, like: Experts) -> None:
        """like: experts as they are kept here; ranks that keep them otherwise are refused. Raises SpecError."""
        wanted = who.spec.transfer.transport
        transports = usable(AUTO if in_device_memory(wanted) else wanted)  # staging is in the host's memory
        config = replace(
            who.mover_config(f"{fingerprint} {format_of(like)}"), worker_id=f"{who.worker_id}-experts-{rank}"
        )
        self._rank, self._epoch = rank, who.epoch
        self._facts: dict[Ticket, queue.SimpleQueue[Any]] = {}
        self._in_use = set[Ticket]()  # their memory is read or written, here or by a peer
        self._changed = threading.Condition()
        with contextlib.ExitStack() as on_error:
            self._out, self._into = ExpertStaging(like), ExpertStaging(like)
            for staging in (self._out, self._into):
                on_error.callback(staging.memory.close)
            self._sender = KvSender(config, self._out.memory, transports, self._heard)
            on_error.callback(self._sender.stop)
            self._receiver = KvReceiver(config, who.epoch, self._into.memory, transports, self._heard)
            self.endpoint = self._receiver.start(who.host).encode()
            on_error.pop_all()
        self.room = self._into.room  # experts of a ticket

    def take(self, name: str, into: Sequence[Sequence[Tensor]], timeout_s: float) -> int:
        """into: of each expert that comes under this name, where its weights go. -> bytes. Raises TransferError,
        DeadlineExceeded, Cancelled."""
        ticket, deadline = Ticket(name, 0, self._epoch), time.monotonic() + timeout_s
        self._open(ticket)
        self._receiver.admit(ticket, 0, self._into.blocks(len(into)))
        while True:
            match self._next(ticket, deadline, self._receiver.cancel):
                case Complete(_, num_bytes, _):
                    break
                case ReceiveFailed(_, error):
                    raise error
        for place, weights in enumerate(into):
            self._into.read(place, weights)
        return num_bytes

    def give(self, name: str, epoch: int, endpoint: str, experts: Sequence[Sequence[Tensor]], timeout_s: float) -> None:
        """experts: their weights; to the receiver at the endpoint, of a worker of that epoch. Raises as `take`."""
        ticket, deadline = Ticket(name, 0, epoch), time.monotonic() + timeout_s
        for place, weights in enumerate(experts):
            self._out.write(place, weights)
        blocks, failed = self._out.blocks(len(experts)), None
        self._open(ticket)
        try:
            self._sender.open(ticket, endpoint, len(blocks), deadline)
        except TercetError:
            self._settle(ticket)  # nothing of it was begun
            raise
        while True:
            match self._next(ticket, deadline, self._sender.cancel):
                case Granted():
                    self._sender.push(ticket, 0, 0, blocks)
                    self._sender.finish(ticket, b"")
                case SendFailed(_, error):
                    failed = error
                case OpDone():
                    break
        if failed is not None:
            raise failed

    def cancel(self) -> None:
        """Whatever waits for an expert ends."""
        gone = Cancelled("this move of experts was given up")
        for ticket in [*self._facts]:
            self._sender.cancel(ticket, gone)
            self._receiver.cancel(ticket, gone)

    def close(self, timeout_s: float) -> bool:
        """False: a peer may still write here. Nothing is given back then, and it may be asked again."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._in_use, timeout_s):
                return False
        self._sender.stop()
        self._receiver.stop()
        self._out.memory.close()
        self._into.memory.close()
        return True

    # ---- facts

    def _open(self, ticket: Ticket) -> None:
        self._facts[ticket] = queue.SimpleQueue()
        with self._changed:
            self._in_use.add(ticket)

    def _heard(self, event: SendEvent | ReceiveEvent) -> None:
        """On a thread of the mover."""
        if isinstance(event, Complete | Quiesced | OpDone):
            self._settle(event.ticket)
        if (facts := self._facts.get(event.ticket)) is not None:
            facts.put(event)

    def _settle(self, ticket: Ticket) -> None:
        with self._changed:
            self._in_use.discard(ticket)
            self._changed.notify_all()

    def _next(self, ticket: Ticket, deadline: float, cancel: Callable[[Ticket, TercetError], None]) -> Any:
        """The next fact of a ticket. Raises DeadlineExceeded."""
        try:
            return self._facts[ticket].get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            late = DeadlineExceeded(f"rank {self._rank}: {ticket.request_id} did not end in time")
            cancel(ticket, late)
            raise late from None
