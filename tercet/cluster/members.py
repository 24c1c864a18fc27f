"""The controller's target, and what it knows of each member."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from tercet.cluster.reconcile import GATEWAY, Member, State, Told, moved
from tercet.core import ExpertRows, Load, Loading, WorkerInfo
from tercet.errors import TercetError
from tercet.placement.roles import Assignment, Placement
from tercet.spec import ClusterSpec

ASK_PORTS_EVERY_S = 2.0


@dataclass(frozen=True)
class Target:
    """The desired state of the cluster; replaced as a whole."""

    spec: ClusterSpec
    placement: Placement

    @property
    def members(self) -> dict[str, str]:
        """Member id -> role; the gateway has none."""
        return {GATEWAY: "", **{w.worker_id: w.role.value for w in self.placement.workers}}

    def worker(self, worker_id: str) -> Assignment:
        return next(worker for worker in self.placement.workers if worker.worker_id == worker_id)


class Running(Protocol):
    """A member's process, or those of its ranks. `call` raises TercetError; `kill` never fails and may be called on a
    dead one."""

    @property
    def others(self) -> Sequence[Mapping[str, Any]]:
        """Number, pid and node of rank 1, 2 ...; those of rank 0 are in its info."""

    async def call(self, method: str, *args: object, timeout_s: float) -> Any: ...
    async def kill(self) -> None: ...


class Starter(Protocol):
    """Starts members' processes, and checks them from outside."""

    async def place(self, target: Target, spec: ClusterSpec, taken: Collection[str]) -> Placement:
        """A placement of `spec` that keeps the workers of `target` where they are. Raises ClusterError."""

    async def launch(self, member_id: str, epoch: int, target: Target) -> Running:
        """Create the member's process. Raises ClusterError if there is no room."""

    async def ask_ports(self, info: Any, timeout_s: float) -> None:
        """Open a new connection to each port of a member. Raises WorkerLost naming one that does not answer in time."""

    async def watch_home(self) -> None:
        """Never returns. Raises RayLost, with the reason, once members can no longer be started or replaced."""


@dataclass
class Slot:
    """What this controller knows of one incarnation of a member."""

    member_id: str
    member: Member
    actor: Running | None = None  # one that switches has that of the incarnation before
    info: Any = None  # WorkerInfo or GatewayInfo, once LIVE
    task: asyncio.Task[None] | None = None  # its start, then its watch and its drain; then its end
    leave: asyncio.Event = field(default_factory=asyncio.Event)  # set when it is to drain
    told: Told | None = None  # gateway only: the workers that it was last told of
    noted: Mapping[str, Any] | None = None  # gateway only: the `overview` that it was last sent
    without: set[int] = field(default_factory=set)  # ranks that it goes on without
    placing: Mapping[str, Any] = field(default_factory=dict)  # what `Rebalancing` did last, as plain data
    loading: Loading | None = None  # how far it is with its model
    status: Any = field(default_factory=dict)  # the last `health`: a Load, or what `GatewayActor.health` gives

    def hear(self, status: Any) -> list[str]:
        """What it answers to `health`. -> what there is to say of it."""
        self.status = status
        lost = {each["rank"] for each in (self.actor.others if self.actor else ()) if each.get("lost")}
        without, self.without = self.without, lost
        here = isinstance(status, Load) and isinstance(self.info, WorkerInfo)  # one that switches has no info yet
        if here and status.transfer_endpoint != self.info.transfer_endpoint:
            self.info = replace(self.info, transfer_endpoint=status.transfer_endpoint)
            self.member = moved(self.member)
        return [
            *(
                f"{self.title} goes on without rank {rank}; another process is to take its place"
                for rank in sorted(lost - without)
            ),
            *(f"{self.title} has its rank {rank} back" for rank in sorted(without - lost)),
        ]

    @property
    def title(self) -> str:
        return f"{self.member.role} {self.member_id}".strip()

    @property
    def has_process(self) -> bool:
        return self.member.state in {State.LIVE, State.DRAINING, State.DRAINED}

    @property
    def next_try(self) -> str:
        wait = self.member.retry_at - self.member.since
        return f"; {self.member.crashes} in a row, next try in {wait:g} s" if wait else "; starting it again"


async def watch_loading(
    slot: Slot, actor: Running, told: Callable[[str, Loading], None], every_s: float, timeout_s: float
) -> None:
    """Never returns. told: gets the member's title, and each time how far it is. Raises TercetError."""
    while True:
        slot.loading = await actor.call("loading", timeout_s=timeout_s)
        if slot.loading is not None:
            told(slot.title, slot.loading)
        await asyncio.sleep(every_s)


async def watch_ports(slot: Slot, starter: Starter, deadline_s: float) -> None:
    """Never returns. Checks each port from outside, since a process that answers Ray may have lost a port. A single
    miss is ignored. Raises TercetError."""
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


def serving(slots: Mapping[str, Slot]) -> dict[str, str]:
    """Worker id -> role, of those that the gateway uses."""
    told = (slots[GATEWAY].told if GATEWAY in slots else None) or {}
    members = {worker_id: slots[worker_id].member for worker_id in told}
    return {m: each.role for m, each in members.items() if each.state is State.LIVE and each.epoch == told[m][0]}


def overview(target: Target, slots: Mapping[str, Slot]) -> dict[str, Any]:
    """What `tercet status` and those who wait for a change are told of the cluster, as plain data."""
    present = {m: s for m, s in sorted(slots.items()) if m != GATEWAY and s.member.state is not State.GONE}
    return {
        "target": {role.value: wanted.replicas for role, wanted in target.spec.roles.items()},
        "members": {member_id: _told_of(slot) for member_id, slot in present.items()},
    }


def _by_node(slot: Slot, experts: Sequence[ExpertRows]) -> list[ExpertRows]:
    """With what each rank has sent to those that are on other nodes now; of a lost one nobody knows."""
    others = slot.actor.others if slot.actor is not None else ()
    nodes = [slot.info.node if isinstance(slot.info, WorkerInfo) else "", *(place["node"] for place in others)]
    found = []
    for rows in experts:
        first = rows.rank - rows.rank % max(1, len(rows.sent_to))  # of its stage
        there = nodes[first : first + len(rows.sent_to)]
        here = nodes[rows.rank] if rows.rank < len(nodes) else ""
        away = sum(sent for sent, node in zip(rows.sent_to, there, strict=False) if node and here and node != here)
        found.append(replace(rows, crossing_bytes=away))
    return found


def _told_of(slot: Slot) -> dict[str, Any]:
    member = slot.member
    told: dict[str, Any] = {
        "role": member.role,
        "state": member.state.value,
        "epoch": member.epoch,
        "reason": member.reason,
        "last_loss": member.last_loss,
    }
    if isinstance(slot.info, WorkerInfo):
        told |= {"pid": slot.info.pid, "node": slot.info.node}
        if slot.actor is not None and slot.actor.others:
            told |= {"ranks": [dict(place) for place in slot.actor.others]}
    if isinstance(slot.status, Load) and slot.status.experts:  # with the health alone, not in the gateway's reports
        told |= {"experts": [asdict(rows) for rows in _by_node(slot, slot.status.experts)]}
        if slot.status.moves is not None:
            told |= {"moves": asdict(slot.status.moves), "placing": dict(slot.placing)}
    if member.state is State.STARTING and slot.loading is not None:
        told["reason"] = str(slot.loading)
    if member.state is State.DRAINING and isinstance(slot.status, Load):  # the gateway no longer gets its reports
        told |= {"load": asdict(slot.status)}
    return told
