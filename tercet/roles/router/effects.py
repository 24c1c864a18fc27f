"""What the router's decisions know of a request, and what they ask to be done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from tercet.core import Done, GenerateRequest, Leg, Progress, Role
from tercet.errors import TercetError, WorkerDrained
from tercet.roles.router.attempt import Attempt, AttemptFailed, RequestEvent, Told, WorkerBusy
from tercet.roles.router.directory import Directory, WorkerView
from tercet.roles.router.encoders import Holders
from tercet.roles.router.line import Place
from tercet.roles.router.policy import History, Plan
from tercet.roles.router.record import Decision, taken

Account = TypeVar("Account", Progress, Done)


@dataclass(eq=False)
class Ongoing:
    """A request from its submission to its end."""

    request: GenerateRequest
    name: str  # unique, for its tickets: clients reuse their ids
    place: Place
    give_up: float  # how long it waits for a role without a live worker, as time.monotonic()
    submitted: float
    told: Told = field(default_factory=Told)
    history: History = field(default_factory=History)
    attempt: Attempt | None = None  # while it runs
    attempts: int = 0
    failures: int = 0
    moves: int = 0  # attempts that ended because a worker was drained
    before: int = 0  # tokens that earlier attempts produced
    waited_s: float = 0.0  # before the attempt that brought the first token
    over: bool = False
    awaits_encoder: bool = False  # what it lacked last was an encode worker
    refused: bool = False  # nobody had room since its last attempt, and that was noted

    def begin(self, attempt: Attempt, now: float) -> None:
        self.attempt = attempt
        self.attempts += 1
        self.refused = False
        self.before = len(self.told.tokens)
        if not self.told.tokens:
            self.waited_s = now - self.submitted

    def accounted(self, event: Account) -> Account:
        """With what only the router knows of it."""
        assert self.attempt is not None
        plan = self.attempt.plan
        workers = [(w.info.role.value, w.info.worker_id) for w in reversed(plan.workers)]
        if plan.encode:
            workers.insert(0, (Role.ENCODE.value, ", ".join(sorted(w.info.worker_id for w in plan.encode))))
        times = event.times.longer("queue", self.waited_s)
        return replace(event, times=times, workers=tuple(workers), attempts=self.failures + self.moves + 1)

    def decided(
        self, before: History, directory: Directory, holders: Holders, plan: Plan | None, now: float
    ) -> list[Note]:
        """For the record: which workers it gets, and why. before: its history when that was decided. plan: None: nobody
        has room, which is noted once."""
        if plan is None and self.refused:
            return []
        self.refused = plan is None
        found = taken(self.request, before, directory, holders, plan, self.attempts + 1, now)
        return [Note(self, found)]

    def ended(self, why: WorkerBusy | AttemptFailed, now: float) -> list[Note]:
        """For the record: how its attempt ended."""
        if isinstance(why, WorkerBusy):
            return [Note(self, AttemptEnd(now, "rejected", why.worker.info.worker_id, "", why.reason))]
        how = "drained" if isinstance(why.error, WorkerDrained) else "failed"
        reporter = "" if why.reporter is None else why.reporter.info.worker_id
        return [Note(self, AttemptEnd(now, how, reporter, why.error.code(), str(why.error)))]


@dataclass(frozen=True)
class AttemptEnd:
    """Why an attempt ended without an answer."""

    at: float  # time.monotonic()
    how: str  # rejected, drained or failed
    worker: str  # who said so; empty: nobody, the deadline has passed
    code: str  # of the error; empty if it was rejected
    message: str


@dataclass(frozen=True)
class Note:
    """Something for the record of a request."""

    ongoing: Ongoing
    said: Decision | AttemptEnd


@dataclass(frozen=True)
class StartLeg:
    worker: WorkerView
    leg: Leg


@dataclass(frozen=True)
class AbortLeg:
    worker: WorkerView
    leg: Leg


@dataclass(frozen=True)
class Introduce:
    """Have a worker connect to those of the next stage, so that no request waits for a handshake."""

    worker: WorkerView
    endpoints: list[str]


@dataclass(frozen=True)
class Part:
    """Close the stream to a worker that has left the live set: none of our legs runs there."""

    worker: WorkerView


@dataclass(frozen=True)
class Tell:
    """The request's next event."""

    ongoing: Ongoing
    event: RequestEvent


@dataclass(frozen=True)
class End:
    """The request is over: with `Done`, which was told, or with an error."""

    ongoing: Ongoing
    error: TercetError | None


@dataclass(frozen=True)
class Begun:
    """An attempt at a request begins; its legs follow."""

    ongoing: Ongoing
    plan: Plan


@dataclass(frozen=True)
class Ended:
    """The attempt that ran is over. error: why it did not succeed."""

    ongoing: Ongoing
    error: TercetError | None


Watcher = Callable[[GenerateRequest, Decision | AttemptEnd], None]
Effect = Begun | Ended | StartLeg | AbortLeg | Introduce | Part | Tell | End | Note
