"""The controller's decisions, apart from their execution. Pure: desired and actual state in, actions out.

The life cycle of a member (a worker or the gateway). On the left it is in the target, on the right it is not, or no
longer:

    absent, GONE                                     LOST ──Drop──> GONE
       │ Start(epoch + 1)                              ^
       v                                               │ lost, in any of these
    STARTING ─────────────────────Stop────────────> STOPPING ──its process has ended──> GONE
       │ up                                            ^
       v                                               │ Stop
     LIVE ──Publish without it, then Drain──> DRAINING ──its legs have ended, or their time──> DRAINED
       │ lost                                                                                    │ it is wanted
       v                                                                                         v
     LOST ──Start(epoch + 1), after a backoff──> STARTING            LIVE <──up── SWITCHING <──Switch(epoch + 1)

A member that lives in another role than it is wanted in drains as one that is not wanted, and switches behind its end,
in its process. So does one that is wanted again while it drains: there is no shorter way back. Whoever is lost on the
way is started in the role that is wanted by then. GONE keeps the epoch, so that a reused id continues from there.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace

GATEWAY = "gateway"

STABLE_S = 30.0  # a member that was live for so long is not in a crash loop
FIRST_BACKOFF_S = 1.0
LAST_BACKOFF_S = 30.0


class State(enum.StrEnum):
    STARTING = "starting"
    LIVE = "live"
    LOST = "lost"
    DRAINING = "draining"
    DRAINED = "drained"
    SWITCHING = "switching"
    STOPPING = "stopping"
    GONE = "gone"


@dataclass(frozen=True)
class Member:
    """What the controller knows of one member. Times are of one monotonic clock, in seconds."""

    epoch: int
    state: State
    since: float
    crashes: int = 0  # consecutive, each before STABLE_S
    retry_at: float = 0.0
    reason: str = ""  # why it was lost
    last_loss: str = ""  # why an incarnation before it was
    role: str = ""  # of a worker
    revision: int = 0  # of where it is reached, which changes when it loses a rank or takes one back


Told = Mapping[str, tuple[int, int]]  # worker id -> epoch and revision


@dataclass(frozen=True)
class Start:
    member_id: str
    epoch: int


@dataclass(frozen=True)
class Drain:
    """Let a worker's legs end; the gateway sends it no new ones."""

    member_id: str


@dataclass(frozen=True)
class Switch:
    """Have a worker that has drained serve in the role in which it is wanted, in its process."""

    member_id: str
    epoch: int


@dataclass(frozen=True)
class Stop:
    """End the member's process, even if it is still starting."""

    member_id: str


@dataclass(frozen=True)
class Drop:
    """Start no successor for a member that was lost."""

    member_id: str


@dataclass(frozen=True)
class Publish:
    """Tell the gateway which workers live and are wanted."""

    told: Told


Action = Start | Drain | Switch | Stop | Drop | Publish


def diff(target: Mapping[str, str], actual: Mapping[str, Member], told: Told | None, now: float) -> tuple[Action, ...]:
    """What to do so that `actual` becomes `target`; nothing if it already is, or if something must end first.

    target: member id -> role. told: the workers that the gateway was last told of; None if it was not told yet.
    """
    actions: list[Action] = []
    for member_id in sorted({*target, *actual}):
        member, role = actual.get(member_id), target.get(member_id)
        if member is not None and member.state is State.LIVE and member.role != role:
            action = _leave(member_id, told)
        elif role is not None:
            action = _of_wanted(member_id, member, now)
        else:
            action = _of_unwanted(member_id, member)
        if action is not None:
            actions.append(action)
    serve = [m for m in sorted(actual) if m != GATEWAY and _live(actual[m]) and actual[m].role == target.get(m)]
    found = {m: (actual[m].epoch, actual[m].revision) for m in serve}
    if GATEWAY in actual and _live(actual[GATEWAY]) and told != found:
        actions.append(Publish(found))
    return tuple(actions)


def _of_wanted(member_id: str, member: Member | None, now: float) -> Action | None:
    if member is None:
        return Start(member_id, 1)
    if member.state is State.GONE or (member.state is State.LOST and now >= member.retry_at):
        return Start(member_id, member.epoch + 1)
    return Switch(member_id, member.epoch + 1) if member.state is State.DRAINED else None


def _of_unwanted(member_id: str, member: Member | None) -> Action | None:
    state = member.state if member is not None else State.GONE
    if state in {State.STARTING, State.SWITCHING, State.DRAINED}:
        return Stop(member_id)
    return Drop(member_id) if state is State.LOST else None


def _leave(member_id: str, told: Told | None) -> Action | None:
    """None: the gateway must hear of it first."""
    return Drain(member_id) if told is not None and member_id not in told else None


def starting(role: str, epoch: int, before: Member | None, now: float) -> Member:
    crashes, loss = (before.crashes, before.reason or before.last_loss) if before else (0, "")
    return Member(epoch, State.STARTING, now, crashes=crashes, last_loss=loss, role=role)


def switching(role: str, epoch: int, now: float) -> Member:
    return Member(epoch, State.SWITCHING, now, role=role)


def up(member: Member, now: float) -> Member:
    return replace(member, state=State.LIVE, since=now)


def moved(member: Member) -> Member:
    """It is reached elsewhere."""
    return replace(member, revision=member.revision + 1)


def leaving(member: Member, state: State, now: float) -> Member:
    """On its way from DRAINING to GONE, or to SWITCHING."""
    return Member(member.epoch, state, now, role=member.role)


def lost(member: Member, reason: str, now: float) -> Member:
    """The first loss is followed by a restart at once, further ones after 1, 2, 4 ... 30 s."""
    stable = _live(member) and now - member.since >= STABLE_S
    crashes = 1 if stable else member.crashes + 1
    wait = 0.0 if crashes == 1 else min(FIRST_BACKOFF_S * 2.0 ** (crashes - 2), LAST_BACKOFF_S)
    return Member(member.epoch, State.LOST, now, crashes, now + wait, reason, role=member.role)


def _live(member: Member) -> bool:
    return member.state is State.LIVE
