"""The ledger of a worker's KV cache: who holds each block.

Every block is in exactly one state, in this order of precedence, so that at every step
`total = free + owned + leased + in flight + quarantined`:

    quarantined  a remote writer may still write into it; freed on proof, never on a timeout
    leased       granted to a remote writer that is expected to fill it
    in flight    a source of a transfer that is not over
    owned        held by sequences (a shared prefix block by several)
    free         held by nobody; an indexed one (engine/prefix.py) keeps its contents until it is reused, oldest first
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable, Iterable

from tercet.engine.prefix import PrefixIndex
from tercet.errors import Overloaded


class Hold(enum.IntEnum):
    OWNED = 0
    LEASED = 1
    IN_FLIGHT = 2
    QUARANTINED = 3


_PRECEDENCE = (Hold.QUARANTINED, Hold.LEASED, Hold.IN_FLIGHT, Hold.OWNED)
_STATES: tuple[Hold | None, ...] = (*_PRECEDENCE, None)


class BlockPool:
    """Not thread-safe."""

    def __init__(self, total: int, index: PrefixIndex, on_free: Callable[[], None] = lambda: None) -> None:
        """on_free: called whenever blocks have become free."""
        self.total = total
        self._index = index
        self._on_free = on_free
        self._holds = [[0] * total for _ in Hold]  # hold kind -> block -> how many hold it so
        self._counts = dict.fromkeys(_STATES, 0) | {None: total}  # state -> blocks in it; None is free
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(total))  # in order of reuse

    @property
    def available(self) -> int:
        return len(self._free)

    def allocate(self, count: int, hold: Hold) -> list[int]:
        """Take `count` free blocks, whose contents are lost. Raises Overloaded if there are fewer."""
        if count > len(self._free):
            raise Overloaded(f"{count} KV blocks are needed, {len(self._free)} of {self.total} are free")
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        self._index.forget(blocks)
        for block in blocks:
            self._change(block, hold, 1)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add an OWNED hold to blocks whose contents are reused, whether they are free or held by others."""
        for block in blocks:
            self._free.pop(block, None)
            self._change(block, Hold.OWNED, 1)

    def move(self, blocks: Iterable[int], source: Hold, target: Hold) -> None:
        for block in blocks:
            assert self._holds[source][block] > 0, f"block {block} is not {source.name}"
            self._change(block, source, -1)
            self._change(block, target, 1)

    def release(self, blocks: Iterable[int], hold: Hold) -> None:
        """Give blocks back; one that nobody holds any more is free. Later blocks of a chain are reused first."""
        before = len(self._free)
        for block in reversed(list(blocks)):
            assert self._holds[hold][block] > 0, f"block {block} is not {hold.name}"
            self._change(block, hold, -1)
            if not self._held(block):
                self._free[block] = None
                if block not in self._index:
                    self._free.move_to_end(block, last=False)  # nothing is cached in it, so it is reused first
        if len(self._free) > before:
            self._on_free()

    def counts(self) -> dict[Hold | None, int]:
        """How many blocks are in each state; None is free. Asserts that they sum to `total`."""
        assert sum(self._counts.values()) == self.total, f"the ledger does not balance: {self._counts}"
        assert self._counts[None] == len(self._free), f"{len(self._free)} free blocks: {self._counts}"
        return dict(self._counts)

    def check_integrity(self) -> None:
        """Raises AssertionError unless free list and counts say the same as the holds."""
        assert all(n >= 0 for kind in self._holds for n in kind), "negative hold"
        assert set(self._free) == {b for b in range(self.total) if not self._held(b)}, "free list differs from holds"
        self._index.check_integrity()
        states = [self._state(block) for block in range(self.total)]
        assert self._counts == {state: states.count(state) for state in _STATES}, "counts differ from holds"

    def _change(self, block: int, hold: Hold, by: int) -> None:
        self._counts[self._state(block)] -= 1
        self._holds[hold][block] += by
        self._counts[self._state(block)] += 1

    def _held(self, block: int) -> bool:
        return any(kind[block] for kind in self._holds)

    def _state(self, block: int) -> Hold | None:
        return next((hold for hold in _PRECEDENCE if self._holds[hold][block]), None)
