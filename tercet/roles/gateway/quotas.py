"""What the holder of a key may use: requests and tokens a minute, requests at once.

A minute's worth may be used at once; then it comes back evenly. Tokens are counted as they are made, so a request
begins while any are left, and may end in debt, for which the next one waits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tercet.errors import RateLimited
from tercet.roles.gateway.keys import Key

MINUTE_S = 60.0
MOST_KNOWN = 65536  # names whose use is remembered; the longest unused is forgotten


class Bucket:
    """Fills evenly, up to a minute's worth."""

    def __init__(self) -> None:
        self._level: float | None = None  # None: full
        self._at = 0.0

    def level(self, per_minute: int, now: float) -> float:
        if self._level is not None:
            self._level = min(per_minute, self._level + (now - self._at) * per_minute / MINUTE_S)
        else:
            self._level = per_minute
        self._at = now
        return self._level

    def take(self, count: float, per_minute: int, now: float) -> None:
        self._level = self.level(per_minute, now) - count


class Use:
    """Of one key, by name: a key that is replaced by another one of its name goes on where it was."""

    def __init__(self) -> None:
        self.requests, self.tokens, self.running = Bucket(), Bucket(), 0


class Quotas:
    """Event loop only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._uses: dict[str, Use] = {}  # the longest unused first

    @contextmanager
    def request(self, key: Key | None) -> Iterator[Callable[[int], None]]:
        """A request of that key; None: keys are not asked for. -> what to tell of its tokens. Raises RateLimited."""
        if key is None:
            yield lambda tokens: None
            return
        use, now = self._use(key.name), self._clock()
        self._check(key, use, now)
        if key.requests_per_minute is not None:
            use.requests.take(1, key.requests_per_minute, now)
        use.running += 1
        try:
            yield lambda tokens: self._spend(key, use, tokens)
        finally:
            use.running -= 1

    def _use(self, name: str) -> Use:
        use = self._uses.pop(name) if name in self._uses else Use()
        self._uses[name] = use
        if len(self._uses) > MOST_KNOWN:
            oldest = next((name for name, use in self._uses.items() if not use.running), None)
            if oldest is not None:
                del self._uses[oldest]
        return use

    def _check(self, key: Key, use: Use, now: float) -> None:
        if key.concurrent is not None and use.running >= key.concurrent:
            raise RateLimited(f"{use.running} requests of {key.name} are running, as many as it may have at once", 1.0)
        for bucket, limit, what in (
            (use.requests, key.requests_per_minute, "requests"),
            (use.tokens, key.tokens_per_minute, "tokens"),
        ):
            if limit is None:
                continue
            lacking = 1 - bucket.level(limit, now)
            if lacking > 0:
                wait_s = math.ceil(lacking * MINUTE_S / limit)
                raise RateLimited(f"{key.name} may use {limit} {what} a minute; try again in {wait_s} s", wait_s)

    def _spend(self, key: Key, use: Use, tokens: int) -> None:
        if key.tokens_per_minute is not None:
            use.tokens.take(tokens, key.tokens_per_minute, self._clock())
