"""The reconcile loop: compares the target (which members there should be) with what runs, and mends the difference.

bring_up    start all members at once; the first fault ends it, since a user is waiting
run         until asked to stop: replace the target if asked to (changes.py); observe, decide (`reconcile.diff`), act
shut_down   gateway drains, workers drain, all stop, all are killed

What is known of one incarnation of a member is in its `Slot` alone. An answer is written into the slot that was asked,
never into the member's newest one, so that a late answer says nothing about a successor.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import Any

from tercet.cluster import reconcile
from tercet.cluster.changes import Changes
from tercet.cluster.members import Running, Slot, Starter, Target, overview, serving, watch_loading, watch_ports
from tercet.cluster.race import first
from tercet.cluster.rebalancing import keep_placed
from tercet.cluster.reconcile import GATEWAY, Action, Drain, Drop, Publish, Start, State, Stop, Switch
from tercet.core import Loading
from tercet.errors import ClusterError, TercetError, WorkerLost
from tercet.spec import ClusterSpec

LOOK_EVERY_S = 0.3
STOP_TIMEOUT_S = 5.0
DEAF_AFTER_S = 3.0  # a member that is silent for so long is stopped or hangs, and will not drain
LAST_WORD_S = 2.0  # for members to end their streams


class Controller:
    """Owns every member that it started."""

    def __init__(
        self,
        target: Target,
        starter: Starter,
        report: Callable[[str], None],
        gateway_is_up: Callable[[Any], None] = lambda info: None,
        loading: Callable[[str, Loading], None] = lambda title, loading: None,
    ) -> None:
        """gateway_is_up: called with the info of each gateway, since a new one may have other ports. loading: with a
        worker that starts, and how far it is with its model."""
        self._gateway_is_up, self._loading = gateway_is_up, loading
        self._target = target
        self._changes = Changes(starter, report)
        self._starter = starter
        self._report = report
        self._slots: dict[str, Slot] = {}  # member id -> its newest incarnation
        self._home: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._is_up = False  # was ready once: before that a fault ends everything, then the member is replaced
        self._fault: TercetError | None = None  # the first one

    @property
    def stop_requested(self) -> bool:
        return bool(self._gateway.status.get("stop_requested"))

    @property
    def gateway_info(self) -> Any:
        return self._gateway.info

    @property
    def _gateway(self) -> Slot:
        return self._slots[GATEWAY]

    @property
    def _spec(self) -> ClusterSpec:
        return self._target.spec

    async def bring_up(self) -> None:
        """Return when all members live and a real request has succeeded. Raises the first TercetError of a member."""
        deadline = time.monotonic() + self._spec.ray.start_timeout_s
        self._home = asyncio.create_task(self._starter.watch_home())
        while not self._ready():
            await self._step()
            if self._fault is not None:
                raise self._fault
            if time.monotonic() > deadline:
                after = f"not ready after {self._spec.ray.start_timeout_s:g} s (ray.start_timeout_s)"
                raise ClusterError(f"{after}: {self._why_not_ready()}")
        self._is_up = True

    async def run(self, stop: asyncio.Event) -> None:
        """Reconcile until `stop` is set or the gateway is asked to stop.

        Raises RayLost.
        """
        while not stop.is_set() and not self.stop_requested:
            asked = self._gateway.status.get("asked", ())
            taken = [m for m, slot in self._slots.items() if slot.member.state is not State.GONE]
            self._target = await self._changes.applied(self._target, asked, taken)
            await self._step()

    async def shut_down(self, reason: str = "") -> None:
        """Drain, then end every member; each step has a deadline. Clients are told the reason."""
        await self._cancel_tasks()
        words = (reason,) if reason else ()
        if GATEWAY in self._alive():  # its streams need the workers, so a silent worker is ended meanwhile
            await first(self._drain(GATEWAY, *words), self._until_all_are_silent())
        await asyncio.gather(*(self._drain(member_id) for member_id in self._alive() if member_id != GATEWAY))
        await self._stop(STOP_TIMEOUT_S)

    async def end_now(self) -> None:
        """End every member; streams end with a typed error if the gateway manages within LAST_WORD_S."""
        await self._cancel_tasks()
        await self._stop(LAST_WORD_S)

    async def _drain(self, member_id: str, *words: str) -> None:
        timeout_s = self._spec.limits.drain_timeout_s
        call = self._actor(member_id).call("drain", timeout_s, *words, timeout_s=timeout_s + STOP_TIMEOUT_S)
        await self._while_heard(member_id, call)

    async def _until_all_are_silent(self) -> None:
        """Return when no worker answers any more."""
        workers = [member_id for member_id in self._alive() if member_id != GATEWAY]
        await asyncio.gather(*(self._while_heard(member_id, asyncio.Event().wait()) for member_id in workers))

    async def _while_heard(self, member_id: str, work: Coroutine[Any, Any, Any]) -> None:
        """Do the work for as long as the member answers; if it falls silent, kill it. Faults are reported."""
        slot, actor = self._slots[member_id], self._actor(member_id)
        try:
            await first(work, self._watch_health(slot, actor, DEAF_AFTER_S))
        except TercetError as error:
            self._report(f"while it drains: {error}")
            if isinstance(error, WorkerLost):
                slot.member = reconcile.lost(slot.member, str(error), time.monotonic())
                await actor.kill()

    async def _stop(self, timeout_s: float) -> None:
        """Ask all members to stop, at once; report those that fail to. Then kill all."""
        calls = [self._actor(member_id).call("stop", timeout_s=timeout_s) for member_id in self._alive()]
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(outcome, TercetError):
                self._report(f"stop: {outcome}")
            elif isinstance(outcome, BaseException):
                raise outcome
        await asyncio.gather(*(slot.actor.kill() for slot in self._slots.values() if slot.actor is not None))
        self._slots.clear()

    async def _step(self) -> None:
        actual = {member_id: slot.member for member_id, slot in self._slots.items()}
        told = self._gateway.told if GATEWAY in self._slots else None
        for action in reconcile.diff(self._target.members, actual, told, time.monotonic()):
            await self._act(action)
        self._changes.serving(serving(self._slots))
        await self._tell_overview()
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_EVERY_S):
                await self._changed.wait()
        for task in (self._home, *(slot.task for slot in self._slots.values())):
            if task is not None and task.done():
                task.result()  # raises if Ray is lost (home) or a member's task has a bug

    async def _act(self, action: Action) -> None:
        match action:
            case Start(member_id, epoch):
                before = self._slots.get(member_id)
                if before is not None and before.task is not None and not before.task.done():
                    return  # it is still being killed
                role = self._target.members[member_id]
                member = reconcile.starting(role, epoch, before.member if before else None, time.monotonic())
                self._changes.restarted(member_id)
                self._begin(Slot(member_id, member))
            case Switch(member_id, epoch):
                member = reconcile.switching(self._target.members[member_id], epoch, time.monotonic())
                self._changes.drained(member_id)
                self._begin(Slot(member_id, member, self._slots[member_id].actor))
            case Drain(member_id):
                self._leaves(member_id, State.DRAINING).leave.set()
            case Stop(member_id):
                was_drained = self._slots[member_id].member.state is State.DRAINED
                slot = self._leaves(member_id, State.STOPPING)
                slot.task = asyncio.create_task(self._end(slot, slot.task, was_drained))
            case Drop(member_id):
                self._leaves(member_id, State.GONE)
            case Publish(told):  # always the last action, so that the others were decided on one state
                infos = [self._slots[worker_id].info for worker_id in told]
                gateway = self._gateway
                if await self._tell(gateway, "set_workers", infos):
                    gateway.told = told

    def _begin(self, slot: Slot) -> None:
        self._slots[slot.member_id] = slot
        slot.task = asyncio.create_task(self._live(slot, self._target))

    def _leaves(self, member_id: str, state: State) -> Slot:
        slot = self._slots[member_id]
        slot.member = reconcile.leaving(slot.member, state, time.monotonic())
        return slot

    async def _end(self, slot: Slot, life: asyncio.Task[None] | None, was_drained: bool) -> None:
        """End the process of a member that is no longer wanted. One that still starts is killed without a `stop`."""
        if life is not None:
            life.cancel()
            await asyncio.gather(life, return_exceptions=True)
        if slot.actor is not None:
            if was_drained:
                with contextlib.suppress(TercetError):
                    await slot.actor.call("stop", timeout_s=STOP_TIMEOUT_S)
            await slot.actor.kill()
        self._report(f"{slot.title} (epoch {slot.member.epoch}) is gone")
        self._slots[slot.member_id] = Slot(slot.member_id, slot.member)
        self._leaves(slot.member_id, State.GONE)
        self._changed.set()

    async def _live(self, slot: Slot, target: Target) -> None:
        """One incarnation of a member: start, watch until it has drained; if it is lost, kill what is left."""
        try:
            slot.info = await self._started(slot, target)
            assert slot.actor is not None
            slot.member = reconcile.up(slot.member, time.monotonic())
            kernels = getattr(slot.info, "kernels", "")  # of a worker
            self._report(f"{slot.title} is up (epoch {slot.member.epoch}){kernels and f', kernels {kernels}'}")
            if slot.member_id == GATEWAY:
                self._gateway_is_up(slot.info)
            self._changed.set()
            deadline_s = self._spec.ray.health_deadline_s
            watches = self._watch_health(slot, slot.actor, deadline_s), watch_ports(slot, self._starter, deadline_s)
            placed = keep_placed(slot, slot.actor, self._spec, self._report)
            await first(*watches, placed, self._drain_when_told(slot, slot.actor))
            slot.member = reconcile.leaving(slot.member, State.DRAINED, time.monotonic())
        except TercetError as error:
            self._lost(slot, error)
            if slot.actor is not None:
                await slot.actor.kill()
        finally:
            self._changed.set()

    async def _started(self, slot: Slot, target: Target) -> Any:
        """-> its info. In a process of its own, or in that of the incarnation before. Raises TercetError."""
        timeout_s, epoch = self._spec.ray.start_timeout_s, slot.member.epoch
        if slot.actor is None:
            slot.actor = await self._starter.launch(slot.member_id, epoch, target)
            start = slot.actor.call("start", timeout_s=timeout_s)
            if slot.member_id == GATEWAY:
                return await start
            return await first(start, watch_loading(slot, slot.actor, self._loading, LOOK_EVERY_S, timeout_s))
        wanted = target.worker(slot.member_id)
        switch = slot.actor.call("switch", wanted.role, epoch, wanted.cores, timeout_s=timeout_s)
        return await first(switch, self._watch_health(slot, slot.actor, self._spec.ray.health_deadline_s))

    async def _drain_when_told(self, slot: Slot, actor: Running) -> None:
        """Raises TercetError."""
        await slot.leave.wait()
        self._report(f"{slot.title} (epoch {slot.member.epoch}) drains")
        timeout_s = self._spec.limits.drain_timeout_s
        await actor.call("drain", timeout_s, timeout_s=timeout_s + STOP_TIMEOUT_S)

    async def _watch_health(self, slot: Slot, actor: Running, deadline_s: float) -> None:
        """Never returns. Raises TercetError."""
        while True:
            for line in slot.hear(await actor.call("health", timeout_s=deadline_s)):
                self._report(line)
            self._changed.set()
            await asyncio.sleep(LOOK_EVERY_S)

    def _lost(self, slot: Slot, error: TercetError) -> None:
        self._changes.lost(slot.member_id, slot.member.role, error)
        slot.member = reconcile.lost(slot.member, f"{error.code()}: {error}", time.monotonic())
        if self._is_up:
            follows = slot.next_try if slot.member_id in self._target.members else "; it was to go"
            self._report(f"{slot.title} (epoch {slot.member.epoch}) lost: {slot.member.reason}{follows}")
        self._fault = self._fault or error
        self._changed.set()  # the gateway must be told before the kill is done

    async def _tell_overview(self) -> None:
        gateway = self._slots.get(GATEWAY)
        if gateway is not None and gateway.member.state is State.LIVE:
            told = overview(self._target, self._slots) | self._changes.overview
            if told != gateway.noted and await self._tell(gateway, "note", told):
                gateway.noted = told

    async def _tell(self, gateway: Slot, method: str, told: object) -> bool:
        """Whether the gateway answered."""
        try:
            await self._actor(GATEWAY).call(method, told, timeout_s=self._spec.ray.health_deadline_s)
        except TercetError as error:
            self._report(f"the gateway was not told of a change: {error}")  # its health watch decides what follows
            return False
        return True

    def _alive(self) -> list[str]:
        return [member_id for member_id, slot in self._slots.items() if slot.has_process]

    def _actor(self, member_id: str) -> Running:
        """Of a member that was launched."""
        actor = self._slots[member_id].actor
        assert actor is not None
        return actor

    async def _cancel_tasks(self) -> None:
        tasks = [task for task in (self._home, *(slot.task for slot in self._slots.values())) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ready(self) -> bool:
        return len(self._alive()) == len(self._target.members) and bool(self._gateway.status.get("ready"))

    def _why_not_ready(self) -> str:
        late = {m: slot for m, slot in self._slots.items() if slot.member.state is not State.LIVE}
        waiting = [f"{m} is {s.member.state}" + (f", {s.loading}" if s.loading else "") for m, s in late.items()]
        return "; ".join(waiting) or str(self._gateway.status.get("reason", "the gateway says nothing"))
