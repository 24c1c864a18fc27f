"""What the gateway's requests did in each of the last seconds: a bounded ring of points.

Each second the running choices are looked at, so that an answer counts while it is made and no token costs anything.
Latencies are those of the last WINDOW_S.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tercet.roles.gateway.choice import Choice
from tercet.roles.gateway.records import FAILED, FINISHED, ChoiceRecord, Record, Records

POINTS = 600
EVERY_S = 1.0
WINDOW_S = 10.0
MOST_SAMPLES = 4096  # of latencies in the window
MOST_PAIRS = 256  # of workers, whose bytes are told one by one

Link = tuple[str, str]  # from, to


@dataclass
class _Point:
    """One second, while it lasts."""

    finished: int = 0
    failed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    kv: Counter[Link] = field(default_factory=Counter)


class Series:
    def __init__(self, records: Records) -> None:
        self._records = records
        records.on_end = self._ended
        self._points: deque[tuple[float, str]] = deque(maxlen=POINTS)  # the time, and all of the point as JSON
        self._kv: deque[Counter[Link]] = deque(maxlen=int(WINDOW_S / EVERY_S))
        self._open = _Point()
        self._began = time.monotonic()
        self._ahead = -math.inf  # Unix time less time.monotonic(); never falls
        self._ttft: deque[tuple[float, float]] = deque(maxlen=MOST_SAMPLES)
        self._tpot: deque[tuple[float, float]] = deque(maxlen=MOST_SAMPLES)
        self.kv_bytes: Counter[Link] = Counter()  # of each pair, since the start

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(EVERY_S)
            self.tick(time.monotonic(), time.time())

    def tick(self, now: float, wall: float) -> None:
        """End the second. now: time.monotonic(); wall: Unix time.

        A clock that is set back does not set the points' times back, else who asks for newer points gets none."""
        self._ahead = max(self._ahead, wall - now)
        for record in self._records.running.values():
            if record.choice is not None:
                self._count(record, record.choice, now)
        for samples in (self._ttft, self._tpot):
            while samples and samples[0][0] < now - WINDOW_S:
                samples.popleft()
        point, seconds = self._open, max(now - self._began, 1e-3)
        running, waiting = self._records.states()
        told: dict[str, Any] = {
            "t": now + self._ahead,
            "ttft_p50": _quantile(self._ttft, 0.5),
            "ttft_p99": _quantile(self._ttft, 0.99),
            "tpot_p50": _quantile(self._tpot, 0.5),
            "tpot_p99": _quantile(self._tpot, 0.99),
            "tokens_in": point.tokens_in / seconds,
            "tokens_out": point.tokens_out / seconds,
            "finished": point.finished / seconds,
            "failed": point.failed / seconds,
            "running": running,
            "waiting": waiting,
            "kv": [[*link, count / seconds] for link, count in point.kv.most_common(MOST_PAIRS)],
        }
        self._points.append((told["t"], json.dumps(told)))
        self._kv.append(point.kv)
        self._open, self._began = _Point(), now

    def points(self) -> list[tuple[float, str]]:
        """Of the last ten minutes, the oldest first: Unix time, and the point as JSON."""
        return list(self._points)

    def kv_rates(self) -> dict[Link, float]:
        """Bytes/s of each pair over the last WINDOW_S."""
        total = Counter[Link]()
        for counted in self._kv:
            total += counted
        return {link: count / (len(self._kv) * EVERY_S) for link, count in total.items()}

    def _ended(self, record: Record, kept: Sequence[tuple[ChoiceRecord, Choice]]) -> None:
        now = time.monotonic()
        self._open.finished += record.state == FINISHED
        self._open.failed += record.state == FAILED
        for each, choice in kept:
            self._count(each, choice, now)
            if choice.num_tokens > 1:
                self._tpot.append((now, choice.tpot_s))

    def _count(self, record: ChoiceRecord, choice: Choice, now: float) -> None:
        """What is new of a choice since it was last looked at."""
        self._open.tokens_out += choice.num_tokens - record.counted_tokens
        record.counted_tokens = choice.num_tokens
        if choice.num_tokens and not record.counted_first:
            record.counted_first = True
            self._open.tokens_in += len(choice.request.token_ids)
            self._ttft.append((now, choice.ttft_s))
        if choice.account is not None and not record.counted_kv:
            record.counted_kv = True
            workers, moved = dict(choice.account.workers), choice.account.times.kv_bytes
            if moved and "prefill" in workers and "decode" in workers:
                link = workers["prefill"], workers["decode"]
                self._open.kv[link] += moved
                if link in self.kv_bytes or len(self.kv_bytes) < MOST_PAIRS:
                    self.kv_bytes[link] += moved


def _quantile(samples: Sequence[tuple[float, float]], share: float) -> float | None:
    """Of the values, the nearest rank; None if there is none."""
    if not samples:
        return None
    values = sorted(value for _, value in samples)
    return values[min(len(values) - 1, int(share * len(values)))]
