"""The reconcile loop: holds the target (which members there are) against what is, and mends the difference.

bring_up    start all members at once; the first fault ends it, since a user waits
run         look, decide (`reconcile.diff`), act, until stop is asked for
shut_down   gateway drains, workers drain, all stop, all are killed
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tercet.cluster import reconcile
from tercet.cluster.reconcile import GATEWAY, Action, Member, Publish, Start, State
from tercet.core import WorkerInfo
from tercet.errors import ClusterError, TercetError
from tercet.spec import ClusterSpec

LOOK_EVERY_S = 0.3
STOP_TIMEOUT_S = 5.0


class Running(Protocol):
    """A member's process. `call` raises TercetError; `kill` never fails and may be called on the dead."""

    async def call(self, method: str, *args: object, timeout_s: float) -> Any: ...
    def kill(self) -> None: ...


class Starter(Protocol):
    """Makes processes. `launch` raises ClusterError when there is no room for one."""

    async def launch(self, member_id: str, epoch: int) -> Running: ...
    def has_home(self) -> bool: ...


@dataclass
class _Slot:
    """One member as this controller holds it."""

    member: Member
    actor: Running | None = None
    info: Any = None  # WorkerInfo or GatewayInfo, once LIVE
    task: asyncio.Task[None] | None = None  # its start, then its health watch


