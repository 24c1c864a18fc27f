"""The requests that wait to be planned, as data: fair between clients, first come first planned within one. No I/O.

Between clients it is deficit round robin over tokens (Shreedhar and Varghese, SIGCOMM 1995), and a client that has
just come is served before those that have been waiting (the new flows of RFC 8290, section 4.2), so a client that
sends little does not wait behind one that sends much. A client pays for a prompt when it is planned and for the output
when it has been made, so its credit may be negative.

The head stays the head until it leaves, even if it cannot be planned yet, so that those behind it do not take the room
that becomes free.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

QUANTUM = 64  # tokens of credit per turn: a short prompt's worth, so that a newcomer waits for few others


@dataclass(order=True)
class Place:
    """A request's place in the line, which it keeps if it comes back."""

    number: int  # in order of arrival
    client: str = field(compare=False)
    tokens: int = field(compare=False)  # of the prompt
    paid: bool = field(default=False, compare=False)
    stands: bool = field(default=False, compare=False)  # in the line
    holds: bool = field(default=False, compare=False)  # was rejected: it stays in front until it has been admitted


@dataclass
class _Flow:
    waiting: list[Place] = field(default_factory=list)  # a heap
    credit: int = QUANTUM  # tokens


class Line:
    def __init__(self, arrivals: Iterator[int]) -> None:
        """arrivals: numbers for places; lines that share it know who came first."""
        self._arrivals = arrivals
        self._clients: dict[str, _Flow] = {}  # those in one of the two lists
        self._new: deque[str] = deque()
        self._old: deque[str] = deque()
        self._head: Place | None = None

    def place(self, client: str, tokens: int) -> Place:
        """A place at the end of the client's own queue, for a request that will `join`."""
        return Place(next(self._arrivals), client, tokens)

    def join(self, place: Place) -> None:
        place.stands = True
        client = self._clients.get(place.client)
        if client is None:
            client = self._clients[place.client] = _Flow()
            self._new.append(place.client)
        heapq.heappush(client.waiting, place)
        if self._head is not None and self._head.client == place.client and place < self._head:
            self._head = place  # it came first, and has come back

    def leave(self, place: Place, *, planned: bool) -> None:
        """planned: it is under way, so its client pays; else it was given up."""
        place.stands = False
        client = self._clients[place.client]
        client.waiting.remove(place)
        heapq.heapify(client.waiting)
        if planned and not place.paid:
            place.paid = True
            client.credit -= place.tokens
        if self._head is place:
            self._head = None

    def charge(self, client: str, tokens: int) -> None:
        """The client's requests have produced tokens."""
        if client in self._clients:
            self._clients[client].credit -= tokens

    def head(self) -> Place | None:
        """Who is to be planned next; None if nobody waits."""
        while self._head is None and (self._new or self._old):
            self._turn(self._new or self._old)
        return self._head

    def _turn(self, clients: deque[str]) -> None:
        """Give the first client of a list its turn, or move it behind the old ones, or drop it."""
        name = clients[0]
        client = self._clients[name]
        if client.credit <= 0:
            client.credit += QUANTUM
            self._old.append(clients.popleft())
        elif client.waiting:
            self._head = client.waiting[0]
        elif clients is self._new:
            self._old.append(clients.popleft())
        else:
            del self._clients[clients.popleft()]
