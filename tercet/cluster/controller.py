"""The reconcile loop: holds the target (which members there are) against what is, and mends the difference.

bring_up    start all members at once; the first fault ends it, since a user waits
run         look, decide (`reconcile.diff`), act, until stop is asked for
shut_down   gateway drains, workers drain, all stop, all are killed

What is known of one incarnation of a member lies in its `Slot` alone. Whoever waits for an answer writes it into the
slot that was asked, never into the member's newest one, so an answer that comes late says nothing about a successor.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tercet.cluster import reconcile
from tercet.cluster.race import first
from tercet.cluster.reconcile import GATEWAY, Action, Member, Publish, Start, State
from tercet.core import WorkerInfo
from tercet.errors import ClusterError, TercetError, WorkerLost
from tercet.spec import ClusterSpec

LOOK_EVERY_S = 0.3
ASK_PORTS_EVERY_S = 2.0
STOP_TIMEOUT_S = 5.0
DEAF_AFTER_S = 3.0  # a member that is silent for so long will not drain: it is stopped, or hangs
LAST_WORD_S = 2.0  # for telling members that they end now


class Running(Protocol):
    """A member's process. `call` raises TercetError; `kill` never fails and may be called on the dead."""

    async def call(self, method: str, *args: object, timeout_s: float) -> Any: ...
    async def kill(self) -> None: ...


class Starter(Protocol):
    """Makes processes, and looks at them from outside."""

    async def launch(self, member_id: str, epoch: int) -> Running:
        """Raises ClusterError when there is no room for one."""

    async def ask_ports(self, info: Any, timeout_s: float) -> None:
        """Connect anew to every port of a member. Raises WorkerLost naming one that does not answer in time."""

    async def watch_home(self) -> None:
        """Return never; raises RayLost once nothing can be mended from here any more, saying why."""


@dataclass
class Slot:
    """One incarnation of a member as this controller holds it."""

    member: Member
    actor: Running | None = None
    info: Any = None  # WorkerInfo or GatewayInfo, once LIVE
    task: asyncio.Task[None] | None = None  # its start, then its watch
    told: Mapping[str, int] | None = None  # of the gateway: the workers that it was last told of
    status: Any = field(default_factory=dict)  # its last health; of the gateway: what `GatewayActor.health` gives


