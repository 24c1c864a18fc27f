"""Carry out the decisions: one stream per worker, one timer, one queue of events per request. Event loop only."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Iterable, Sequence

from tercet.core import Done, GenerateRequest, Load, Outcome, Role, Ticket, WorkerInfo
from tercet.errors import TercetError
from tercet.roles.router.attempt import RequestEvent
from tercet.roles.router.attempts import Attempts
from tercet.roles.router.decisions import Decisions
from tercet.roles.router.directory import WorkerView
from tercet.roles.router.effects import (
    AbortLeg,
    Begun,
    Effect,
    End,
    Ended,
    Introduce,
    Note,
    Ongoing,
    Part,
    StartLeg,
    Tell,
    Watcher,
)
from tercet.roles.router.pairs import slow_pair
from tercet.roles.router.policy import capacity
from tercet.spec import ROLES_OF, ClusterSpec
from tercet.tls import PeerTls
from tercet.tracing import OFF, Tracing
from tercet.wire.worker_client import WorkerLink

_Heard = asyncio.Queue[RequestEvent | TercetError]


class Router:
    def __init__(self, spec: ClusterSpec, cluster_token: str, spans: Tracing = OFF) -> None:
        roles = ROLES_OF[spec.topology]
        self._min_bandwidth = spec.transfer.min_bandwidth
        self._token = cluster_token
        self._attempts = Attempts(spans)
        self._decisions = Decisions(
            roles, {role: capacity(role, spec.roles[role].scheduler) for role in roles}, spec.limits
        )
        self._directory = self._decisions.directory
        self._tls = None if spec.network.tls is None else PeerTls(spec.network.tls)
        self._links: dict[WorkerView, WorkerLink] = {}
        self._heard: dict[Ongoing, _Heard] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._watcher: Watcher = lambda request, said: None

    # ---- the control path

    async def set_workers(self, workers: Sequence[WorkerInfo]) -> None:
        """Make `workers` the live set: connect to new incarnations, part from the others once their legs have ended."""
        new, effects = self._decisions.set_workers(workers)
        for view in new:
            self._links[view] = self._link(view)
        self._carry_out(effects)

    async def close(self) -> None:
        """Close every stream, even those with legs that run."""
        await self.set_workers([])
        await asyncio.gather(*self._closing, *map(self._close, list(self._links)))
        if self._timer is not None:
            self._timer.cancel()

    def loads(self) -> dict[str, Load]:
        return {worker_id: view.load for worker_id, view in self._directory.views.items() if view.up}

    def queued(self) -> int:
        """Requests that wait for a worker with room."""
        return self._decisions.queued

    def missing_roles(self) -> list[str]:
        """Roles of the topology without a live worker."""
        return self._directory.missing_roles()

    def is_ready(self) -> bool:
        directory, proven = self._directory, self._decisions.proven
        if directory.encodes and not {(view.incarnation,) for view in directory.up(Role.ENCODE)} & proven:
            return False
        return bool(directory.live_pairs() & proven) and not self.slow_pair()

    def slow_pair(self) -> str:
        """Why the first pair that misses transfer.min_bandwidth does; empty if none does."""
        directory = self._directory
        if directory.first is directory.last:
            return ""
        pairs = {view.info.worker_id: view.pairs for view in directory.up(directory.first)}
        return slow_pair(pairs, [view.info.worker_id for view in directory.up(directory.last)], self._min_bandwidth)

    def watch(self, watcher: Watcher) -> None:
        """Have it told of each request which workers it gets, and how its attempts end. It must not raise."""
        self._watcher = watcher

    # ---- the data path

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[RequestEvent, None]:
        """The prompt's logprobs if they are wanted, tokens as they come, then Done. Raises TercetError. Closing the
        generator aborts the request at once."""
        name = f"{request.request_id}.{secrets.token_hex(4)}"  # clients reuse ids; a ticket must be unique
        ongoing, effects = self._decisions.submit(request, name, time.monotonic())
        heard = self._heard[ongoing] = _Heard()
        try:
            self._carry_out(effects)
            while True:
                event = await heard.get()
                if isinstance(event, TercetError):
                    raise event
                yield event
                if isinstance(event, Done):
                    return
        finally:
            del self._heard[ongoing]
            self._carry_out(self._decisions.cancel(ongoing, time.monotonic()))

    def _carry_out(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Tell(ongoing, event):  # first, since most are
                    self._tell(ongoing, event)
                case StartLeg(view, leg):
                    self._links[view].start(self._attempts.traced(leg))
                case Begun() | Ended():
                    self._attempts.take(effect)
                case AbortLeg(view, leg):
                    self._links[view].abort(leg)
                case Note(ongoing, said):
                    self._watcher(ongoing.request, said)
                case Introduce(view, endpoints):
                    self._links[view].meet(endpoints)
                case Part(view):
                    closing = asyncio.create_task(self._close(view))
                    self._closing.add(closing)
                    closing.add_done_callback(self._closing.discard)
                case End(ongoing, TercetError() as error):
                    self._tell(ongoing, error)
        self._arm()

    async def _close(self, view: WorkerView) -> None:
        if (link := self._links.get(view)) is not None:
            await link.close()
            self._links.pop(view, None)  # not before: its last legs may still be aborted

    def _tell(self, ongoing: Ongoing, event: RequestEvent | TercetError) -> None:
        if (heard := self._heard.get(ongoing)) is not None:
            heard.put_nowait(event)

    def _arm(self) -> None:
        """Set the timer to when `tick` is due."""
        due = self._decisions.wake_at()
        if self._timer is not None:
            if due is not None and self._timer.when() == due and not self._timer.cancelled():
                return
            self._timer.cancel()
        self._timer = None if due is None else asyncio.get_running_loop().call_at(due, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._carry_out(self._decisions.tick(time.monotonic()))

    # ---- what the links say

    def _link(self, view: WorkerView) -> WorkerLink:
        decisions = self._decisions

        def on_reports(reports: Sequence[tuple[Ticket, Outcome]]) -> None:
            now, effects = time.monotonic(), list[Effect]()
            try:
                for ticket, outcome in reports:
                    effects += decisions.on_report(view, ticket, outcome, now)
            finally:  # also if one raises: to the decisions, what the earlier ones brought has been told
                self._carry_out(effects)

        def on_load(load: Load) -> None:
            decisions.on_load(view, load)

        def on_change(fault: str | None) -> None:
            now = time.monotonic()
            self._carry_out(decisions.on_up(view, now) if fault is None else decisions.on_down(view, fault, now))

        return WorkerLink(view.info, self._token, on_reports, on_load, on_change, self._tls)
