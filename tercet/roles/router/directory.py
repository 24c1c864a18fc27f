"""The live workers, and what the router knows of each. No I/O."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tercet.core import Load, PairState, Role, WorkerInfo

Incarnation = tuple[str, int]  # worker id, epoch


@dataclass(eq=False)
class WorkerView:
    """One incarnation of a worker, as decisions see it."""

    info: WorkerInfo
    load: Load = field(default_factory=Load)  # as last reported
    up: bool = False  # its stream is open, and its engine has not died
    legs: int = 0  # that the router has put on it and that have not ended
    tokens: int = 0  # of their prompts, or of the images that they encode

    @property
    def incarnation(self) -> Incarnation:
        return self.info.worker_id, self.info.epoch

    @property
    def pairs(self) -> tuple[PairState, ...]:
        return self.load.pairs


class Directory:
    def __init__(self, roles: Sequence[Role], capacity: Mapping[Role, int]) -> None:
        """roles: of a request's workers, in order; one if a worker does all. capacity: legs that a worker takes."""
        self.encodes = Role.ENCODE in roles
        self.computing = tuple(role for role in roles if role is not Role.ENCODE)
        self.first, self.last = self.computing[0], self.computing[-1]
        self.roles = tuple(roles)
        self.capacity = capacity
        self.views: dict[str, WorkerView] = {}  # worker id -> its live incarnation
        self._leaving: list[WorkerView] = []  # no longer in the live set, but with legs that still run

    def replace(self, workers: Iterable[WorkerInfo]) -> list[WorkerView]:
        """Make `workers` the live set. -> those that are new."""
        wanted = {info.worker_id: info for info in workers}
        gone = []
        for worker_id, view in [*self.views.items()]:
            info = wanted.get(worker_id)
            if info is not None and replace(info, transfer_endpoint=view.info.transfer_endpoint) == view.info:
                view.info = info  # a rank of it may be reached elsewhere
            else:
                gone.append(self.views.pop(worker_id))
        self._leaving += gone
        new = [WorkerView(info) for worker_id, info in wanted.items() if worker_id not in self.views]
        self.views |= {view.info.worker_id: view for view in new}
        return new

    def take_parted(self) -> list[WorkerView]:
        """Workers that have left, each once: their legs have ended, or a successor proves that they are dead."""
        parted = [view for view in self._leaving if not view.legs or view.info.worker_id in self.views]
        self._leaving = [view for view in self._leaving if view not in parted]
        return parted

    def up(self, role: Role) -> list[WorkerView]:
        return [view for view in self.views.values() if view.up and view.info.role is role]

    def with_room(self, role: Role) -> list[WorkerView]:
        most = self.capacity[role]
        return [view for view in self.up(role) if view.legs < most]

    def introductions(self) -> Iterator[tuple[WorkerView, list[str]]]:
        """Workers, each with the endpoints of those of the next stage."""
        for sends, gets in itertools.pairwise(self.roles):
            endpoints = [view.info.transfer_endpoint for view in self.up(gets)]
            yield from ((view, endpoints) for view in self.up(sends))

    def missing_roles(self) -> list[str]:
        """Roles without a live worker."""
        return [role.value for role in self.roles if not self.up(role)]

    def live_pairs(self) -> set[tuple[Incarnation, ...]]:
        firsts, lasts = self.up(self.first), self.up(self.last)
        pairs = itertools.product(firsts, lasts) if self.first is not self.last else zip(firsts, firsts, strict=True)
        return {(one.incarnation, other.incarnation) for one, other in pairs}