class Controller:
    """Owns every member that it started."""

    def __init__(
        self,
        spec: ClusterSpec,
        worker_ids: Sequence[str],
        starter: Starter,
        report: Callable[[str], None],
        gateway_is_up: Callable[[Any], None] = lambda info: None,
    ) -> None:
        """gateway_is_up: called with the info of each gateway, since a new one may have other ports."""
        self._spec = spec
        self._gateway_is_up = gateway_is_up
        self._target = (GATEWAY, *worker_ids)
        self._starter = starter
        self._report = report
        self._slots: dict[str, Slot] = {}  # member id -> its newest incarnation
        self._home: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._is_up = False  # once: before that a fault ends it all, after it the member is replaced
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

    async def bring_up(self) -> None:
        """Return when all members live and a real request has passed. Raises the first TercetError of a member."""
        deadline = time.monotonic() + self._spec.ray.start_timeout_s
        self._home = asyncio.create_task(self._starter.watch_home())
        while not self._ready():
            await self._step()
            if self._fault is not None:
                raise self._fault
            if time.monotonic() > deadline:
                raise ClusterError(f"not ready after {self._spec.ray.start_timeout_s:g} s: {self._why_not_ready()}")
        self._is_up = True

    async def run(self, stop: asyncio.Event) -> None:
        """Keep the cluster as it should be until `stop` is set or someone asks the gateway for it.

        Raises RayLost.
        """
        while not stop.is_set() and not self.stop_requested:
            await self._step()

    async def shut_down(self, reason: str = "") -> None:
        """Drain what runs, then end it all; each step has a deadline, so this ends too. Clients are told the reason."""
        await self._cancel_tasks()
        words = (reason,) if reason else ()
        if GATEWAY in self._alive():  # its streams need the workers, so who is silent meanwhile is ended
            await first(self._drain(GATEWAY, *words), self._until_all_are_silent())
        await asyncio.gather(*(self._drain(member_id) for member_id in self._alive() if member_id != GATEWAY))
        await self._stop(STOP_TIMEOUT_S)

    async def end_now(self) -> None:
        """End every member; what runs is ended with a typed error, if its gateway is quick."""
        await self._cancel_tasks()
        await self._stop(LAST_WORD_S)

    async def _drain(self, member_id: str, *words: str) -> None:
        timeout_s = self._spec.limits.drain_timeout_s
        call = self._actor(member_id).call("drain", timeout_s, *words, timeout_s=timeout_s + STOP_TIMEOUT_S)
        await self._while_heard(member_id, call)

    async def _until_all_are_silent(self) -> None:
        """Of the workers."""
        workers = [member_id for member_id in self._alive() if member_id != GATEWAY]
        await asyncio.gather(*(self._while_heard(member_id, asyncio.Event().wait()) for member_id in workers))

    async def _while_heard(self, member_id: str, work: Coroutine[Any, Any, Any]) -> None:
        """Do the work unless the member says nothing meanwhile: then it is ended. A fault is named."""
        slot, actor = self._slots[member_id], self._actor(member_id)
        try:
            await first(work, self._watch_health(slot, actor, DEAF_AFTER_S))
        except TercetError as error:
            self._report(f"while it drains: {error}")
            if isinstance(error, WorkerLost):
                slot.member = reconcile.lost(slot.member, str(error), time.monotonic())
                await actor.kill()

    async def _stop(self, timeout_s: float) -> None:
        """Ask all at once; who does not do it is named, and killed like all."""
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
        for action in reconcile.diff(self._target, actual, told, time.monotonic()):
            await self._act(action)
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_EVERY_S):
                await self._changed.wait()
        for task in (self._home, *(slot.task for slot in self._slots.values())):
            if task is not None and task.done():
                task.result()  # of the home: Ray is lost; of a member: a bug of ours, which must be seen

    async def _act(self, action: Action) -> None:
        match action:
            case Start(member_id, epoch):
                before = self._slots.get(member_id)
                if before is not None and before.task is not None and not before.task.done():
                    return  # it is still being killed
                member = reconcile.starting(epoch, before.member if before else None, time.monotonic())
                self._slots[member_id] = slot = Slot(member)
                slot.task = asyncio.create_task(self._live(member_id, slot))
            case Publish(epochs):
                await self._publish(self._gateway, epochs)

    async def _live(self, member_id: str, slot: Slot) -> None:
        """One life of one member: launch, start, watch, and at its end kill what is left and say why."""
        try:
            slot.actor = await self._starter.launch(member_id, slot.member.epoch)
            slot.info = await slot.actor.call("start", timeout_s=self._spec.ray.start_timeout_s)
            slot.member = reconcile.up(slot.member, time.monotonic())
            self._report(f"{member_id} is up (epoch {slot.member.epoch})")
            if member_id == GATEWAY:
                self._gateway_is_up(slot.info)
            self._changed.set()
            deadline_s = self._spec.ray.health_deadline_s
            await first(self._watch_health(slot, slot.actor, deadline_s), self._watch_ports(slot))
        except TercetError as error:
            self._lost(member_id, slot, error)
            if slot.actor is not None:
                await slot.actor.kill()
        finally:
            self._changed.set()

    async def _watch_health(self, slot: Slot, actor: Running, deadline_s: float) -> None:
        """Return never. Raises TercetError."""
        while True:
            slot.status = await actor.call("health", timeout_s=deadline_s)
            self._changed.set()
            await asyncio.sleep(LOOK_EVERY_S)

    async def _watch_ports(self, slot: Slot) -> None:
        """A process that answers Ray may still have lost a port, so each is asked from outside. One miss is none."""
        deadline_s = self._spec.ray.health_deadline_s
        answered, misses = time.monotonic(), 0
        while True:
            await asyncio.sleep(ASK_PORTS_EVERY_S)
            try:
                await self._starter.ask_ports(slot.info, deadline_s / 2)
            except TercetError:
                misses += 1
                if misses > 1 and time.monotonic() - answered >= deadline_s:
                    raise
            else:
                answered, misses = time.monotonic(), 0

    def _lost(self, member_id: str, slot: Slot, error: TercetError) -> None:
        slot.member = reconcile.lost(slot.member, f"{error.code()}: {error}", time.monotonic())
        if self._is_up:
            self._report(f"{member_id} (epoch {slot.member.epoch}) lost: {slot.member.reason}{_next_try(slot)}")
        self._fault = self._fault or error
        self._changed.set()  # the gateway must be told before the kill is done

    async def _publish(self, gateway: Slot, epochs: Mapping[str, int]) -> None:
        infos: list[WorkerInfo] = [self._slots[worker_id].info for worker_id in epochs]
        try:
            await self._actor(GATEWAY).call("set_workers", infos, timeout_s=self._spec.ray.health_deadline_s)
        except TercetError as error:
            self._report(f"the gateway was not told of a change: {error}")  # its health watch decides what follows
            return
        gateway.told = epochs

    def _alive(self) -> list[str]:
        return [member_id for member_id, slot in self._slots.items() if slot.member.state is State.LIVE]

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
        return len(self._alive()) == len(self._target) and bool(self._gateway.status.get("ready"))

    def _why_not_ready(self) -> str:
        waiting = [f"{m} is {s.member.state}" for m, s in self._slots.items() if s.member.state is not State.LIVE]
        return "; ".join(waiting) or str(self._gateway.status.get("reason", "the gateway says nothing"))


def _next_try(slot: Slot) -> str:
    wait = slot.member.retry_at - slot.member.since
    return f"; {slot.member.crashes} in a row, next try in {wait:g} s" if wait else "; starting it again"
