"""The last requests, running ones included: where each was sent and why, and what each stage took. Bounded, in memory.

    Frontend.session --of--> Record --choices--> ChoiceRecord     states and times: read off the Choice when asked
    router ----------note--> ChoiceRecord                         decisions, and how attempts ended

Nothing happens here per token. No text and no token id of a request is kept beyond its end.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from tercet.core import STAGES, GenerateRequest
from tercet.errors import Cancelled, InternalError, TercetError, UnknownRequest, UserError
from tercet.roles.gateway.ask import Ask, Timings
from tercet.roles.gateway.choice import Choice
from tercet.roles.router.effects import AttemptEnd
from tercet.roles.router.record import Decision, pairs_of

MOST = 512  # requests
MOST_ROWS = 65536  # of all their decisions: a row is a worker that was looked at, some 200 bytes
MOST_CHOICES = 16  # of a request that are told one by one
MOST_NOTES = 32  # of a choice: the first and the newest ones
BEHIND = "@"  # which no id has
LEAST_ID = 4  # characters of an id that is looked for by its beginning
MOST_MESSAGE = 500  # characters of an error's

Said = Decision | AttemptEnd
OnEnd = Callable[["Record", "Sequence[tuple[ChoiceRecord, Choice]]"], None]
WAITING, RUNNING, FINISHED, FAILED, CANCELLED = "waiting", "running", "finished", "failed", "cancelled"


@dataclass(eq=False)
class ChoiceRecord:
    """One choice of a request."""

    choice: Choice | None  # until its end
    first: list[Said] = field(default_factory=list)
    newest: deque[Said] = field(default_factory=lambda: deque(maxlen=MOST_NOTES // 2))
    notes: int = 0
    counted_tokens: int = 0  # by the series (series.py), and so on
    counted_first: bool = False
    counted_kv: bool = False
    told: dict[str, Any] = field(default_factory=dict)  # what is left of the choice behind its end

    def note(self, said: Said) -> None:
        self.notes += 1
        (self.first if len(self.first) < MOST_NOTES // 2 else self.newest).append(said)

    @property
    def rows(self) -> int:
        return sum(len(said.workers) for said in (*self.first, *self.newest) if isinstance(said, Decision))

    @property
    def planned(self) -> bool:
        """Whether it has workers."""
        last = self.newest[-1] if self.newest else self.first[-1] if self.first else None
        return isinstance(last, Decision) and bool(last.prefill)

    def facts(self) -> dict[str, Any]:
        """As of now, as plain data."""
        return self.told if self.choice is None else _facts(self.choice)

    def end(self) -> None:
        if self.choice is not None:
            self.told = _facts(self.choice)
            self.choice = None


@dataclass(eq=False)
class Record:
    """One request."""

    request_id: str  # with the client behind it where another client's request is kept under the same
    at: float  # when it came, Unix time
    arrived: float  # the same, time.monotonic()
    client: str
    model: str
    num_choices: int
    choices: list[ChoiceRecord] = field(default_factory=list)
    ended: float | None = None  # time.monotonic()
    state: str = RUNNING  # once it has ended: FINISHED, FAILED or CANCELLED
    code: str = ""  # of the error
    message: str = ""
    line: str = ""  # once it has ended: its summary as JSON, which changes no more

    @property
    def now(self) -> str:
        if self.ended is not None or any(each.planned or each.choice is None for each in self.choices):
            return self.state
        return WAITING

    def end(self, error: BaseException | None) -> None:
        for each in self.choices:
            each.end()
        self.ended = time.monotonic()
        self.state = FINISHED if error is None else FAILED
        if isinstance(error, asyncio.CancelledError | GeneratorExit | Cancelled | ConnectionError):
            self.state, self.code = CANCELLED, Cancelled.code()
        elif isinstance(error, Exception):
            known = isinstance(error, TercetError)
            self.code = error.code() if isinstance(error, TercetError) else InternalError.code()
            # What is said of a wrong request may quote it, and what others raise may, too.
            self.message = str(error)[:MOST_MESSAGE] if known and not isinstance(error, UserError) else ""
        self.line = json.dumps(self.summary())

    def summary(self) -> dict[str, Any]:
        """A line of a list."""
        facts = [each.facts() for each in self.choices]
        first = facts[0] if facts else {}
        elapsed_s = (self.ended or time.monotonic()) - self.arrived
        return {
            "id": self.request_id,
            "at": self.at,
            "client": self.client,
            "model": self.model,
            "state": self.now,
            "code": self.code,
            "message": self.message,
            "choices": self.num_choices,
            "prompt_tokens": sum(each["prompt_tokens"] for each in facts),
            "cached_tokens": first.get("cached_tokens"),
            "output_tokens": sum(each["output_tokens"] for each in facts),
            "elapsed_s": elapsed_s,
            "timings": first.get("timings", {}),
            "stages": bars(first["timings"], elapsed_s) if first else [],
        }

    def whole(self) -> Callable[[], dict[str, Any]]:
        """All that is known of it now. What is given makes plain data of it, on any thread: that takes long where a
        decision was among many workers."""
        notes = [(*each.first, *each.newest) for each in self.choices]
        facts = [
            each.facts() | {"notes_left_out": each.notes - len(said)}
            for each, said in zip(self.choices, notes, strict=True)
        ]
        return partial(_whole, self.summary(), facts, notes, self.arrived)


class Records:
    """Event loop only."""

    def __init__(self, most: int = MOST, most_rows: int = MOST_ROWS) -> None:
        self._most, self._most_rows = most, most_rows
        self._records: OrderedDict[str, Record] = OrderedDict()  # by request id, the newest last
        self._rows = 0  # of those that have ended
        self.running: dict[int, ChoiceRecord] = {}  # id() of a choice's GenerateRequest -> its record
        self.on_end: OnEnd = lambda record, kept: None

    @contextmanager
    def of(self, ask: Ask, model: str) -> Iterator[Record]:
        """Keep a request while it runs, and how it ended."""
        now = time.monotonic()
        wall = time.time() - (now - ask.arrived)
        record = Record(self._id(ask), wall, ask.arrived, ask.client, model, ask.num_choices)
        self._forget(record.request_id)  # clients reuse their ids
        self._records[record.request_id] = record
        error: BaseException | None = None
        try:
            yield record
        except BaseException as caught:
            error = caught
            raise
        finally:
            self._end(record, error)

    def begin(self, record: Record, choices: Sequence[Choice]) -> None:
        """Its choices are about to be generated."""
        for choice in choices[:MOST_CHOICES]:
            record.choices.append(ChoiceRecord(choice))
            self.running[id(choice.request)] = record.choices[-1]

    def note(self, request: GenerateRequest, said: Said) -> None:
        """What the router decided (`Router.watch`)."""
        if (record := self.running.get(id(request))) is not None:
            record.note(said)

    def lines(self) -> Callable[[], list[str]]:
        """All summaries as JSON, the newest first. What is given writes those of running requests, on any thread."""
        told = [record.line or record.summary() for record in reversed(self._records.values())]
        return lambda: [each if isinstance(each, str) else json.dumps(each) for each in told]

    def find(self, request_id: str) -> Record:
        """By its id, or how that begins, with or without what stands before its first hyphen. Raises UnknownRequest."""
        exact = self._records.get(request_id)
        alike = [exact] if exact is not None else [self._records[known] for known in self._alike(request_id)]
        if len(alike) == 1:
            return alike[0]
        asked = repr(request_id[:80])
        if alike:
            raise UnknownRequest(f"{asked} may be {len(alike)} requests: give more of the id")
        raise UnknownRequest(
            f"no request {asked} is known: the last {self._most} that were let in are kept; is it the X-Request-Id "
            "of the answer?"
        )

    def _id(self, ask: Ask) -> str:
        """No client replaces the record of another by giving its id."""
        known = self._records.get(ask.request_id)
        other = known is not None and known.client != ask.client
        return f"{ask.request_id}{BEHIND}{ask.client}" if other else ask.request_id

    def _alike(self, begin: str) -> list[str]:
        if len(begin) < LEAST_ID:
            return []
        return [
            known for known in self._records if begin in (known[: len(begin)], known.partition("-")[2][: len(begin)])
        ]

    def states(self) -> tuple[int, int]:
        """Requests that run and that wait."""
        live = [record.now for record in self._records.values() if record.ended is None]
        return live.count(RUNNING), live.count(WAITING)

    def _end(self, record: Record, error: BaseException | None) -> None:
        kept = [(each, each.choice) for each in record.choices if each.choice is not None]
        for _, choice in kept:
            self.running.pop(id(choice.request), None)
        record.end(error)
        self.on_end(record, kept)
        if self._records.get(record.request_id) is record:  # else newer ones have taken its place
            self._rows += sum(each.rows for each in record.choices)
        while self._records and (len(self._records) > self._most or self._rows > self._most_rows):
            self._forget(next(iter(self._records)))

    def _forget(self, request_id: str) -> None:
        record = self._records.pop(request_id, None)
        if record is not None and record.ended is not None:
            self._rows -= sum(each.rows for each in record.choices)


def bars(timings: dict[str, Any], elapsed_s: float) -> list[dict[str, Any]]:
    """The stages in their order, with when each began: seconds since the request came."""
    workers, found, at = timings["workers"], [], 0.0

    def add(stage: str, seconds: float | None, worker: str = "gateway") -> None:
        nonlocal at
        if seconds:
            found.append({"stage": stage, "at_s": at, "seconds": seconds, "worker": worker})
            at += seconds

    add("gateway", timings["gateway_s"])
    computing = workers.get("prefill") or workers.get("aggregated", "")
    decoding = workers.get("decode") or computing
    by = {"queue": "", "encode": workers.get("encode") or computing, "embed_transfer": computing, "prefill": computing}
    for stage in STAGES:
        add(stage, timings[f"{stage}_s"], by.get(stage, decoding))
    if timings["gateway_s"] is not None:  # a worker has told its stages
        add("decode", max(0.0, elapsed_s - at), decoding)
    elif timings["ttft_s"]:
        add("first token", timings["ttft_s"], "")
        add("decode", max(0.0, elapsed_s - at), "")
    return found


def _facts(choice: Choice) -> dict[str, Any]:
    account, timings = choice.account, choice.timings if choice.num_tokens else Timings(0.0, 0.0)
    return {
        "index": choice.index,
        "prompt_tokens": len(choice.request.token_ids),
        "cached_tokens": None if account is None else account.cached_tokens,
        "output_tokens": choice.num_tokens,
        "finish_reason": choice.finish_reason,
        "timings": timings.flat(),
    }


def _whole(
    summary: dict[str, Any], facts: list[dict[str, Any]], notes: list[tuple[Said, ...]], arrived: float
) -> dict[str, Any]:
    told = [
        known | {"notes": [_note(each, arrived) for each in said]} for known, said in zip(facts, notes, strict=True)
    ]
    return summary | {"told": told}


def _note(said: Said, arrived: float) -> dict[str, Any]:
    """at_s: since the request came."""
    told = asdict(said) | {"at_s": said.at - arrived}
    if isinstance(said, AttemptEnd):
        return told | {"kind": "end", "message": said.message[:MOST_MESSAGE]}
    return told | {"kind": "choice", "pairs": pairs_of(said)}
