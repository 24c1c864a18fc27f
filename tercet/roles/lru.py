"""Values within a budget: of bytes, or of whatever a value is said to take."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Lru(Generic[K, V]):
    """The least recently used go first. Not thread-safe."""

    def __init__(self, most: int, size_of: Callable[[K, V], int]) -> None:
        self._most, self._size_of = most, size_of
        self._kept: OrderedDict[K, V] = OrderedDict()
        self.size = 0  # of all

    def get(self, key: K) -> V | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: K, value: V) -> None:
        """In the place of what the key had. What is larger than the budget is not kept."""
        if key in self._kept:
            self.size -= self._size_of(key, self._kept.pop(key))
        if self._size_of(key, value) > self._most:
            return
        self._kept[key] = value
        self.size += self._size_of(key, value)
        while self.size > self._most:
            self.size -= self._size_of(*self._kept.popitem(last=False))
