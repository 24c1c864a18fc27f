"""What the router does, as a state machine: verbs and reports in, effects out. No I/O, no clock, no randomness.

    submit ─> line ─> plan ─legs started─> tokens ... Done
               ^        │
               │        ├─ rejected: the other leg is cancelled, the busy worker is passed over; the request goes back
               │        │  to its place in the line, and nobody behind it is planned before it has been admitted
               └────────┴─ failed or lost: likewise, and the new attempt goes on behind the last token that came

Requests wait in line (waiting.py) while no worker has room. The legs on each worker are counted here, so a worker
rejects one only if it runs out of blocks. Which workers a request gets: policy.py.

A new attempt sends prompt + emitted tokens as its prompt; the sampler depends only on seed and position
(engine/sampler.py), so no token is lost or repeated.

Time comes in as `now`, time.monotonic(); `wake_at` says when `tick` is due.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Iterable, Mapping, Sequence

from tercet.core import (
    Admitted,
    Done,
    GenerateRequest,
    Leg,
    Load,
    Outcome,
    Progress,
    PromptLogprobs,
    Role,
    Ticket,
    TokenEvent,
    WorkerInfo,
)
from tercet.errors import (
    Cancelled,
    DeadlineExceeded,
    ImageForgotten,
    NoWorkers,
    Overloaded,
    TercetError,
    TransferError,
    WorkerDrained,
    WorkerLost,
)
from tercet.roles.router.attempt import Attempt, AttemptFailed, WorkerBusy
from tercet.roles.router.directory import Directory, Incarnation, WorkerView
from tercet.roles.router.effects import AbortLeg, Begun, Effect, End, Ended, Introduce, Ongoing, Part, StartLeg, Tell
from tercet.roles.router.encoders import Holders
from tercet.roles.router.planning import can_be_encoded, is_encoded_apart, missing_for, plan_for
from tercet.roles.router.policy import Plan
from tercet.roles.router.waiting import Waiting
from tercet.spec import LimitsSpec

MAX_DEATHS = 2  # a request that was on this many workers when they died is not tried on another

log = logging.getLogger(__name__)


class Decisions:
    """Not thread-safe. Every verb returns the effects to be carried out, in their order."""

    def __init__(self, roles: Sequence[Role], capacity: Mapping[Role, int], limits: LimitsSpec) -> None:
        """roles: of a request's workers, in order; one if a worker does all. capacity: legs that a worker takes."""
        self._limits = limits
        self.directory = Directory(roles, capacity)
        self.proven: set[tuple[Incarnation, ...]] = set()  # pairs, and encode workers, that have served a request
        self._holders = Holders()  # of images
        self._waiting = Waiting(lambda request: is_encoded_apart(request, self.directory))
        self._places: dict[int, Ongoing] = {}  # number of a place -> who has it; until the request's end
        self._running: dict[Ticket, Ongoing] = {}
        self._deadlines: list[tuple[float, int]] = []  # a heap of (deadline, number of a place)

    # ---- requests

    def submit(self, request: GenerateRequest, name: str, now: float) -> tuple[Ongoing, list[Effect]]:
        """name: unique among all tickets."""
        place = self._waiting.place(request)
        ongoing = Ongoing(request, name, place, self._patience(request, now), now)
        self._places[place.number] = ongoing
        if request.deadline <= now:
            return ongoing, self._end(ongoing, DeadlineExceeded("the request's deadline has passed already"))
        heapq.heappush(self._deadlines, (request.deadline, place.number))
        self._waiting.join(ongoing)
        return ongoing, self._plan(now)

    def cancel(self, ongoing: Ongoing, now: float) -> list[Effect]:
        """Nobody waits for it any more. Harmless once it is over."""
        if ongoing.over:
            return []
        return [*self._close(ongoing, Cancelled("nobody waits for the answer any more")), *self._plan(now)]

    @property
    def queued(self) -> int:
        """Requests that no worker has, those included whose worker was lost."""
        return sum(ongoing.attempt is None for ongoing in self._places.values())

    def wake_at(self) -> float | None:
        """When `tick` is due; None: no time is set."""
        while self._deadlines and self._deadlines[0][1] not in self._places:
            heapq.heappop(self._deadlines)
        due = [self._deadlines[0][0]] if self._deadlines else []
        look_at = self._waiting.look_at
        return min(due if look_at is None else [*due, look_at], default=None)

    def tick(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            ongoing = self._places.get(heapq.heappop(self._deadlines)[1])
            if ongoing is None:
                continue
            if ongoing.attempt is None:
                effects += self._end(ongoing, DeadlineExceeded("no worker had room until the request's deadline"))
            else:
                late = DeadlineExceeded(f"request {ongoing.request.request_id} ran out of time")
                effects += self._take(ongoing, None, late, now)
        return effects + self._plan(now)

    # ---- workers

    def set_workers(self, workers: Iterable[WorkerInfo]) -> tuple[list[WorkerView], list[Effect]]:
        """Make `workers` the live set. -> (views that are new, effects). Who is left out gets no new leg; what runs
        there goes on until it ends, or until `on_down`."""
        new = self.directory.replace(workers)
        return new, [*self._introduce(), *self._part()]

    def on_up(self, worker: WorkerView, now: float) -> list[Effect]:
        worker.up = True
        self._waiting.reconsider()
        return [*self._introduce(), *self._plan(now)]

    def on_down(self, worker: WorkerView, fault: str, now: float) -> list[Effect]:
        """Its stream has ended, and with it what was under way there."""
        worker.up = False
        lost = WorkerLost(f"{worker.info.worker_id} (epoch {worker.info.epoch}) was lost: {fault or 'stream closed'}")
        effects: list[Effect] = []
        on_board = [o for o in self._running.values() if o.attempt is not None and worker in o.attempt.legs]
        for ongoing in dict.fromkeys(on_board):  # an attempt may have two tickets
            self._leg_ended(ongoing, worker)
            effects += self._take(ongoing, worker, lost, now)
        return effects + self._plan(now)

    def on_load(self, worker: WorkerView, load: Load) -> None:
        worker.load = load

    def on_report(self, worker: WorkerView, ticket: Ticket, outcome: Outcome, now: float) -> list[Effect]:
        """The next event of a leg, in order."""
        ongoing = self._running.get(ticket)
        if ongoing is None:  # a late report of an attempt that is over
            return []
        if isinstance(outcome, Admitted):
            ongoing.place.holds = False  # those behind it may be planned now
            self._waiting.leave(ongoing, planned=True)
            return self._plan(now)
        if isinstance(outcome, TokenEvent | Progress):  # most reports are tokens; they free no room
            return self._take(ongoing, worker, outcome, now)
        assert ongoing.attempt is not None
        if isinstance(outcome, ImageForgotten) and (again := ongoing.attempt.with_files(worker)):
            return [StartLeg(worker, leg) for leg in again]
        if isinstance(outcome, WorkerLost):  # its engine has died; the process answers until it is replaced
            worker.up = False
        if not isinstance(outcome, PromptLogprobs):
            self._leg_ended(ongoing, worker)
        return [*self._take(ongoing, worker, outcome, now), *self._plan(now)]

    # ---- the line

    def _plan(self, now: float) -> list[Effect]:
        """Start attempts from the front of the line while there is room; part from workers that have left."""
        effects: list[Effect] = []
        while (ongoing := self._waiting.next(self._places, now)) is not None:
            before = ongoing.history.before()
            plan = plan_for(ongoing.request, ongoing.history, self.directory, self._holders)
            if plan is not None:
                effects += ongoing.decided(before, self.directory, self._holders, plan, now)
                effects += self._begin(ongoing, plan, now)
            elif (missing := missing_for(ongoing.request, self.directory)) and now > ongoing.give_up:
                effects += self._end(ongoing, NoWorkers(f"no live worker of role {', '.join(missing)}"))
            else:
                self._waiting.refuse(ongoing, now, encoders=can_be_encoded(ongoing.request, self.directory))
                effects += ongoing.decided(before, self.directory, self._holders, None, now)
        return effects + self._part()

    def _patience(self, request: GenerateRequest, now: float) -> float:
        return min(request.deadline, now + self._limits.worker_wait_s)

    # ---- attempts

    def _begin(self, ongoing: Ongoing, plan: Plan, now: float) -> list[Effect]:
        """Start every leg of the plan."""
        name = ongoing.name, ongoing.attempts
        attempt = Attempt.of(name, ongoing.request, ongoing.told, plan, self._holders, now)
        self._holders.sent(plan.encode)
        ongoing.begin(attempt, now)
        self._running |= {leg.ticket: ongoing for leg in attempt.legs.values()}
        if not ongoing.place.holds:
            self._waiting.leave(ongoing, planned=True)
        for worker, leg in attempt.legs.items():
            worker.tokens += leg.size
            worker.legs += 1
        return [Begun(ongoing, plan), *(StartLeg(worker, leg) for worker, leg in attempt.legs.items())]

    def _take(self, ongoing: Ongoing, worker: WorkerView | None, outcome: Outcome, now: float) -> list[Effect]:
        """Apply a report to the request; the caller plans. worker: who reports; None: the deadline has passed."""
        assert ongoing.attempt is not None
        effects: list[Effect] = []
        try:
            for event in ongoing.attempt.next(worker, outcome):
                if isinstance(event, Done):
                    self.proven |= ongoing.attempt.proven
                    return [*effects, *self._done(ongoing, event)]
                if isinstance(event, Progress):
                    effects.append(Tell(ongoing, ongoing.accounted(event)))
                    continue
                ongoing.told.add(event)
                effects.append(Tell(ongoing, event))
        except WorkerBusy as busy:
            ongoing.history.busy.add(busy.worker)
            ongoing.awaits_encoder = busy.worker in ongoing.attempt.plan.encode
            ongoing.place.holds = True
            effects += ongoing.ended(busy, now)
            effects += self._again(ongoing, now, Overloaded(f"{busy.worker.info.worker_id} had no room after all"))
        except AttemptFailed as failed:
            effects += [*ongoing.ended(failed, now), *self._failed(ongoing, failed, now)]
        return effects

    def _failed(self, ongoing: Ongoing, failed: AttemptFailed, now: float) -> list[Effect]:
        """Go back to the line, unless the error is final or a limit is reached."""
        assert ongoing.attempt is not None
        if (finish := ongoing.told.finish) is not None:  # it has every token; only Done was lost
            return self._done(ongoing, Done(finish))
        history, error = ongoing.history, failed.error
        if isinstance(error, WorkerDrained):  # nobody's fault, so it is no failure
            ongoing.moves += 1
            return self._again(ongoing, now, error)
        ongoing.failures += 1
        suspects = ongoing.attempt.suspects(failed.reporter, error)
        history.failed(ongoing.attempt.plan, failed.reporter, error, suspects)
        if not isinstance(error, WorkerLost | TransferError):
            return self._end(ongoing, error)
        if len(history.deaths) >= MAX_DEATHS:
            names = ", ".join(f"{worker_id} (epoch {epoch})" for worker_id, epoch in sorted(history.deaths))
            about = {"about": {"request_id": ongoing.request.request_id}}
            log.error("a request was on board when these died: %s", names, extra=about)
            died = f"{error}; the request was on board of {len(history.deaths)} workers that died"
            return self._end(ongoing, WorkerLost(died))
        if ongoing.failures > self._limits.retries:
            return self._end(ongoing, error)
        return self._again(ongoing, now, error)

    def _again(self, ongoing: Ongoing, now: float, error: TercetError) -> list[Effect]:
        """Back to its place in the line. error: why its attempt ends."""
        ongoing.give_up = self._patience(ongoing.request, now)
        if not ongoing.place.stands:
            self._waiting.join(ongoing)
        return self._stop(ongoing, error)

    def _done(self, ongoing: Ongoing, done: Done) -> list[Effect]:
        told = Tell(ongoing, ongoing.accounted(done))
        return [*self._close(ongoing), told, End(ongoing, None)]

    def _end(self, ongoing: Ongoing, error: TercetError) -> list[Effect]:
        return [*self._close(ongoing, error), End(ongoing, error)]

    def _close(self, ongoing: Ongoing, error: TercetError | None = None) -> list[Effect]:
        """The request is over: remove it from the tables and from the line."""
        effects = self._stop(ongoing, error)
        ongoing.over = True
        self._waiting.leave(ongoing, planned=False)
        del self._places[ongoing.place.number]
        return effects

    def _stop(self, ongoing: Ongoing, error: TercetError | None) -> list[Effect]:
        """End the attempt, if one runs: free its room, charge the client, abort the legs that have not ended."""
        attempt, ongoing.attempt = ongoing.attempt, None
        if attempt is None:
            return []
        for ticket in attempt.tickets:
            self._running.pop(ticket, None)
        legs = list(attempt.legs.items())
        for worker, leg in legs:
            self._free(worker, leg)
        attempt.legs.clear()
        self._waiting.charge(ongoing, len(ongoing.told.tokens) - ongoing.before)
        return [Ended(ongoing, error), *(AbortLeg(worker, leg) for worker, leg in legs if worker.up)]

    def _leg_ended(self, ongoing: Ongoing, worker: WorkerView) -> None:
        """Stop counting a leg, if it is still counted: its worker has room for another one."""
        assert ongoing.attempt is not None
        leg = ongoing.attempt.legs.pop(worker, None)
        if leg is not None:
            self._free(worker, leg)

    def _free(self, worker: WorkerView, leg: Leg) -> None:
        worker.tokens -= leg.size
        worker.legs -= 1
        self._waiting.reconsider()  # there is more room

    def _part(self) -> list[Effect]:
        return [Part(view) for view in self.directory.take_parted()]

    def _introduce(self) -> list[Effect]:
        return [Introduce(*each) for each in self.directory.introductions()]
