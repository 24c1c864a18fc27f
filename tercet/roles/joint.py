"""The movers of a group's ranks as one: a ticket has a part at each rank that has something to send, or to get, and the
facts of its parts are joined (transfer/protocol/shards.py).

    rank 0   ─open?, connect?, finish, stop_sending─>  rank      its KvSender
             ─admit, refuse, stop_receiving─────────>            its KvReceiver
             <─sent(fact), landed(fact)─────────────

Facts are joined on the event loop, in the order in which each rank tells them; all else is for any thread.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from tercet.core import PairState, Ticket
from tercet.distributed.place import Place
from tercet.distributed.talk import Talk
from tercet.engine.replicas import replica_of
from tercet.errors import PeerDown, TercetError, WorkerDrained, WorkerLost
from tercet.roles.joining import Joining, rank_of
from tercet.transfer.memory.layout import KvLayout
from tercet.transfer.mover.receiver import KvReceiver
from tercet.transfer.mover.sender import KvSender
from tercet.transfer.protocol.facts import (
    Complete,
    OpDone,
    Quiesced,
    ReceiveEvent,
    ReceiveFailed,
    SendEvent,
    SendFailed,
)
from tercet.transfer.protocol.shards import ReceiveJoint, SendJoint
from tercet.transfer.transports.contract import Endpoint
from tercet.transfer.transports.group_endpoint import GroupEndpoint

DIAL_S = 30.0  # for a rank to connect and offer


class Receiver(Protocol):
    """A `KvReceiver`, or those of the ranks of a group as one."""

    def admit(self, ticket: Ticket, first_block: int, blocks: Sequence[int]) -> None: ...
    def refuse(self, ticket: Ticket, reason: str) -> None: ...
    def cancel(self, ticket: Ticket, error: TercetError) -> None: ...
    def dropped(self) -> Counter[str]: ...
    def refused(self) -> Counter[str]: ...
    def corrupt(self) -> int: ...
    def stop(self) -> None: ...


class JointSender(Joining[SendJoint]):
    def __init__(
        self,
        own: Callable[[Callable[[SendEvent], None]], KvSender],
        places: Sequence[Place],
        layouts: Sequence[KvLayout],
        loop: asyncio.AbstractEventLoop,
        on_event: Callable[[SendEvent], None],
        others: Sequence[Talk],
    ) -> None:
        """own: makes rank 0's, which tells its events to what it is given. places, layouts: of the ranks."""
        super().__init__(loop, on_event, others)
        # Ticket -> why parts were cancelled, of those that may not be open yet
        self._opening: dict[Ticket, list[TercetError]] = {}
        self._own, self._places, self._layouts = own(self._take_own), places, layouts
        self._verbs = {"finish": self._own.finish, "stop_sending": self._own.cancel}
        self._cancel_kind = "stop_sending"
        self.push = self._own.push

    def open(self, ticket: Ticket, endpoint: str, num_tokens: int, deadline: float, dial: bool = True) -> str:
        """As `KvSender.open`, at each rank that the worker at `endpoint` needs something from. Raises WorkerDrained,
        too: a rank that it comes from or goes to is lost."""
        group = GroupEndpoint.decode(endpoint)
        theirs = replica_of(ticket, group.data)
        if not group.stands(theirs):
            raise WorkerDrained(f"the rank of replica {theirs} of {group.worker_id} is lost")
        parts = self._parts(group, replica_of(ticket, self._places[0].data), theirs)
        self._joints[ticket], self._opening[ticket] = SendJoint(parts), []
        names: set[str] = set()
        opened: list[int] = []
        try:
            for rank, endpoints in parts.items():
                names.add(self._open(rank, ticket, endpoints, num_tokens, deadline, dial))
                opened.append(rank)
        except TercetError as error:
            self._joints.pop(ticket, None)
            for rank in opened:
                self._cancel_part(rank, ticket, error)
            raise
        finally:
            cancelled = self._opening.pop(ticket)
        for cause in cancelled:  # it may have come to a part before that was open
            self.cancel(ticket, cause)
        return "+".join(sorted(names))

    def _parts(self, group: GroupEndpoint, own: int, theirs: int) -> dict[int, list[str]]:
        """Rank of the replica `own` -> the endpoints of their replica that it sends to."""
        here = [place.rank for place in self._places if place.data_rank == own]
        meeting = {rank: group.meeting(self._layouts[rank], theirs) for rank in here}
        return {rank: endpoints for rank, endpoints in meeting.items() if endpoints}

    def _every_part(self, endpoint: str) -> dict[int, list[str]]:
        """Of all replicas with all that stand."""
        group, found = GroupEndpoint.decode(endpoint), dict[int, list[str]]()
        for own in range(self._places[0].data):
            for theirs in filter(group.stands, range(group.data)):
                for rank, endpoints in self._parts(group, own, theirs).items():
                    found[rank] = [*found.get(rank, []), *endpoints]
        return found

    def _open(
        self, rank: int, ticket: Ticket, endpoints: list[str], num_tokens: int, deadline: float, dial: bool
    ) -> str:
        if rank == 0:
            return self._own.open(ticket, endpoints, num_tokens, deadline, dial)
        left_s = max(0.0, deadline - time.monotonic())
        try:
            return str(self._ask(rank, "open", ticket, endpoints, num_tokens, left_s))
        except WorkerLost as error:  # of this rank alone: the next attempt gets another one
            raise WorkerDrained(str(error)) from error

    def _ask(self, rank: int, kind: str, *fields: Any) -> Any:
        if (talk := self._others.get(rank)) is None:
            raise WorkerLost(f"rank {rank} of the group is lost")
        return talk.ask(kind, *fields, timeout_s=DIAL_S)

    def finish(self, ticket: Ticket, note: bytes) -> None:
        """The note goes with the first part. A rank hears this behind the step that it ends with: rank 0 knows a step's
        result only when every rank has computed its share."""
        joint = self._joints.get(ticket)
        ranks = [] if joint is None else [*map(rank_of, joint.parts)]
        for number, rank in enumerate(ranks):
            self._tell(rank, "finish", ticket, b"" if number else note)

    def cancel(self, ticket: Ticket, error: TercetError) -> None:
        joint = self._joints.get(ticket)
        for rank in [] if joint is None else map(rank_of, [*joint.parts]):
            self._cancel_part(rank, ticket, error)

    def connect(self, endpoint: str) -> None:
        """Of all ranks that are here. Raises PeerDown or PeerMismatch of the first that cannot."""
        try:
            for rank, endpoints in self._every_part(endpoint).items():
                if rank in self._others:
                    self._ask(rank, "connect", endpoints)
                elif rank == 0:
                    for each in endpoints:
                        self._own.connect(each)
        except WorkerLost as error:
            raise PeerDown(str(error)) from error

    def connected(self, endpoint: str) -> bool:
        """Only if no other rank has to be asked."""
        parts = self._every_part(endpoint)
        return parts.keys() == {0} and all(map(self._own.connected, parts[0]))

    def attested(self) -> list[PairState]:
        """Rank 0's pairs, of each worker and transport the slowest one."""
        slowest: dict[tuple[str, str], PairState] = {}
        for pair in self._own.attested():
            known = slowest.setdefault((pair.worker_id, pair.transport), pair)
            if pair.bandwidth < known.bandwidth:
                slowest[pair.worker_id, pair.transport] = pair
        return [*slowest.values()]

    def dropped(self) -> Counter[str]:
        return self._own.dropped() + Counter({"ranks": self._counted("send_dropped")})

    def stop(self) -> None:
        self._own.stop()

    def _is_last(self, event: Any) -> bool:
        return isinstance(event, OpDone)

    def _ends(self, ticket: Ticket, error: TercetError) -> list[Any]:
        return [SendFailed(ticket, error), OpDone(ticket)]

    def _cancel_part(self, rank: int, ticket: Ticket, error: TercetError) -> None:
        if (cancelled := self._opening.get(ticket)) is not None:
            cancelled.append(error)
        super()._cancel_part(rank, ticket, error)


