"""Run the plan of each request, and run another when a worker fails. Event loop only.

    line ─> plan ─legs started─> tokens ... Done
      ^              │
      │              ├─ rejected: the other leg is cancelled, the busy worker is passed over; the request goes back to
      │              │  its place in the line, and nobody behind it is planned before it has been admitted
      └──────────────┴─ failed or lost: likewise, and the new attempt goes on behind the last token that came

Requests wait in one line (roles/line.py) while no worker has room: the router counts what it has put on each, so that a
worker's REJECT is the exception (its blocks ran out). Which workers a request gets: roles/plans.py.

A new attempt sends prompt + emitted tokens as its prompt; the sampler depends only on seed and position
(engine/sampler.py), so no token is lost or repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace

from tercet.core import Done, GenerateRequest, Load, PromptLogprobs, Role, TokenEvent, WorkerInfo
from tercet.errors import DeadlineExceeded, NoWorkers, TercetError, TransferError, WorkerLost
from tercet.roles.attempt import Attempt, Busy, Event, Failed, Told
from tercet.roles.line import Line, Place
from tercet.roles.pairs import slow_pair
from tercet.roles.plans import History, Incarnation, Plan, capacity, choose
from tercet.spec import ROLES_OF, ClusterSpec
from tercet.wire.codec import Leg
from tercet.wire.worker_client import Admitted, LegKey, Outcome, WorkerLink

ROOM_S = 0.2  # at the latest after so long the first in line looks again whether a worker has room
MAX_DEATHS = 2  # a request that was on board of so many workers when they died is not tried on a third

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Running:
    """An attempt while it runs."""

    attempt: Attempt
    place: Place
    events: asyncio.Queue[tuple[WorkerLink | None, Outcome]] = field(default_factory=asyncio.Queue)
    ready: deque[Event] = field(default_factory=deque)  # of the reports that were looked at
    timer: asyncio.TimerHandle | None = None

    @property
    def plan(self) -> Plan:
        return self.attempt.plan


class Router:
    def __init__(self, spec: ClusterSpec, cluster_token: str) -> None:
        self._limits = spec.limits
        self._min_bandwidth = spec.transfer.min_bandwidth
        self._capacity = {role: capacity(role, spec.roles[role].scheduler) for role in ROLES_OF[spec.topology]}
        self._token = cluster_token
        self._roles = ROLES_OF[spec.topology]
        self._links: dict[str, WorkerLink] = {}  # worker id -> link to its live incarnation
        self._attempts: dict[LegKey, _Running] = {}
        self._proven: set[tuple[Incarnation, Incarnation]] = set()  # pairs through which a request has passed
        self._line = Line()
        self._turns: dict[int, asyncio.Event] = {}  # number of a place -> set when it is the first
        self._room = asyncio.Event()  # pulsed when a worker came up or a leg left one

    # ---- the control path

    async def set_workers(self, workers: Sequence[WorkerInfo]) -> None:
        """Make `workers` the live set: connect to new incarnations, drop those that are gone."""
        wanted = {w.worker_id: w for w in workers}
        gone = [link for link in self._links.values() if wanted.get(link.info.worker_id) != link.info]
        for link in gone:
            del self._links[link.info.worker_id]
        for worker_id, info in wanted.items():
            if worker_id not in self._links:
                self._links[worker_id] = WorkerLink(info, self._token, self._on_report, self._on_change)
        self._introduce()
        for link in gone:  # at last, since others may set the workers meanwhile
            await link.close()

    async def close(self) -> None:
        await self.set_workers([])

    def loads(self) -> dict[str, Load]:
        return {worker_id: link.load for worker_id, link in self._links.items() if link.up}

    def missing_roles(self) -> list[str]:
        """Roles of the topology without a live worker."""
        return [role.value for role in self._roles if not self._up(role)]

    def is_ready(self) -> bool:
        return bool(self._live_pairs() & self._proven) and not self.slow_pair()

    def slow_pair(self) -> str:
        """Why the first pair that misses transfer.min_bandwidth does; empty if none does."""
        if len(self._roles) == 1:
            return ""
        pairs = {link.info.worker_id: link.load.pairs for link in self._up(self._roles[0])}
        return slow_pair(pairs, [link.info.worker_id for link in self._up(self._roles[-1])], self._min_bandwidth)

    # ---- the data path

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """The prompt's logprobs if they are wanted, tokens as they come, then Done. Raises TercetError. Closing the
        generator aborts the request at once."""
        told = Told()
        history = History()
        place = self._line.place(request.client, len(request.token_ids))
        name = f"{request.request_id}.{secrets.token_hex(4)}"  # clients reuse ids; a ticket must be unique
        failures = 0
        try:
            for number in itertools.count():
                plan, before = await self._plan(request, place, history), len(told.tokens)
                running = self._begin((name, number), request, told, plan, place)
                try:
                    while not isinstance(event := await self._next(running), Done):
                        told.add(event)
                        yield event
                    self._proven.add(plan.incarnations)
                    yield _done(event, plan, failures + 1)
                    return
                except Busy as busy:
                    history.busy.add(busy.link)
                    place.holds = True
                except Failed as failed:
                    failures += 1
                    if (finish := told.finish) is not None:  # only the word that it was the last was lost
                        yield _done(Done(finish), plan, failures)
                        return
                    history.failed(plan, failed.reporter, failed.error)
                    self._give_up_or_go_on(request, history, failures, failed.error)
                finally:
                    self._end(running, len(told.tokens) - before)
        finally:
            self._leave(place, planned=False)

    def _give_up_or_go_on(self, request: GenerateRequest, history: History, failures: int, error: TercetError) -> None:
        """Raises the error if there is to be no other attempt."""
        if not isinstance(error, WorkerLost | TransferError):
            raise error
        if len(history.deaths) >= MAX_DEATHS:
            log.error("request %s was on board when these died: %s", request.request_id, ", ".join(history.deaths))
            raise WorkerLost(f"{error}; the request was on board of {len(history.deaths)} workers that died") from error
        if failures > self._limits.retries:
            raise error

    # ---- the line

    async def _plan(self, request: GenerateRequest, place: Place, history: History) -> Plan:
        """Workers with room, when it is this request's turn. Waits while none has; while a role has no live worker at
        all, for a restart."""
        give_up = min(request.deadline, time.monotonic() + self._limits.worker_wait_s)
        planned = False
        try:
            async with asyncio.timeout(request.deadline - time.monotonic()):
                await self._turn(place)
                while (plan := self._choose(history)) is None:
                    if (missing := self.missing_roles()) and time.monotonic() > give_up:
                        raise NoWorkers(f"no live worker of role {', '.join(missing)}")
                    await self._wait_for_room()
                planned = True
                return plan
        except TimeoutError as error:
            raise DeadlineExceeded("no worker had room until the request's deadline") from error
        finally:
            if not (planned and place.holds):
                self._leave(place, planned=planned)

    async def _turn(self, place: Place) -> None:
        """Return when the request is the first in line."""
        if not place.stands:
            self._line.join(place)
        turn = self._turns[place.number] = asyncio.Event()
        self._call_first()
        try:
            await turn.wait()
        finally:
            del self._turns[place.number]

    def _leave(self, place: Place, *, planned: bool) -> None:
        if place.stands:
            self._line.leave(place, planned=planned)
            self._call_first()

    def _call_first(self) -> None:
        first = self._line.head()
        if first is not None and first.number in self._turns:
            self._turns[first.number].set()

    def _choose(self, history: History) -> Plan | None:
        firsts = self._with_room(self._roles[0])
        return choose(firsts, firsts if len(self._roles) == 1 else self._with_room(self._roles[-1]), history)

    def _with_room(self, role: Role) -> list[WorkerLink]:
        return [link for link in self._up(role) if link.outstanding_legs < self._capacity[role]]

    async def _wait_for_room(self) -> None:
        self._room.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ROOM_S):
                await self._room.wait()

    # ---- attempts

    def _begin(self, key: LegKey, request: GenerateRequest, told: Told, plan: Plan, place: Place) -> _Running:
        """Start every leg of the plan."""
        attempt = Attempt.of(key, request, told, plan, time.monotonic())
        running = self._attempts[key] = _Running(attempt, place)
        out_of_time = (None, DeadlineExceeded(f"request {request.request_id} ran out of time"))
        timeout_s = request.deadline - time.monotonic()
        running.timer = asyncio.get_running_loop().call_later(timeout_s, running.events.put_nowait, out_of_time)
        for link, leg in attempt.legs.items():
            link.outstanding_tokens += len(leg.token_ids)
            link.outstanding_legs += 1
            link.start(leg)
        return running

    async def _next(self, running: _Running) -> Event:
        """The next event for the client. Raises Busy or Failed if the attempt is over."""
        while not running.ready:
            running.ready.extend(running.attempt.next(*await running.events.get()))
        return running.ready.popleft()

    def _leg_ended(self, running: _Running, link: WorkerLink) -> Leg | None:
        """Take a leg off the books, if it stands there: its worker has room for another one."""
        leg = running.attempt.legs.pop(link, None)
        if leg is not None:
            link.outstanding_tokens -= len(leg.token_ids)
            link.outstanding_legs -= 1
            self._room.set()
        return leg

    def _end(self, running: _Running, emitted: int) -> None:
        """Take the attempt off the books; abort the legs that have not ended."""
        if running.timer is not None:
            running.timer.cancel()
        del self._attempts[running.attempt.key]
        for link in list(running.attempt.legs):
            leg = self._leg_ended(running, link)
            if leg is not None and link.up:
                link.abort(leg)
        self._line.charge(running.place.client, emitted)

    # ---- what the links say

    def _on_report(self, link: WorkerLink, key: LegKey, outcome: Outcome) -> None:
        running = self._attempts.get(key)
        if running is None:  # a late word of an attempt that is over
            return
        if isinstance(outcome, Admitted):
            running.place.holds = False  # those behind it may be planned now
            self._leave(running.place, planned=True)
        elif not isinstance(outcome, TokenEvent | PromptLogprobs):
            self._leg_ended(running, link)  # now, however long the client takes to hear of it
        running.events.put_nowait((link, outcome))

    def _on_change(self, link: WorkerLink, up: bool) -> None:
        if up:
            self._introduce()
            self._room.set()
            return
        lost = WorkerLost(f"{link.info.worker_id} (epoch {link.info.epoch}) was lost: {link.fault or 'stream closed'}")
        for running in self._attempts.values():
            if self._leg_ended(running, link) is not None:
                running.events.put_nowait((link, lost))

    def _introduce(self) -> None:
        """Have the prefill workers connect to the decode workers, so that no request waits for a handshake."""
        if len(self._roles) > 1:
            endpoints = [link.info.transfer_endpoint for link in self._up(self._roles[-1])]
            for link in self._up(self._roles[0]):
                link.meet(endpoints)

    def _up(self, role: Role) -> list[WorkerLink]:
        return [link for link in self._links.values() if link.up and link.info.role is role]

    def _live_pairs(self) -> set[tuple[Incarnation, Incarnation]]:
        firsts, lasts = self._up(self._roles[0]), self._up(self._roles[-1])
        pairs = itertools.product(firsts, lasts) if len(self._roles) > 1 else zip(firsts, firsts, strict=True)
        return {Plan(p, d).incarnations for p, d in pairs}


def _done(done: Done, plan: Plan, attempts: int) -> Done:
    workers = tuple((link.info.role.value, link.info.worker_id) for link in reversed(plan.links))
    return replace(done, workers=workers, attempts=attempts)
