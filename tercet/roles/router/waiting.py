"""Who waits to be planned. A request without images never waits for an encode worker, nor behind one that does: those
that encode workers have a part in stand in a line of their own. No I/O, no clock."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

from tercet.core import GenerateRequest
from tercet.roles.router.effects import Ongoing
from tercet.roles.router.line import Line, Place

ROOM_S = 0.2  # who is first in a line, and for whom nobody had room, is tried again after so long at the latest


class Waiting:
    def __init__(self, is_encoded_apart: Callable[[GenerateRequest], bool]) -> None:
        arrivals = itertools.count(1)
        self._lines = (Line(arrivals), Line(arrivals))
        self._is_apart = is_encoded_apart
        self._refused: set[int] = set()  # numbers of places in front of a line for which nobody had room
        self._look_at = 0.0  # they are tried again then, or once there is more room

    @property
    def look_at(self) -> float | None:
        """When `next` may have one, if nothing changes before."""
        return self._look_at if self._refused else None

    def place(self, request: GenerateRequest) -> Place:
        return self._line_of(request).place(request.client, len(request.token_ids))

    def join(self, ongoing: Ongoing) -> None:
        self._line_of(ongoing.request).join(ongoing.place)

    def leave(self, ongoing: Ongoing, *, planned: bool) -> None:
        """planned: it is under way, so its client pays; else it was given up."""
        if ongoing.place.stands:
            self._line_of(ongoing.request).leave(ongoing.place, planned=planned)
        self._refused.discard(ongoing.place.number)

    def charge(self, ongoing: Ongoing, tokens: int) -> None:
        self._line_of(ongoing.request).charge(ongoing.place.client, tokens)

    def next(self, places: Mapping[int, Ongoing], now: float) -> Ongoing | None:
        """Who is to be planned: the first to come of those in front of a line, but one that holds its place until it
        has been admitted, or for whom there was no room and nothing has changed. places: who has which."""
        heads = [head for line in self._lines if (head := line.head()) is not None]
        for place in sorted(heads):
            ongoing = places[place.number]
            if ongoing.attempt is None and (place.number not in self._refused or now >= self._look_at):
                self._refused.discard(place.number)
                return ongoing
        return None

    def refuse(self, ongoing: Ongoing, now: float) -> None:
        """Nobody has room for it."""
        self._refused.add(ongoing.place.number)
        self._look_at = now + ROOM_S

    def reconsider(self) -> None:
        """There is more room."""
        self._refused.clear()

    def _line_of(self, request: GenerateRequest) -> Line:
        return self._lines[self._is_apart(request)]
