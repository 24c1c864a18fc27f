"""Joins the facts of a ticket's parts into those that its role hears.

    SendJoint      the parts of one source, one for each destination
    ReceiveJoint   the parts of one destination, one for each rank, whose receivers lease the same blocks

What all parts must do (grant, release, complete, become quiet) is reported when the last one has; a failure or a note,
with the first. A failure cancels the other parts; behind it nothing is reported but the end.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from tercet.errors import TercetError
from tercet.transfer.protocol.facts import (
    Complete,
    Granted,
    Noted,
    OpDone,
    Quiesced,
    ReceiveEvent,
    ReceiveFailed,
    Released,
    SendEvent,
    SendFailed,
)

Part = Hashable


@dataclass(frozen=True)
class Cancel:
    """Give the ticket up at this part too."""

    part: Part
    error: TercetError


class SendJoint:
    def __init__(self, parts: Iterable[Part]) -> None:
        self.parts = list(parts)  # without OpDone
        self._first_blocks: dict[Part, int | None] = dict.fromkeys(self.parts)  # part -> first block of its grant
        self._unreleased = set(self.parts)
        self._bytes = 0
        self._failed = False

    def take(self, part: Part, event: SendEvent) -> list[SendEvent | Cancel]:
        match event:
            case Granted(ticket, first_block):
                self._first_blocks[part] = first_block
                granted = [first for first in self._first_blocks.values() if first is not None]
                whole = len(granted) == len(self._first_blocks) and not self._failed
                return [Granted(ticket, min(granted))] if whole else []
            case Released(ticket, num_bytes):
                self._unreleased.discard(part)
                self._bytes += num_bytes
                return [] if self._unreleased else [Released(ticket, self._bytes)]
            case SendFailed(_, error) if not self._failed:
                self._failed = True
                return [event, *(Cancel(other, error) for other in self.parts if other != part)]
            case OpDone():
                self.parts.remove(part)
                return [] if self.parts else [event]
        return []


class ReceiveJoint:
    def __init__(self, parts: Iterable[Part]) -> None:
        self.parts = list(parts)  # without Complete or Quiesced
        self._complete: list[Complete] = []
        self._verified: list[int] = []  # blocks of each part that failed
        self._failed = self._noted = False

    def take(self, part: Part, event: ReceiveEvent) -> list[ReceiveEvent | Cancel]:
        match event:
            case Noted() if not self._noted and not self._failed:
                self._noted = True
                return [event]
            case ReceiveFailed(_, error) if not self._failed:
                self._failed = True
                return [event, *(Cancel(other, error) for other in self.parts if other != part)]
            case Complete():
                self._complete.append(event)
                return self._settled(part, event)
            case Quiesced(_, verified):
                self._verified.append(verified)
                return self._settled(part, event)
        return []

    def _settled(self, part: Part, event: Complete | Quiesced) -> list[ReceiveEvent | Cancel]:
        self.parts.remove(part)
        if self.parts:
            return []
        if self._failed:
            return [Quiesced(event.ticket, min(self._verified))]
        num_bytes, transfer_s = (sum(e.num_bytes for e in self._complete), max(e.transfer_s for e in self._complete))
        return [Complete(event.ticket, num_bytes, transfer_s)]
