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
       │ lost
       v
     LOST ──Start(epoch + 1), after a backoff──> STARTING

A member that is wanted again while it drains still drains to its end, and starts again from GONE: there is no way back.
GONE keeps the epoch, so that a reused id continues from there.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Start:
    member_id: str
    epoch: int


@dataclass(frozen=True)
class Drain:
    """Let a worker's legs end; the gateway sends it no new ones."""

    member_id: str


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
    """Tell the gateway which workers live and are wanted: worker id -> epoch."""

    epochs: Mapping[str, int]


Action = Start | Drain | Stop | Drop | Publish


def diff(
    target: Collection[str], actual: Mapping[str, Member], told: Mapping[str, int] | None, now: float
) -> tuple[Action, ...]:
    """What to do so that `actual` becomes `target`; nothing if it already is, or if something must end first.

    told: the workers that the gateway was last told of; None if it was not told yet.
    """
    actions: list[Action] = []
    for member_id in sorted({*target, *actual}):
        member, wanted = actual.get(member_id), member_id in target
        action = _of_wanted(member_id, member, now) if wanted else _of_unwanted(member_id, member, told)
        if member is not None and member.state is State.DRAINED:
            action = Stop(member_id)
        if action is not None:
            actions.append(action)
    epochs = {m: actual[m].epoch for m in sorted(actual) if m != GATEWAY and m in target and _live(actual[m])}
    if GATEWAY in actual and _live(actual[GATEWAY]) and told != epochs:
        actions.append(Publish(epochs))
    return tuple(actions)


def _of_wanted(member_id: str, member: Member | None, now: float) -> Action | None:
    if member is None:
        return Start(member_id, 1)
    if member.state is State.GONE or (member.state is State.LOST and now >= member.retry_at):
        return Start(member_id, member.epoch + 1)
    return None


def _of_unwanted(member_id: str, member: Member | None, told: Mapping[str, int] | None) -> Action | None:
    state = member.state if member is not None else State.GONE
    if state is State.LIVE and told is not None and member_id not in told:
        return Drain(member_id)
    if state is State.STARTING:
        return Stop(member_id)
    return Drop(member_id) if state is State.LOST else None


def starting(epoch: int, before: Member | None, now: float) -> Member:
    return Member(epoch, State.STARTING, now, crashes=before.crashes if before else 0)


def up(member: Member, now: float) -> Member:
    return Member(member.epoch, State.LIVE, now, crashes=member.crashes)


def leaving(member: Member, state: State, now: float) -> Member:
    """On its way from DRAINING to GONE."""
    return Member(member.epoch, state, now)


def lost(member: Member, reason: str, now: float) -> Member:
    """The first loss is followed by a restart at once, further ones after 1, 2, 4 ... 30 s."""
    stable = _live(member) and now - member.since >= STABLE_S
    crashes = 1 if stable else member.crashes + 1
    wait = 0.0 if crashes == 1 else min(FIRST_BACKOFF_S * 2.0 ** (crashes - 2), LAST_BACKOFF_S)
    return Member(member.epoch, State.LOST, now, crashes, now + wait, reason)


def _live(member: Member) -> bool:
    return member.state is State.LIVE