class Controller:
    """Owns every member that it started."""

    def __init__(
        self, spec: ClusterSpec, worker_ids: Sequence[str], starter: Starter, report: Callable[[str], None]
    ) -> None:
        self._spec = spec
        self._target = (GATEWAY, *worker_ids)
        self._starter = starter
        self._report = report
        self._slots: dict[str, _Slot] = {}  # member id -> slot
        self._told: dict[str, int] | None = None
        self._status: dict[str, Any] = {}  # of the gateway, as of its last health
        self._changed = asyncio.Event()
        self._is_up = False  # once: before that a fault ends it all, after it the member is replaced
        self._fault: TercetError | None = None  # the first one

    @property
    def stop_requested(self) -> bool:
        return bool(self._status.get("stop_requested"))

    @property
    def gateway_info(self) -> Any:
        return self._slots[GATEWAY].info

    async def bring_up(self) -> None:
        """Return when all members live and a real request has passed. Raises the first TercetError of a member."""
        deadline = time.monotonic() + self._spec.ray.start_timeout_s
        while not self._ready():
            await self._step()
            if self._fault is not None:
                raise self._fault
            if time.monotonic() > deadline:
                raise ClusterError(f"not ready after {self._spec.ray.start_timeout_s:g} s: {self._why_not_ready()}")
        self._is_up = True

    async def run(self, stop: asyncio.Event) -> None:
        """Keep the cluster as it should be until `stop` is set or someone asks the gateway for it.

        Raises ClusterError when this process's own Ray node has died.
        """
        while not stop.is_set() and not self.stop_requested:
            await self._step()
            gateway = self._slots[GATEWAY].member
            if gateway.state is not State.LIVE and not self._starter.has_home():
                raise ClusterError(f"the Ray node of this process has died; the gateway was lost: {gateway.reason}")

    async def shut_down(self) -> None:
        """Drain what runs, then end it all; each step has a deadline, so this ends too."""
        await self._cancel_tasks()
        timeout_s = self._spec.limits.drain_timeout_s
        await self._tell([GATEWAY], "drain", timeout_s, timeout_s=timeout_s + STOP_TIMEOUT_S)
        workers = [m for m in self._slots if m != GATEWAY]
        await self._tell(workers, "drain", timeout_s, timeout_s=timeout_s + STOP_TIMEOUT_S)
        await self._tell(list(self._slots), "stop", timeout_s=STOP_TIMEOUT_S)
        await self.kill()

    async def kill(self) -> None:
        """End every member without a word."""
        await self._cancel_tasks()
        for slot in self._slots.values():
            if slot.actor is not None:
                slot.actor.kill()
        self._slots.clear()

    async def _step(self) -> None:
        actual = {member_id: slot.member for member_id, slot in self._slots.items()}
        for action in reconcile.diff(self._target, actual, self._told, time.monotonic()):
            await self._act(action)
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), LOOK_EVERY_S)
        for slot in self._slots.values():
            if slot.task is not None and slot.task.done():
                slot.task.result()  # an error that is no TercetError is a bug of ours and must be seen

    async def _act(self, action: Action) -> None:
        match action:
            case Start(member_id, epoch):
                before = self._slots.get(member_id)
                member = reconcile.starting(epoch, before.member if before else None, time.monotonic())
                self._slots[member_id] = slot = _Slot(member)
                slot.task = asyncio.create_task(self._live(member_id, slot))
            case Publish(epochs):
                await self._publish(dict(epochs))
            case reconcile.Stop(member_id):
                self._forget(member_id)

    async def _live(self, member_id: str, slot: _Slot) -> None:
        """One life of one member: launch, start, watch, and at its end kill what is left and say why."""
        try:
            slot.actor = await self._starter.launch(member_id, slot.member.epoch)
            slot.info = await slot.actor.call("start", timeout_s=self._spec.ray.start_timeout_s)
            slot.member = reconcile.up(slot.member, time.monotonic())
            self._report(f"{member_id} is up (epoch {slot.member.epoch})")
            self._changed.set()
            await self._watch(member_id, slot.actor)
        except TercetError as error:
            self._lost(member_id, slot, error)

    async def _watch(self, member_id: str, actor: Running) -> None:
        while True:
            health = await actor.call("health", timeout_s=self._spec.ray.health_deadline_s)
            if member_id == GATEWAY:
                self._status = health
                self._changed.set()
            await asyncio.sleep(LOOK_EVERY_S)

    def _lost(self, member_id: str, slot: _Slot, error: TercetError) -> None:
        if slot.actor is not None:
            slot.actor.kill()
        slot.member = reconcile.lost(slot.member, f"{error.code()}: {error}", time.monotonic())
        if member_id == GATEWAY:
            self._told, self._status = None, {}
        if self._is_up:
            self._report(f"{member_id} (epoch {slot.member.epoch}) lost: {slot.member.reason}{self._next_try(slot)}")
        self._fault = self._fault or error
        self._changed.set()

    def _next_try(self, slot: _Slot) -> str:
        wait = slot.member.retry_at - slot.member.since
        return f"; {slot.member.crashes} in a row, next try in {wait:g} s" if wait else "; starting it again"

    async def _publish(self, epochs: dict[str, int]) -> None:
        infos: list[WorkerInfo] = [self._slots[worker_id].info for worker_id in epochs]
        gateway = self._slots[GATEWAY].actor
        assert gateway is not None, "only a live gateway is published to"
        try:
            await gateway.call("set_workers", infos, timeout_s=self._spec.ray.health_deadline_s)
        except TercetError as error:
            self._report(f"the gateway was not told of a change: {error}")  # its health watch decides what follows
            return
        self._told = epochs

    def _forget(self, member_id: str) -> None:
        slot = self._slots.pop(member_id)
        if slot.task is not None:
            slot.task.cancel()
        if slot.actor is not None:
            slot.actor.kill()

    async def _tell(self, members: Sequence[str], method: str, *args: object, timeout_s: float) -> None:
        """Ask all at once; who does not do it is named, and killed later like all."""
        calls: list[Coroutine[Any, Any, Any]] = []
        for member_id in members:
            slot = self._slots.get(member_id)
            if slot is not None and slot.actor is not None and slot.member.state is State.LIVE:
                calls.append(slot.actor.call(method, *args, timeout_s=timeout_s))
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(outcome, TercetError):
                self._report(f"{method}: {outcome}")
            elif isinstance(outcome, BaseException):
                raise outcome

    async def _cancel_tasks(self) -> None:
        tasks = [slot.task for slot in self._slots.values() if slot.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ready(self) -> bool:
        live = [member_id for member_id, slot in self._slots.items() if slot.member.state is State.LIVE]
        return len(live) == len(self._target) and bool(self._status.get("ready"))

    def _why_not_ready(self) -> str:
        waiting = [f"{m} is {s.member.state}" for m, s in self._slots.items() if s.member.state is not State.LIVE]
        return "; ".join(waiting) or str(self._status.get("reason", "the gateway says nothing"))
