"""Pick the workers of each request as one plan, run the plan, and run another when a worker fails. Event loop only.

    line ─> plan ─legs started─> tokens ... Done
      ^              │
      │              ├─ rejected: the other leg is cancelled, the busy worker is passed over
      └──────────────┴─ failed or lost: likewise, and the new attempt goes on behind the last token that came

Requests wait in one line, first come first planned, while no worker has room: the router counts what it has put on
each, so that a worker's REJECT is the exception (its blocks ran out).

A new attempt sends prompt + emitted tokens as its prompt; the sampler depends only on seed and position
(engine/sampler.py), so no token is lost or repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace

from tercet.core import Done, GenerateRequest, Load, Role, TokenEvent, WorkerInfo
from tercet.errors import DeadlineExceeded, NoWorkers, Overloaded, TercetError, TransferError, WorkerLost
from tercet.roles.pairs import slow_pair
from tercet.spec import ROLES_OF, ClusterSpec, SchedulerSpec
from tercet.wire.codec import Leg
from tercet.wire.worker_client import LegKey, Outcome, Rejection, WorkerLink

ROOM_S = 0.2  # at the latest after so long a waiting request looks again whether a worker has room
Incarnation = tuple[str, int]  # worker id, epoch


@dataclass(frozen=True)
class Plan:
    """The workers of one attempt; the same one twice where one does both."""

    prefill: WorkerLink
    decode: WorkerLink

    @property
    def links(self) -> tuple[WorkerLink, ...]:
        """The decoding one first, since it admits first."""
        return (self.decode,) if self.prefill is self.decode else (self.decode, self.prefill)

    @property
    def incarnations(self) -> tuple[Incarnation, Incarnation]:
        return _incarnation(self.prefill), _incarnation(self.decode)


@dataclass(eq=False)
class _Attempt:
    key: LegKey
    plan: Plan
    legs: dict[WorkerLink, Leg]
    timer: asyncio.TimerHandle | None = None
    events: asyncio.Queue[tuple[WorkerLink | None, Outcome]] = field(default_factory=asyncio.Queue)
    ended: set[WorkerLink] = field(default_factory=set)  # legs that need no abort any more
    committed: bool = False  # a token came, so the prefill worker has done its part


class _Busy(Exception):  # never leaves this file
    def __init__(self, link: WorkerLink) -> None:
        self.link = link


class Router:
    def __init__(self, spec: ClusterSpec, cluster_token: str) -> None:
        self._limits = spec.limits
        self._min_bandwidth = spec.transfer.min_bandwidth
        self._capacity = {role: _capacity(role, spec.roles[role].scheduler) for role in ROLES_OF[spec.topology]}
        self._token = cluster_token
        self._roles = ROLES_OF[spec.topology]
        self._links: dict[str, WorkerLink] = {}  # worker id -> link to its live incarnation
        self._attempts: dict[LegKey, _Attempt] = {}
        self._proven: set[tuple[Incarnation, Incarnation]] = set()  # pairs through which a request has passed
        self._line = asyncio.Lock()  # its holder is the next request to be planned
        self._room = asyncio.Event()  # pulsed when a worker came up or a request left one

    # ---- the control path

    async def set_workers(self, workers: Sequence[WorkerInfo]) -> None:
        """Make `workers` the live set: connect to new incarnations, drop those that are gone."""
        wanted = {w.worker_id: w for w in workers}
        for worker_id, link in list(self._links.items()):
            if wanted.get(worker_id) != link.info:
                del self._links[worker_id]
                await link.close()
        for worker_id, info in wanted.items():
            if worker_id not in self._links:
                self._links[worker_id] = WorkerLink(info, self._token, self._on_report, self._on_change)
        self._introduce()

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

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent | Done, None]:
        """Tokens as they come, then Done. Raises TercetError. Closing the generator aborts the request at once."""
        emitted: list[TokenEvent] = []
        failures = 0
        passed_over: set[WorkerLink] = set()  # have rejected or failed this request
        name = f"{request.request_id}.{secrets.token_hex(4)}"  # clients reuse ids; a ticket must be unique
        keep: WorkerLink | None = None  # has KV of an earlier attempt
        for number in itertools.count():
            plan = await self._plan(request.deadline, passed_over, keep)
            current = self._begin((name, number), request, emitted, plan)
            try:
                while isinstance(event := await self._next(current), TokenEvent):
                    emitted.append(event)
                    yield event
                yield self._done(event, plan, failures + 1)
                return
            except _Busy as rejected:
                passed_over.add(rejected.link)
            except (WorkerLost, TransferError) as error:
                passed_over |= self._blamed(error, current, failures)
                keep = plan.decode
                if emitted and emitted[-1].finish is not None:  # only the word that it was the last was lost
                    yield self._done(Done(emitted[-1].finish), plan, failures + 1)
                    return
                failures += 1
                if failures > self._limits.retries:
                    raise
            finally:
                self._end(current)

    def _blamed(self, error: TercetError, current: _Attempt, failures: int) -> set[WorkerLink]:
        """Whom the next attempt passes over. A decode worker that reports a broken transfer keeps what had landed and
        was verified, so it is asked again, once, with another prefill worker if there is one."""
        if failures == 0 and isinstance(error, TransferError) and current.plan.prefill is not current.plan.decode:
            return {current.plan.prefill}
        return current.ended

    async def _plan(self, deadline: float, passed_over: set[WorkerLink], keep: WorkerLink | None) -> Plan:
        """The least loaded worker of each role with room, but `keep` before all others. Waits in line while none has;
        while a role has no live worker at all, for a restart."""
        give_up = min(deadline, time.monotonic() + self._limits.worker_wait_s)
        try:
            async with asyncio.timeout(deadline - time.monotonic()), self._line:
                while (plan := self._choose(passed_over, keep)) is None:
                    if (missing := self.missing_roles()) and time.monotonic() > give_up:
                        raise NoWorkers(f"no live worker of role {', '.join(missing)}")
                    await self._wait_for_room()
                return plan
        except TimeoutError as error:
            raise DeadlineExceeded("no worker had room until the request's deadline") from error

    def _choose(self, passed_over: set[WorkerLink], keep: WorkerLink | None) -> Plan | None:
        chosen = []
        for role in self._roles:
            free = [link for link in self._up(role) if link.outstanding_legs < self._capacity[role]]
            if free and passed_over.issuperset(free):
                passed_over.difference_update(free)  # a new round, after a pause
                return None
            if not free:
                return None
            wanted = [link for link in free if link not in passed_over]
            chosen.append(keep if keep in wanted else min(wanted, key=_pressure))
        return Plan(chosen[0], chosen[-1])

    def _begin(self, key: LegKey, request: GenerateRequest, emitted: list[TokenEvent], plan: Plan) -> _Attempt:
        """Start every leg of the plan."""
        decoder = plan.decode.info
        tokens = (*request.token_ids, *(e.token_id for e in emitted))
        timeout_s = request.deadline - time.monotonic()
        base = Leg(*key, decoder.epoch, "", tokens, len(request.token_ids), request.params, timeout_s)
        legs = {link: replace(base, kind=link.info.role.value) for link in plan.links}
        if plan.prefill is not plan.decode:
            legs[plan.prefill] = replace(legs[plan.prefill], peer=decoder.transfer_endpoint)
        current = _Attempt(key, plan, legs)
        self._attempts[current.key] = current
        out_of_time = (None, DeadlineExceeded(f"request {request.request_id} ran out of time"))
        current.timer = asyncio.get_running_loop().call_later(timeout_s, current.events.put_nowait, out_of_time)
        for link, leg in legs.items():
            link.outstanding_tokens += len(tokens)
            link.outstanding_legs += 1
            link.start(leg)
        return current

    async def _next(self, current: _Attempt) -> TokenEvent | Done:
        """The decoding leg's next event. Raises _Busy, or the TercetError that ended the attempt."""
        while True:
            link, outcome = await current.events.get()
            if isinstance(outcome, TokenEvent):
                current.committed = True
                return outcome
            assert link is not None or isinstance(outcome, TercetError)
            if link is not None:
                current.ended.add(link)
            if link is current.plan.decode or link is None:
                return self._settled(outcome, current)
            self._prefill_ended(outcome, current)

    def _settled(self, outcome: Outcome, current: _Attempt) -> Done:
        if isinstance(outcome, Done):
            self._proven.add(current.plan.incarnations)
            return outcome
        if isinstance(outcome, Rejection):
            raise _Busy(current.plan.decode)
        if isinstance(outcome, Overloaded):  # the prefill worker had no room after all
            raise _Busy(current.plan.prefill)
        assert isinstance(outcome, TercetError)
        raise outcome

    def _prefill_ended(self, outcome: Outcome, current: _Attempt) -> None:
        """Once the first token is here, only the decode worker can say whether the KV has landed."""
        if isinstance(outcome, Rejection):
            raise _Busy(current.plan.prefill)
        if isinstance(outcome, Overloaded):  # the decode worker turned its offer down
            raise _Busy(current.plan.decode)
        if isinstance(outcome, TercetError) and not current.committed:
            raise outcome

    def _end(self, current: _Attempt) -> None:
        """Take the attempt off the books; abort the legs that have not ended."""
        if current.timer is not None:
            current.timer.cancel()
        del self._attempts[current.key]
        self._room.set()
        for link, leg in current.legs.items():
            link.outstanding_tokens -= len(leg.token_ids)
            link.outstanding_legs -= 1
            if link.up and link not in current.ended:
                link.abort(leg)

    def _done(self, done: Done, plan: Plan, attempts: int) -> Done:
        workers = tuple((link.info.role.value, link.info.worker_id) for link in reversed(plan.links))
        return replace(done, workers=workers, attempts=attempts)

    # ---- what the links say

    def _on_report(self, link: WorkerLink, key: LegKey, outcome: Outcome) -> None:
        current = self._attempts.get(key)
        if current is not None:  # else a late word of an attempt that is over
            current.events.put_nowait((link, outcome))

    def _on_change(self, link: WorkerLink, up: bool) -> None:
        if up:
            self._introduce()
            self._room.set()
            return
        lost = WorkerLost(f"{link.info.worker_id} (epoch {link.info.epoch}) was lost: {link.fault or 'stream closed'}")
        for current in self._attempts.values():
            if link in current.legs:
                current.events.put_nowait((link, lost))

    def _introduce(self) -> None:
        """Have the prefill workers connect to the decode workers, so that no request waits for a handshake."""
        if len(self._roles) > 1:
            endpoints = [link.info.transfer_endpoint for link in self._up(self._roles[-1])]
            for link in self._up(self._roles[0]):
                link.meet(endpoints)

    async def _wait_for_room(self) -> None:
        self._room.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._room.wait(), ROOM_S)

    def _up(self, role: Role) -> list[WorkerLink]:
        return [link for link in self._links.values() if link.up and link.info.role is role]

    def _live_pairs(self) -> set[tuple[Incarnation, Incarnation]]:
        firsts, lasts = self._up(self._roles[0]), self._up(self._roles[-1])
        pairs = itertools.product(firsts, lasts) if len(self._roles) > 1 else zip(firsts, firsts, strict=True)
        return {Plan(p, d).incarnations for p, d in pairs}


def _capacity(role: Role, scheduler: SchedulerSpec) -> int:
    """Legs that a worker takes at once (engine.reserve, engine.add)."""
    return scheduler.max_running + (0 if role is Role.DECODE else scheduler.max_waiting)


def _incarnation(link: WorkerLink) -> Incarnation:
    return link.info.worker_id, link.info.epoch


def _pressure(link: WorkerLink) -> tuple[int, int, str]:
    """What the router itself has put on a worker is fresher than what the worker reports."""
    return link.outstanding_tokens, link.load.running + link.load.waiting, link.info.worker_id
