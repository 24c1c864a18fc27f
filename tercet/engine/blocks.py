"""The block pool: who holds each block of a worker's KV cache, and which full blocks a later prompt may reuse.

Every block is in exactly one state, in this order of precedence, so that at every step
`total = free + owned + leased + in flight + quarantined`:

    quarantined  a remote writer may still write into it; freed on proof, never on a timeout
    leased       granted to a remote writer that is expected to fill it
    in flight    a source of a transfer that is not over
    owned        held by sequences (a shared prefix block by several)
    free         held by nobody; a cached one keeps its contents until it is the oldest and is needed
"""

from __future__ import annotations

import enum
import hashlib
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from tercet.errors import Overloaded


class Hold(enum.IntEnum):
    OWNED = 0
    LEASED = 1
    IN_FLIGHT = 2
    QUARANTINED = 3


_PRECEDENCE = (Hold.QUARANTINED, Hold.LEASED, Hold.IN_FLIGHT, Hold.OWNED)
_STATES: tuple[Hold | None, ...] = (*_PRECEDENCE, None)


def chain_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of a full block: its tokens and everything before them. sha256, since a collision would serve one
    user's KV to another."""
    return hashlib.sha256(parent + struct.pack(f"<{len(token_ids)}I", *token_ids)).digest()


class BlockPool:
    """Not thread-safe: the engine holds its lock around each call."""

    def __init__(self, total: int, *, prefix_cache: bool, on_free: Callable[[], None] = lambda: None) -> None:
        """on_free: called whenever blocks have become free, for whoever waits for some."""
        self.total = total
        self._on_free = on_free
        self._prefix_cache = prefix_cache
        self._holds = [[0] * total for _ in Hold]  # hold kind -> block -> how many hold it so
        self._counts = dict.fromkeys(_STATES, 0) | {None: total}  # state -> blocks in it; None is free
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(total))  # next to be taken first
        self._hash_of: dict[int, bytes] = {}  # block -> hash of its contents, if cached
        self._block_of: dict[bytes, int] = {}  # the inverse

    @property
    def available(self) -> int:
        return len(self._free)

    def allocate(self, count: int, hold: Hold) -> list[int]:
        """Take `count` blocks; the cached ones among them forget their contents. Raises Overloaded."""
        if count > len(self._free):
            raise Overloaded(f"{count} KV blocks are needed, {len(self._free)} of {self.total} are free")
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._forget(block)
            self._change(block, hold, 1)
        return blocks

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The longest cached run of blocks for a prompt's chained hashes; takes OWNED on each."""
        blocks: list[int] = []
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        for block in blocks:
            self._free.pop(block, None)
            self._change(block, Hold.OWNED, 1)
        return blocks

    def publish(self, block: int, digest: bytes) -> None:
        """Offer a full, verified block to later prompts; the first of equal contents stays."""
        if self._prefix_cache and digest not in self._block_of and block not in self._hash_of:
            self._hash_of[block] = digest
            self._block_of[digest] = block

    def unpublish(self, blocks: Iterable[int]) -> None:
        """Offer these to no later prompt: what stands in them is wrong."""
        for block in blocks:
            self._forget(block)

    def move(self, blocks: Iterable[int], source: Hold, target: Hold) -> None:
        for block in blocks:
            assert self._holds[source][block] > 0, f"block {block} is not {source.name}"
            self._change(block, source, -1)
            self._change(block, target, 1)

    def release(self, blocks: Iterable[int], hold: Hold) -> None:
        """Give blocks back; one that nobody holds any more is free. Later blocks of a chain go first."""
        before = len(self._free)
        for block in reversed(list(blocks)):
            assert self._holds[hold][block] > 0, f"block {block} is not {hold.name}"
            self._change(block, hold, -1)
            if not self._held(block):
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)  # what is worth nothing is taken first
        if len(self._free) > before:
            self._on_free()

    def counts(self) -> dict[Hold | None, int]:
        """How many blocks are in each state; None is free. Audits the balance on the way, as it is cheap."""
        assert sum(self._counts.values()) == self.total, f"the ledger does not balance: {self._counts}"
        assert self._counts[None] == len(self._free), f"{len(self._free)} free blocks: {self._counts}"
        return dict(self._counts)

    def check_integrity(self) -> None:
        """Raises AssertionError unless free list, counts and cache maps say the same as the holds."""
        assert all(n >= 0 for kind in self._holds for n in kind), "negative hold"
        assert set(self._free) == {b for b in range(self.total) if not self._held(b)}, "free list differs from holds"
        assert {h: b for b, h in self._hash_of.items()} == self._block_of, "cache maps differ"
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

    def _forget(self, block: int) -> None:
        digest = self._hash_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]
