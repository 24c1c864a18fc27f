"""What a choice of workers was made from, as plain data: enough to make it again. Pure.

`taken` before the legs of the choice are counted; `again` gives it back to the same functions that made it.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tercet.core import GenerateRequest, Load, PairState, PromptImage, Role, SamplingParams, WorkerInfo
from tercet.roles.router.directory import Directory, Incarnation, WorkerView
from tercet.roles.router.encoders import Holders
from tercet.roles.router.planning import is_encoded_apart, plan_for
from tercet.roles.router.policy import History, Plan, Score, pressure, score_of

MOST_WORKERS = 64  # of a role, that a decision keeps: the chosen ones, then the least loaded
MOST_PAIRS = 64


class Seen(NamedTuple):
    """A live worker as the policy saw it."""

    worker: str
    epoch: int
    role: str
    legs: int  # that the router had put on it
    tokens: int  # of their prompts, or of the images that they encode
    running: int  # as it said itself
    waiting: int
    why_not: str = ""  # why it could not be chosen; empty: it could
    unreachable: tuple[str, ...] = ()  # workers of the next stage that it said it could not reach


Count = tuple[Incarnation, int]


@dataclass(frozen=True)
class Decision:
    """Which workers an attempt got, and all that this was decided by. `prefill` is empty if nobody had room."""

    at: float  # time.monotonic()
    attempt: int  # from 1
    roles: tuple[str, ...]  # of the topology
    workers: tuple[Seen, ...]
    left_out: int = 0  # further live workers
    prefill: str = ""
    decode: str = ""  # the same one if it does both
    score: Score | None = None
    encode: tuple[tuple[str, tuple[int, ...]], ...] = ()  # encode worker -> numbers of its images
    images: tuple[tuple[int, str], ...] = ()  # tokens of each image, and which worker had it already
    strikes: tuple[Count, ...] = ()  # of workers, by earlier attempts
    failures: tuple[tuple[Incarnation, Incarnation, int], ...] = ()  # of pairs
    keep: Incarnation | None = None  # holds KV of an earlier attempt
    last: tuple[Incarnation, Incarnation] | None = None  # the pair that has just failed: not again without a pause


class Pair(NamedTuple):
    prefill: str
    decode: str
    score: Score


def taken(
    request: GenerateRequest,
    history: History,
    directory: Directory,
    holders: Holders,
    plan: Plan | None,
    attempt: int,
    now: float,
) -> Decision:
    """plan: what was decided; None: nobody had room."""
    apart = is_encoded_apart(request, directory)
    chosen = set(history.last or ()) if plan is None else {*plan.workers, *plan.encode}
    workers, left_out = _seen(history, directory, chosen, apart=apart)
    number = {id(image): n for n, image in enumerate(request.images)} if apart else {}
    encode = {} if plan is None else plan.encode
    return Decision(
        now,
        attempt,
        directory.roles,
        workers,
        left_out,
        prefill="" if plan is None else plan.prefill.info.worker_id,
        decode="" if plan is None else plan.decode.info.worker_id,
        score=None if plan is None else plan.score,
        encode=tuple((_name(view), tuple(number[id(image)] for image in shown)) for view, shown in encode.items()),
        images=tuple((image.tokens, _live(holders.of(image), directory)) for image in request.images) if apart else (),
        strikes=tuple((view.incarnation, count) for view, count in history.strikes.items()),
        failures=tuple((p.incarnation, d.incarnation, count) for (p, d), count in history.failures.items()),
        keep=None if history.keep is None else history.keep.incarnation,
        last=None if history.last is None else (history.last[0].incarnation, history.last[1].incarnation),
    )


def _seen(
    history: History, directory: Directory, chosen: set[WorkerView], *, apart: bool
) -> tuple[tuple[Seen, ...], int]:
    """The workers that matter, and how many more there are."""
    seen: list[Seen] = []
    left_out = 0
    for role in directory.roles if apart else directory.computing:
        views = [view for view in directory.views.values() if view.info.role is role]
        if len(views) > MOST_WORKERS:
            left_out += len(views) - MOST_WORKERS
            views = heapq.nsmallest(MOST_WORKERS, views, key=lambda view: (view not in chosen, pressure(view)))
        most = directory.capacity[role]
        seen += [_row(view, _why_not(view, most, history.busy)) for view in views]
    return tuple(seen), left_out


def _row(view: WorkerView, why_not: str) -> Seen:
    info, load = view.info, view.load
    cut_off = tuple([pair.worker_id for pair in load.pairs if pair.fault])
    name, epoch, role = info.worker_id, info.epoch, info.role
    return Seen(name, epoch, role, view.legs, view.tokens, load.running, load.waiting, why_not, cut_off)


def _why_not(view: WorkerView, most: int, busy: set[WorkerView]) -> str:
    if not view.up:
        return "its stream is down"
    if view.legs >= most:
        return f"no room: {view.legs} of {most} places are taken"
    return "it has just rejected this request" if view in busy else ""


def _live(view: WorkerView | None, directory: Directory) -> str:
    """Its name; empty if that incarnation is gone."""
    name = _name(view)
    return name if directory.views.get(name) is view else ""


def _name(view: WorkerView | None) -> str:
    return "" if view is None else view.info.worker_id


# ---- the same again, from the record alone


def again(decision: Decision) -> Decision:
    """The decision that the policy makes now from what stands in this one."""
    views = {row.worker: _view(row) for row in decision.workers}
    history = _history(decision, views.values())
    directory = Directory([Role(role) for role in decision.roles], {Role(role): 1 for role in decision.roles})
    directory.views = {row.worker: views[row.worker] for row in decision.workers if not row.why_not}
    images, holders = _images(decision, views)
    request = GenerateRequest("", (), SamplingParams(), 0.0, images=images)
    plan = plan_for(request, history, directory, holders)
    if plan is None:
        return replace(decision, prefill="", decode="", score=None, encode=())
    number = {image.digest: n for n, image in enumerate(images)}
    encode = tuple((_name(view), tuple(number[i.digest] for i in shown)) for view, shown in plan.encode.items())
    return replace(decision, prefill=_name(plan.prefill), decode=_name(plan.decode), score=plan.score, encode=encode)


def pairs_of(decision: Decision) -> list[Pair]:
    """The best pairs of workers with room, with their scores: the lowest first."""
    views = [_view(row) for row in decision.workers if not row.why_not]
    history = _history(decision, views)
    computing = [role for role in decision.roles if role != Role.ENCODE]
    firsts = [view for view in views if view.info.role == computing[0]]
    lasts = [view for view in views if view.info.role == computing[-1]]
    one = computing[0] == computing[-1]
    found = zip(firsts, firsts, strict=True) if one else itertools.product(firsts, lasts)
    scored = (Pair(_name(p), _name(d), score_of(p, d, history)) for p, d in found)
    return heapq.nsmallest(MOST_PAIRS, scored, key=lambda pair: pair.score)


def decision_of(told: Mapping[str, Any]) -> Decision:
    """From JSON of `dataclasses.asdict`. Raises KeyError, TypeError, ValueError."""
    score = told["score"]
    named: dict[str, Any] = {
        "roles": tuple(told["roles"]),
        "workers": tuple(Seen._make((*row[:-1], tuple(row[-1]))) for row in told["workers"]),
        "score": None if score is None else _score(*score),
        "encode": tuple((worker, tuple(numbers)) for worker, numbers in told["encode"]),
        "images": tuple((tokens, holder) for tokens, holder in told["images"]),
        "strikes": tuple((_incarnation(who), count) for who, count in told["strikes"]),
        "failures": tuple((_incarnation(p), _incarnation(d), count) for p, d, count in told["failures"]),
        "keep": None if told["keep"] is None else _incarnation(told["keep"]),
        "last": None if told["last"] is None else tuple(map(_incarnation, told["last"])),
    }
    plain = {name: told[name] for name in ("at", "attempt", "left_out", "prefill", "decode")}
    return Decision(**plain, **named)


def _score(*told: Any) -> Score:
    *rules, prefill, decode = told
    return Score._make((*rules, tuple(prefill), tuple(decode)))


def _incarnation(told: Iterable[Any]) -> Incarnation:
    worker_id, epoch = told
    return worker_id, epoch


def _view(row: Seen) -> WorkerView:
    info = WorkerInfo(row.worker, Role(row.role), row.epoch, "", "", "")
    pairs = tuple(PairState(worker, fault="unreachable") for worker in row.unreachable)
    return WorkerView(info, Load(running=row.running, waiting=row.waiting, pairs=pairs), True, 0, row.tokens)


def _history(decision: Decision, views: Iterable[WorkerView]) -> History:
    """Also of workers that are gone, since they count where the policy asks whether there is a history."""
    known = {view.incarnation: view for view in views}

    def find(incarnation: Incarnation) -> WorkerView:
        if incarnation not in known:
            known[incarnation] = WorkerView(WorkerInfo(incarnation[0], Role.DECODE, incarnation[1], "", "", ""))
        return known[incarnation]

    return History(
        strikes=Counter({find(who): count for who, count in decision.strikes}),
        failures=Counter({(find(p), find(d)): count for p, d, count in decision.failures}),
        keep=None if decision.keep is None else find(decision.keep),
        last=None if decision.last is None else (find(decision.last[0]), find(decision.last[1])),
    )


def _images(decision: Decision, views: Mapping[str, WorkerView]) -> tuple[tuple[PromptImage, ...], Holders]:
    holders, images = Holders(), []
    for number, (tokens, holder) in enumerate(decision.images):
        images.append(PromptImage(number.to_bytes(4, "big"), (1, 1, tokens), ((0, tokens),)))
        if holder in views:
            holders.sent({views[holder]: (images[-1],)})
    return tuple(images), holders
