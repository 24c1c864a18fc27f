"""The controller's decisions, apart from their execution. Pure: what should be and what is, actions out.

The life of a member (a worker or the gateway):

    absent --Start(epoch 1)--> STARTING --up--> LIVE --lost--> LOST --Start(epoch + 1), after a backoff--> STARTING
                                   └───────────lost────────────┘
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass

GATEWAY = "gateway"

STABLE_S = 30.0  # a member that lived so long is not in a crash loop
FIRST_BACKOFF_S = 1.0
LAST_BACKOFF_S = 30.0


class State(enum.StrEnum):
    STARTING = "starting"
    LIVE = "live"
    LOST = "lost"


@dataclass(frozen=True)
class Member:
    """What the controller knows of one member. Times are of one monotonic clock, in seconds."""

    epoch: int
    state: State
    since: float
    crashes: int = 0  # in a row, each before STABLE_S
    retry_at: float = 0.0
    reason: str = ""  # why it was lost


@dataclass(frozen=True)
class Start:
    member_id: str
    epoch: int


@dataclass(frozen=True)
class Publish:
    """Tell the gateway which workers live: worker id -> epoch."""

    epochs: Mapping[str, int]


Action = Start | Publish


def diff(
    target: Collection[str], actual: Mapping[str, Member], told: Mapping[str, int] | None, now: float
) -> tuple[Action, ...]:
    """What to do so that `actual` becomes `target`; nothing if it already is.

    told: what the gateway was last told, None if the live gateway was told nothing yet.
    """
    actions: list[Action] = []
    for member_id in sorted(target):
        member = actual.get(member_id)
        if member is None:
            actions.append(Start(member_id, 1))
        elif member.state is State.LOST and now >= member.retry_at:
            actions.append(Start(member_id, member.epoch + 1))
    epochs = {m: actual[m].epoch for m in sorted(actual) if m != GATEWAY and _live(actual[m])}
    if GATEWAY in actual and _live(actual[GATEWAY]) and told != epochs:
        actions.append(Publish(epochs))
    return tuple(actions)


def starting(epoch: int, before: Member | None, now: float) -> Member:
    return Member(epoch, State.STARTING, now, crashes=before.crashes if before else 0)


def up(member: Member, now: float) -> Member:
    return Member(member.epoch, State.LIVE, now, crashes=member.crashes)


def lost(member: Member, reason: str, now: float) -> Member:
    """The first loss is mended at once, the next ones after 1, 2, 4 ... 30 s."""
    stable = _live(member) and now - member.since >= STABLE_S
    crashes = 1 if stable else member.crashes + 1
    wait = 0.0 if crashes == 1 else min(FIRST_BACKOFF_S * 2.0 ** (crashes - 2), LAST_BACKOFF_S)
    return Member(member.epoch, State.LOST, now, crashes, now + wait, reason)


def _live(member: Member) -> bool:
    return member.state is State.LIVE
