"""Stop strings in a stream of text: cut out wherever they end, also when they span tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache


class StopMatcher:
    """Takes pieces of text and returns what can no longer be part of a stop string.

    push("Hel") -> "Hel"      stop = ("lo!",)
    push("l")   -> "l" is held back, it may begin "lo!"
    push("o! x") -> "" and `found`; all that follows is dropped
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.found = False
        self._stops = tuple(stops)
        self._held = ""
        self._beginnings = _beginnings(self._stops)
        self._longest = max((len(stop) for stop in stops), default=1) - 1

    def push(self, text: str) -> str:
        """Text that may go out now. Once `found` is true every later call gives ''."""
        if self.found:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        starts = [at for at in map(text.find, self._stops) if at >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        keep = self._suffix(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text held back, when the stream has ended without a stop string."""
        text, self._held = self._held, ""
        return text

    def _suffix(self, text: str) -> int:
        """Length of the longest suffix that begins a stop string."""
        if not text.endswith(self._beginnings):
            return 0
        longest = min(len(text), self._longest)
        return next(k for k in range(longest, 0, -1) if any(s.startswith(text[-k:]) for s in self._stops))


@lru_cache(64)  # the choices of a request share it
def _beginnings(stops: tuple[str, ...]) -> tuple[str, ...]:
    """Every beginning of every stop string: one C-level endswith tells whether anything must be held back."""
    return tuple({stop[:k] for stop in stops for k in range(1, len(stop))})
