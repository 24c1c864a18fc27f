"""Which workers serve an attempt. Pure: from views of the workers and a request's history to a plan, with the score
that it won by."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from tercet.core import PromptImage, Role
from tercet.errors import PeerUnreachable, TercetError, TransferError, WorkerLost
from tercet.roles.router.directory import Incarnation, WorkerView
from tercet.spec import SchedulerSpec

Spread = Mapping[WorkerView, tuple[PromptImage, ...]]


@dataclass(frozen=True)
class Plan:
    """The workers of one attempt; twice the same one if it does both."""

    prefill: WorkerView
    decode: WorkerView
    score: Score
    encode: Spread = field(default_factory=dict)  # which images who encodes; none: where the prompt is computed

    @property
    def workers(self) -> tuple[WorkerView, ...]:
        """The decode worker first, since it admits first."""
        return (self.decode,) if self.prefill is self.decode else (self.decode, self.prefill)

    @property
    def incarnations(self) -> tuple[Incarnation, Incarnation]:
        return self.prefill.incarnation, self.decode.incarnation


@dataclass
class History:
    """What of a request's earlier attempts matters to the choice of its next workers."""

    busy: set[WorkerView] = field(default_factory=set)  # had no room when they were asked in this round
    strikes: Counter[WorkerView] = field(default_factory=Counter)  # failures that each had a part in
    failures: Counter[tuple[WorkerView, WorkerView]] = field(default_factory=Counter)  # of each pair
    keep: WorkerView | None = None  # holds KV of an earlier attempt, and is asked again, once
    kept: bool = False
    last: tuple[WorkerView, WorkerView] | None = None  # the pair whose handover has just failed
    deaths: set[Incarnation] = field(default_factory=set)  # workers that died while they served the request

    @property
    def is_blank(self) -> bool:
        """Whether it leaves the score of every pair as it is."""
        return self.keep is None and not self.strikes and not self.failures

    def before(self) -> History:
        """As it is now; a choice may change it."""
        return replace(self, busy=set(self.busy))

    def failed(
        self, plan: Plan, reporter: WorkerView | None, error: TercetError, encoders: Sequence[WorkerView] = ()
    ) -> None:
        """Give strikes to the worker at fault, which need not be the reporter. encoders: encode workers to blame for
        what failed between two workers."""
        keep, self.keep = self.keep, None
        self.last = plan.prefill, plan.decode
        self.failures[self.last] += 1
        if isinstance(error, WorkerLost) and reporter is not None:
            self.strikes[reporter] += 2
            self.deaths.add(reporter.incarnation)
            self.keep = plan.decode if reporter is not plan.decode and not self.kept else None
        elif isinstance(error, TransferError) and encoders:
            self.strikes.update(encoders)
            self.last = None  # the pair did nothing wrong
        elif isinstance(error, PeerUnreachable):  # either may be the one that is cut off
            self.strikes.update(plan.workers)
        elif isinstance(error, TransferError):
            # What landed at the decode worker and was verified need not be sent again: the other one is blamed first.
            self.strikes[plan.prefill] += 1
            if self.kept or keep is plan.decode:
                self.strikes[plan.decode] += 1
            else:
                self.keep = plan.decode
        self.kept = self.kept or self.keep is not None


class Score(NamedTuple):
    """The score of a pair of workers, compared field by field; the lowest wins."""

    not_kept: bool  # another decode worker holds KV of an earlier attempt
    failures: int  # of this pair, with this request
    strikes: int  # of both workers, with this request
    faulty: bool  # the prefill worker says that it cannot reach the decode worker
    prefill: tuple[int, int, str]  # pressure
    decode: tuple[int, int, str]


def choose(prefills: Sequence[WorkerView], decodes: Sequence[WorkerView], history: History) -> Plan | None:
    """The pair with the lowest score. None, so that a new round begins after a pause: every worker with room has just
    rejected the request, or the best pair is the one that has just failed.

    prefills, decodes: live workers with room; the same list where one worker does both.
    """
    for views in (prefills, decodes):
        if views and history.busy.issuperset(views):
            history.busy.difference_update(views)
            return None
    first = [view for view in prefills if view not in history.busy]
    last = first if prefills is decodes else [view for view in decodes if view not in history.busy]
    best = _best(first, last, history)
    if best is not None and (best.prefill, best.decode) == history.last:
        history.last = best = None
    return best


def _best(prefills: Sequence[WorkerView], decodes: Sequence[WorkerView], history: History) -> Plan | None:
    if prefills is decodes:
        pairs = [(view, view) for view in prefills]
    elif history.is_blank:  # each is then chosen on its own, unless the two cannot connect
        pairs = _least_loaded(prefills, decodes)
    else:
        pairs = list(itertools.product(prefills, decodes))
    scored = [(score_of(prefill, decode, history), prefill, decode) for prefill, decode in pairs]
    if not scored:
        return None
    score, prefill, decode = min(scored, key=lambda scored: scored[0])
    return Plan(prefill, decode, score)


def _least_loaded(prefills: Sequence[WorkerView], decodes: Sequence[WorkerView]) -> list[tuple[WorkerView, WorkerView]]:
    """For a blank history: the least loaded workers, or all pairs if those two cannot connect."""
    if not prefills or not decodes:
        return []
    prefill, decode = min(prefills, key=pressure), min(decodes, key=pressure)
    if not is_faulty(prefill, decode):
        return [(prefill, decode)]
    return list(itertools.product(prefills, decodes))


def score_of(prefill: WorkerView, decode: WorkerView, history: History) -> Score:
    return Score(
        decode is not history.keep,
        history.failures[prefill, decode],
        sum(history.strikes[view] for view in {prefill, decode}),
        is_faulty(prefill, decode),
        pressure(prefill),
        pressure(decode),
    )


def is_faulty(sends: WorkerView, gets: WorkerView) -> bool:
    """Whether a worker says that it cannot reach one of the next stage."""
    return any(pair.fault and pair.worker_id == gets.info.worker_id for pair in sends.pairs)


def capacity(role: Role, scheduler: SchedulerSpec) -> int:
    """Legs that a worker takes at once (engine.reserve, engine.add, Encode.begin)."""
    return scheduler.max_running + (0 if role is Role.DECODE else scheduler.max_waiting)


def pressure(view: WorkerView) -> tuple[int, int, str]:
    """How loaded a worker is. The router's own count comes first: it is fresher than the worker's report."""
    return view.tokens, view.load.running + view.load.waiting, view.info.worker_id