class JointReceiver(Joining[ReceiveJoint]):
    def __init__(
        self,
        own: Callable[[Callable[[ReceiveEvent], None]], KvReceiver],
        places: Sequence[Place],
        sources: Mapping[int, int],
        loop: asyncio.AbstractEventLoop,
        on_event: Callable[[ReceiveEvent], None],
        others: Sequence[Talk],
    ) -> None:
        """own: makes rank 0's, as above. places: of the ranks. sources: rank -> how many ranks of a prefill worker send
        to it."""
        super().__init__(loop, on_event, others)
        self._own, self._places, self._sources = own(self._take_own), places, sources
        self._verbs = {"admit": self._own.admit, "refuse": self._own.refuse, "stop_receiving": self._own.cancel}
        self._cancel_kind = "stop_receiving"

    def admit(self, ticket: Ticket, first_block: int, blocks: Sequence[int]) -> None:
        ranks = self._ranks_of(ticket)
        self._joints[ticket] = ReceiveJoint(ranks)
        for rank in ranks:
            self._tell(rank, "admit", ticket, first_block, blocks, self._sources[rank])

    def refuse(self, ticket: Ticket, reason: str) -> None:
        for rank in self._ranks_of(ticket):
            self._tell(rank, "refuse", ticket, reason)

    def cancel(self, ticket: Ticket, error: TercetError) -> None:
        for rank in self._ranks_of(ticket):
            self._cancel_part(rank, ticket, error)

    def _ranks_of(self, ticket: Ticket) -> list[int]:
        """Those of the replica that it goes to."""
        replica = replica_of(ticket, self._places[0].data)
        return [place.rank for place in self._places if place.data_rank == replica]

    def dropped(self) -> Counter[str]:
        return self._own.dropped() + Counter({"ranks": self._counted("receive_dropped")})

    def refused(self) -> Counter[str]:
        return self._own.refused() + Counter({"ranks": self._counted("receive_refused")})

    def corrupt(self) -> int:
        return self._own.corrupt() + self._counted("corrupt")

    def start(self, host: str) -> Endpoint:
        """Rank 0's."""
        return self._own.start(host)

    def stop(self) -> None:
        self._own.stop()

    def _is_last(self, event: Any) -> bool:
        return isinstance(event, Complete | Quiesced)

    def _ends(self, ticket: Ticket, error: TercetError) -> list[Any]:
        return [ReceiveFailed(ticket, error), Quiesced(ticket)]
