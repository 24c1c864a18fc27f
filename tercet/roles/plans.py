"""Which workers serve an attempt. Pure: what the router knows of its links in, a plan out."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tercet.core import Role
from tercet.errors import PeerUnreachable, TercetError, TransferError, WorkerLost
from tercet.spec import SchedulerSpec
from tercet.wire.worker_client import WorkerLink

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


@dataclass
class History:
    """What a request has been through, as far as the choice of its next workers goes."""

    busy: set[WorkerLink] = field(default_factory=set)  # had no room when they were asked in this round
    strikes: Counter[WorkerLink] = field(default_factory=Counter)  # failures that each had a part in
    failures: Counter[tuple[WorkerLink, WorkerLink]] = field(default_factory=Counter)  # of each pair
    keep: WorkerLink | None = None  # holds KV of an earlier attempt, and is asked again, once
    kept: bool = False
    last: tuple[WorkerLink, WorkerLink] | None = None  # the pair whose handover has just failed
    deaths: list[str] = field(default_factory=list)  # workers that died with the request on board

    def failed(self, plan: Plan, reporter: WorkerLink | None, error: TercetError) -> None:
        """Blame who is at fault, which need not be who said so."""
        keep, self.keep = self.keep, None
        self.last = plan.prefill, plan.decode
        self.failures[self.last] += 1
        if isinstance(error, WorkerLost) and reporter is not None:
            self.strikes[reporter] += 2
            self.deaths.append(f"{reporter.info.worker_id} (epoch {reporter.info.epoch})")
            self.keep = plan.decode if reporter is not plan.decode and not self.kept else None
        elif isinstance(error, PeerUnreachable):  # either may be the one that is cut off
            self.strikes.update(plan.links)
        elif isinstance(error, TransferError):
            # What landed at the decode worker and was verified need not be sent again: the other one is blamed first.
            self.strikes[plan.prefill] += 1
            if self.kept or keep is plan.decode:
                self.strikes[plan.decode] += 1
            else:
                self.keep = plan.decode
        self.kept = self.kept or self.keep is not None


def choose(prefills: Sequence[WorkerLink], decodes: Sequence[WorkerLink], history: History) -> Plan | None:
    """The pair that has failed the least, with the fewest strikes and no known fault between them, then the least
    loaded; the worker that keeps KV before all others. None: those that have room have just said that they have none,
    or there is no other pair than the one that has just failed; so a new round begins after a pause.

    prefills, decodes: those that live and have room; the same ones where one worker does both.
    """
    for links in (prefills, decodes):
        if links and history.busy.issuperset(links):
            history.busy.difference_update(links)
            return None
    first, last = ([link for link in links if link not in history.busy] for links in (prefills, decodes))
    pairs = list(itertools.product(first, last)) if prefills is not decodes else [(link, link) for link in first]
    best = min(pairs, key=_order(history), default=None)
    if best is not None and best == history.last:
        history.last = best = None
    return Plan(*best) if best else None


def _order(history: History) -> Callable[[tuple[WorkerLink, WorkerLink]], tuple[object, ...]]:
    def order(pair: tuple[WorkerLink, WorkerLink]) -> tuple[object, ...]:
        prefill, decode = pair
        strikes = sum(history.strikes[link] for link in set(pair))
        failures = history.failures[pair]
        faulty = _fault(prefill, decode)
        return decode is not history.keep, failures, strikes, faulty, pressure(prefill), pressure(decode)

    return order


def _fault(prefill: WorkerLink, decode: WorkerLink) -> bool:
    """Whether the prefill worker says that it cannot reach the decode worker."""
    return any(pair.fault and pair.worker_id == decode.info.worker_id for pair in prefill.load.pairs)


def capacity(role: Role, scheduler: SchedulerSpec) -> int:
    """Legs that a worker takes at once (engine.reserve, engine.add)."""
    return scheduler.max_running + (0 if role is Role.DECODE else scheduler.max_waiting)


def pressure(link: WorkerLink) -> tuple[int, int, str]:
    """What the router itself has put on a worker is fresher than what the worker reports."""
    return link.outstanding_tokens, link.load.running + link.load.waiting, link.info.worker_id


def _incarnation(link: WorkerLink) -> Incarnation:
    return link.info.worker_id, link.info.epoch
