"""The prefix index: which blocks hold the KV of which full blocks of tokens. Who holds a block is in the ledger
(engine/blocks.py)."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence


def chain_hash(parent: bytes, token_ids: Sequence[int], images: bytes = b"") -> bytes:
    """Hash of a full block: its tokens, what they do not say of images, and everything before them. sha256, since a
    collision would serve one user's KV to another."""
    return hashlib.sha256(parent + struct.pack(f"<{len(token_ids)}I", *token_ids) + images).digest()


class PrefixIndex:
    """Not thread-safe."""

    def __init__(self, *, enabled: bool = True) -> None:
        """enabled: if False, nothing is ever found."""
        self._enabled = enabled
        self._hash_of: dict[int, bytes] = {}  # block -> hash of its contents
        self._block_of: dict[bytes, int] = {}  # the inverse

    def __contains__(self, block: int) -> bool:
        return block in self._hash_of

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest indexed run of a prompt's chained hashes."""
        blocks: list[int] = []
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def publish(self, block: int, digest: bytes) -> None:
        """Offer a full, verified block to later prompts. Of blocks with equal contents only the first is indexed."""
        if self._enabled and digest not in self._block_of and block not in self._hash_of:
            self._hash_of[block] = digest
            self._block_of[digest] = block

    def forget(self, blocks: Iterable[int]) -> None:
        """Stop offering these blocks: they will be overwritten, or their contents are wrong."""
        for block in blocks:
            digest = self._hash_of.pop(block, None)
            if digest is not None:
                del self._block_of[digest]

    def check_integrity(self) -> None:
        """Raises AssertionError unless both maps say the same."""
        assert {h: b for b, h in self._hash_of.items()} == self._block_of, "index maps differ"
