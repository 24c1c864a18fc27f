"""What users ask of a controller while it serves: how many workers a role has, which role a worker has.

    asked ──> answer: why not; or none, and another target ──> of a role's: outcome, once the worker serves in it

A request is answered once, however often it is heard. A worker that refuses its new role, because something that it
needs is not there, is to have its old one again: else the cluster would be short of it for as long as nobody looks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tercet.cluster.members import Starter, Target
from tercet.errors import ClusterError, TercetError, WorkerLost
from tercet.placement.roles import scaled
from tercet.placement.switching import switched

MOST_ANSWERS = 32  # kept for repeated requests; more than the requests that a gateway holds (actors.MOST_ASKED)


@dataclass
class _Switch:
    """A worker on its way to another role. Times are time.monotonic()."""

    ask_id: str
    before: str
    role: str
    begun: float
    drained: float | None = None
    how: str = "in_place"  # or restarted, once it has needed another process

    def outcome(self, now: float) -> dict[str, Any]:
        drain_s = 0.0 if self.drained is None else self.drained - self.begun
        return {"how": self.how, "seconds": now - self.begun, "drain_s": drain_s}


class Changes:
    """It replaces the target; the controller makes the cluster so."""

    def __init__(self, starter: Starter, report: Callable[[str], None]) -> None:
        self._starter, self._report = starter, report
        self._answers: dict[str, dict[str, str]] = {}  # id of a request -> error, if there is one
        self._outcomes: dict[str, dict[str, Any]] = {}  # id of a role's request -> how it ended
        self._under_way: dict[str, _Switch] = {}  # worker id -> what it switches to
        self._refused: dict[str, TercetError] = {}  # worker id -> why it cannot have its new role
        self._serving: Mapping[str, str] = {}  # worker id -> role, of those that the gateway uses

    @property
    def overview(self) -> dict[str, Any]:
        """What those who have asked are told, as plain data."""
        return {"answers": dict(self._answers), "switches": dict(self._outcomes)}

    async def applied(self, target: Target, asked: Iterable[Mapping[str, Any]], taken: Iterable[str]) -> Target:
        """The target from now on. taken: ids that no new worker may have."""
        while self._refused:
            target = self._undone(target, *self._refused.popitem())
        for change in asked:
            if change["id"] not in self._answers:
                target, self._answers[change["id"]] = await self._answered(target, change, taken)
        for kept in (self._answers, self._outcomes):
            for old in list(kept)[:-MOST_ANSWERS]:
                del kept[old]
        return target

    # ---- what the controller sees

    def drained(self, worker_id: str) -> None:
        """It begins to serve in another role."""
        if (switch := self._under_way.get(worker_id)) is not None:
            switch.drained = time.monotonic()

    def restarted(self, worker_id: str) -> None:
        """It begins in a new process."""
        if (switch := self._under_way.get(worker_id)) is not None:
            switch.how = "restarted"

    def lost(self, worker_id: str, role: str, error: TercetError) -> None:
        """It was in that role, or on its way there, and its process ends for this."""
        switch = self._under_way.get(worker_id)
        if switch is not None and switch.role == role and not isinstance(error, WorkerLost):
            self._refused[worker_id] = error

    def serving(self, roles: Mapping[str, str]) -> None:
        """roles: worker id -> role, of those that the gateway uses."""
        self._serving = roles
        for worker_id, switch in list(self._under_way.items()):
            if roles.get(worker_id) != switch.role:
                continue
            outcome = switch.outcome(time.monotonic())
            how = "" if switch.how == "in_place" else " in another process"
            took = f"{outcome['seconds']:.2f} s, of which {outcome['drain_s']:.2f} s to drain"
            self._report(f"{worker_id}, which was {switch.before}, serves as {switch.role}{how}: {took}")
            self._end(worker_id, outcome)

    # ---- inside

    async def _answered(
        self, target: Target, change: Mapping[str, Any], taken: Iterable[str]
    ) -> tuple[Target, dict[str, str]]:
        role = change["role"]
        refused = (
            f"{change['worker']} cannot become {role}"
            if "worker" in change
            else f"{role} cannot have {change['replicas']} workers"
        )
        try:
            if "worker" in change:
                target = self._switched(target, change)
            else:
                target = await self._scaled(target, role, change["replicas"], [*taken])
        except TercetError as error:
            why = str(error).removeprefix(f"{refused}: ").removeprefix(f"roles.{role}: ")
            has = ", ".join(f"{wanted.replicas} {name}" for name, wanted in target.spec.roles.items())
            return target, {"code": error.code(), "message": f"{refused}: {why}; it stays at {has}"}
        self._end_superseded(target)
        return target, {}

    async def _scaled(self, target: Target, role: str, replicas: int, taken: list[str]) -> Target:
        spec = scaled(target.spec, role, replicas)
        if spec == target.spec:
            return target
        # Who is too many goes from the end: first those that do not serve, then the newest.
        workers = sorted(target.placement.workers, key=lambda worker: worker.worker_id not in self._serving)
        kept = replace(target, placement=replace(target.placement, workers=tuple(workers)))
        placement = await self._starter.place(kept, spec, taken)
        self._report(f"{role} is to have {replicas} worker{'s' if replicas > 1 else ''}")
        return Target(spec, placement)

    def _switched(self, target: Target, change: Mapping[str, Any]) -> Target:
        worker_id, role = change["worker"], change["role"]
        changed = Target(*switched(target.spec, target.placement, worker_id, role))
        self._end_superseded(changed)
        before = target.worker(worker_id).role.value
        self._under_way[worker_id] = _Switch(change["id"], before, role, time.monotonic())
        self._report(f"{before} {worker_id} is to be {role}")
        return changed

    def _end_superseded(self, target: Target) -> None:
        """Switches that a later request has made needless."""
        for worker_id, switch in list(self._under_way.items()):
            wanted = target.members.get(worker_id)
            if wanted != switch.role:
                to_do = f"be {wanted}" if wanted else "go"
                error = ClusterError(f"another request came meanwhile: {worker_id} is to {to_do}")
                self._end(worker_id, switch.outcome(time.monotonic()) | _told_as("superseded", error))

    def _undone(self, target: Target, worker_id: str, error: TercetError) -> Target:
        switch = self._under_way.get(worker_id)
        if switch is None:  # a later request has made it needless
            return target
        try:
            target = Target(*switched(target.spec, target.placement, worker_id, switch.before))
            follows = f"is to be {switch.before} again"
        except TercetError as fault:
            follows = f"goes on trying, since it cannot be {switch.before} either ({fault})"
        told = type(error)(f"{worker_id} cannot be {switch.role} and {follows}: {error}")
        self._report(str(told))
        self._end(worker_id, switch.outcome(time.monotonic()) | _told_as("failed", told))
        return target

    def _end(self, worker_id: str, outcome: dict[str, Any]) -> None:
        self._outcomes[self._under_way.pop(worker_id).ask_id] = outcome
        self._refused.pop(worker_id, None)


def _told_as(how: str, error: TercetError) -> dict[str, str]:
    return {"how": how, "code": error.code(), "message": str(error)}
