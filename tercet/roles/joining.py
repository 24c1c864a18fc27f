"""What the joint sender and the joint receiver of a group share (joint.py): facts of parts are joined on the event
loop, in the order in which each rank tells them."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from tercet.core import Ticket
from tercet.distributed.talk import Talk
from tercet.errors import PeerDown, TercetError, WorkerLost
from tercet.roles.facts_wire import error_of, fact_of
from tercet.transfer.protocol.facts import ReceiveEvent, SendEvent
from tercet.transfer.protocol.shards import Cancel, Part, ReceiveJoint, SendJoint

Joint = TypeVar("Joint", SendJoint, ReceiveJoint)


class Joining(ABC, Generic[Joint]):
    """Of both sides. Ticket -> its parts' facts so far, until the last one is told."""

    _verbs: Mapping[str, Callable[..., None]]  # what a rank is told -> what rank 0's mover does
    _cancel_kind: str  # of these, what gives a ticket up

    def __init__(
        self, loop: asyncio.AbstractEventLoop, on_event: Callable[[Any], None], others: Sequence[Talk]
    ) -> None:
        """on_event: called on the event loop. others: ranks 1, 2 ..."""
        self._loop, self._on_event = loop, on_event
        self._others = {talk.rank: talk for talk in others}
        self._joints: dict[Ticket, Joint] = {}
        self.counts: dict[int, dict[str, int]] = {}  # rank -> name -> messages that it dropped, and the like
        self._past = Counter[str]()  # what ranks that are lost had counted

    def _take_own(self, event: SendEvent | ReceiveEvent) -> None:
        """On a thread of rank 0's mover."""
        self._loop.call_soon_threadsafe(self._take, 0, event)

    def take(self, rank: int, packed: list[Any]) -> None:
        """On the thread that reads from the rank."""
        self._loop.call_soon_threadsafe(self._take, rank, fact_of(packed))

    def _take(self, rank: int, event: Any) -> None:
        joint = self._joints.get(event.ticket)
        if joint is None:
            return  # it could not be opened everywhere
        for effect in joint.take(rank, event):
            if isinstance(effect, Cancel):
                self._cancel_part(rank_of(effect.part), event.ticket, effect.error)
                continue
            if self._is_last(effect):
                del self._joints[event.ticket]
            self._on_event(effect)

    def lose(self, rank: int, error: TercetError) -> None:
        """The rank is gone with its memory: nothing can be written there any more, nor from there."""
        self._others.pop(rank, None)
        self._past.update(self.counts.pop(rank, {}))
        for ticket, joint in [*self._joints.items()]:
            if rank in joint.parts:
                for event in self._ends(ticket, error):
                    self._take(rank, event)

    def _tell(self, rank: int, kind: str, *fields: Any) -> None:
        """Rank 0's mover does it at once; one that is lost is told nothing."""
        if rank == 0:
            self._verbs[kind](*fields)
        elif (talk := self._others.get(rank)) is not None:
            talk.tell(kind, *(error_of(field) if isinstance(field, TercetError) else field for field in fields))

    def _cancel_part(self, rank: int, ticket: Ticket, error: TercetError) -> None:
        """A WorkerLost would be taken at the other end of the handover for its own worker's death."""
        told = PeerDown(str(error)) if isinstance(error, WorkerLost) else error
        self._tell(rank, self._cancel_kind, ticket, told)

    def regain(self, talk: Talk) -> None:
        """It is there again."""
        self._others[talk.rank] = talk

    @abstractmethod
    def _ends(self, ticket: Ticket, error: TercetError) -> list[Any]:
        """The facts that are left of a part that is gone."""

    def _counted(self, name: str) -> int:
        return self._past[name] + sum(counts.get(name, 0) for counts in [*self.counts.values()])

    @abstractmethod
    def _is_last(self, event: Any) -> bool: ...


def rank_of(part: Part) -> int:
    assert isinstance(part, int), "here a part is a rank"
    return part
