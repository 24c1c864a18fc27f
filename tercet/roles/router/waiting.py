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
        # Number of a place in front of a line for which nobody had room -> it is tried again then, or with more room.
        self._refused: dict[int, float] = {}

    @property
    def look_at(self) -> float | None:
        """When `next` may have one, if nothing changes before."""
        return min(self._refused.values(), default=None)

    def place(self, request: GenerateRequest) -> Place:
        return self._line_of(request).place(request.client, len(request.token_ids))

    def join(self, ongoing: Ongoing) -> None:
        self._line_of(ongoing.request).join(ongoing.place)

    def leave(self, ongoing: Ongoing, *, planned: bool) -> None:
        """planned: it is under way, so its client pays; else it was given up."""
        if ongoing.place.stands:
            self._line_of(ongoing.request).leave(ongoing.place, planned=planned)
        self._refused.pop(ongoing.place.number, None)

    def charge(self, ongoing: Ongoing, tokens: int) -> None:
        self._line_of(ongoing.request).charge(ongoing.place.client, tokens)

    def next(self, places: Mapping[int, Ongoing], now: float) -> Ongoing | None:
        """Who is to be planned: the first to come of those in front of a line, but one that holds its place until it
        has been admitted, or for whom there was no room and nothing has changed. What one that holds its place waits
        for is not given to who came later in the other line, unless it waits for an encode worker. places: who has
        which."""
        heads = sorted(head for line in self._lines if (head := line.head()) is not None)
        for number, place in enumerate(heads):
            ongoing = places[place.number]
            if ongoing.attempt is None and now >= self._refused.get(place.number, now):
                self._refused.pop(place.number, None)
                return ongoing
            if place.holds and not ongoing.awaits_encoder:
                for behind in heads[number + 1 :]:
                    self._refused.pop(behind.number, None)  # no time brings its turn
                return None
        return None

    def refuse(self, ongoing: Ongoing, now: float, *, encoders: bool) -> None:
        """Nobody has room for it. encoders: whether encode workers had."""
        ongoing.awaits_encoder = not encoders
        self._refused[ongoing.place.number] = now + ROOM_S

    def reconsider(self) -> None:
        """There is more room."""
        self._refused.clear()

    def _line_of(self, request: GenerateRequest) -> Line:
        return self._lines[self._is_apart(request)]
