"""What the controller should keep, and what it holds of each member."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from tercet.cluster.reconcile import GATEWAY, Member, State
from tercet.core import Load, WorkerInfo
from tercet.errors import TercetError
from tercet.placement.roles import Placement
from tercet.spec import ClusterSpec

ASK_PORTS_EVERY_S = 2.0


@dataclass(frozen=True)
class Target:
    """What the cluster should be. It is replaced as a whole."""

    spec: ClusterSpec
    placement: Placement

    @property
    def members(self) -> dict[str, str]:
        """Member id -> role; the gateway has none."""
        return {GATEWAY: "", **{w.worker_id: w.role.value for w in self.placement.workers}}


class Running(Protocol):
    """A member's process. `call` raises TercetError; `kill` never fails and may be called on the dead."""

    async def call(self, method: str, *args: object, timeout_s: float) -> Any: ...
    async def kill(self) -> None: ...


class Starter(Protocol):
    """Makes processes, and looks at them from outside."""

    async def place(self, target: Target, spec: ClusterSpec, taken: Collection[str]) -> Placement:
        """A placement of `spec` in which who runs by `target` stays where it is. Raises ClusterError."""

    async def launch(self, member_id: str, epoch: int, target: Target) -> Running:
        """Raises ClusterError when there is no room for one."""

    async def ask_ports(self, info: Any, timeout_s: float) -> None:
        """Connect anew to every port of a member. Raises WorkerLost naming one that does not answer in time."""

    async def watch_home(self) -> None:
        """Return never; raises RayLost once nothing can be mended from here any more, saying why."""


@dataclass
class Slot:
    """One incarnation of a member as this controller holds it."""

    member_id: str
    role: str
    member: Member
    actor: Running | None = None
    info: Any = None  # WorkerInfo or GatewayInfo, once LIVE
    task: asyncio.Task[None] | None = None  # its start, then its watch and its drain; then its end
    leave: asyncio.Event = field(default_factory=asyncio.Event)  # set: it is to drain
    told: Mapping[str, int] | None = None  # of the gateway: the workers that it was last told of
    noted: Mapping[str, Any] | None = None  # of the gateway: the `overview` that it was last told
    status: Any = field(default_factory=dict)  # its last health; of the gateway: what `GatewayActor.health` gives

    @property
    def title(self) -> str:
        return f"{self.role} {self.member_id}".strip()

    @property
    def has_process(self) -> bool:
        return self.member.state in {State.LIVE, State.DRAINING, State.DRAINED}

    @property
    def next_try(self) -> str:
        wait = self.member.retry_at - self.member.since
        return f"; {self.member.crashes} in a row, next try in {wait:g} s" if wait else "; starting it again"


async def watch_ports(slot: Slot, starter: Starter, deadline_s: float) -> None:
    """Return never. A process that answers Ray may still have lost a port, so each is asked from outside; one miss is
    none. Raises TercetError."""
    answered, misses = time.monotonic(), 0
    while True:
        await asyncio.sleep(ASK_PORTS_EVERY_S)
        try:
            await starter.ask_ports(slot.info, deadline_s / 2)
        except TercetError:
            misses += 1
            if misses > 1 and time.monotonic() - answered >= deadline_s:
                raise
        else:
            answered, misses = time.monotonic(), 0


def overview(target: Target, slots: Mapping[str, Slot], answers: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """What `tercet status` and `tercet scale` are told, as plain data. answers: id of a question -> error, if any."""
    present = {m: s for m, s in sorted(slots.items()) if m != GATEWAY and s.member.state is not State.GONE}
    return {
        "target": {role.value: wanted.replicas for role, wanted in target.spec.roles.items()},
        "members": {member_id: _told_of(slot) for member_id, slot in present.items()},
        "answers": dict(answers),
    }


def _told_of(slot: Slot) -> dict[str, Any]:
    member = slot.member
    told: dict[str, Any] = {
        "role": slot.role,
        "state": member.state.value,
        "epoch": member.epoch,
        "reason": member.reason,
    }
    if isinstance(slot.info, WorkerInfo):
        told |= {"pid": slot.info.pid, "node": slot.info.node}
    if member.state is State.DRAINING and isinstance(slot.status, Load):  # the gateway hears of it no more
        told |= {"load": asdict(slot.status)}
    return told
