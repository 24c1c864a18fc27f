"""The memory that holds a worker's KV cache: anonymous, shareable by file descriptor, gone with its last process."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Sequence

from tercet.transfer.layout import KvLayout, spans


class Region:
    """A memfd of `layout.total_bytes`, mapped here. It has no name in the file system, so nothing can leak by name.

    The size is sealed: a peer that maps it cannot shrink it under us. Pages are taken when first written.
    """

    def __init__(self, layout: KvLayout) -> None:
        self.layout = layout
        self.fd = os.memfd_create("tercet-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, layout.total_bytes)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self._map = mmap.mmap(self.fd, layout.total_bytes)
        self.view = memoryview(self._map)

    def views(self, layer: int, blocks: Sequence[int]) -> list[memoryview]:
        """The bytes of `blocks` of one layer, adjacent ones as one view."""
        return [self.view[start : start + length] for start, length in spans(self.layout, layer, blocks)]

    def block(self, layer: int, block: int) -> memoryview:
        start = self.layout.offset(layer, block)
        return self.view[start : start + self.layout.block_bytes]

    def close(self) -> None:
        """Close the descriptor; the mapping goes with the last tensor that looks at it."""
        os.close(self.fd)
