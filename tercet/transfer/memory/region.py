"""The host memory of a worker's KV cache, which transfers read and write: anonymous, shared by file descriptor, freed
with its last process. For a cache on a device it is the host copy (engine/kv_cache.py)."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Sequence

import numpy as np

from tercet.transfer.memory.layout import KvLayout

MADV_POPULATE_WRITE = 23  # Linux 5.14
PIECE = 64 << 20  # bytes that are populated at once
SCRATCH = 1 << 20  # bytes behind the cache for measuring links; they never hold KV


class Region:
    """A memfd of the cache and a scratch, mapped here. It has no name in the file system, so nothing can leak by name.

    The size is sealed: a peer that maps it cannot shrink it under us. Pages are taken when first written, or all
    of them by `populate`.
    """

    def __init__(self, layout: KvLayout) -> None:
        self.layout = layout
        self.num_bytes = layout.total_bytes + SCRATCH
        self.fd = os.memfd_create("tercet-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, self.num_bytes)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self._map = mmap.mmap(self.fd, self.num_bytes)
        self.memory = memoryview(self._map)
        self.view = self.memory[: layout.total_bytes]

    def populate(self) -> None:
        """Take all pages now: a fault for each would cost the first prompts a tenth of their time and more. An older
        kernel takes them one by one all the same. Raises OSError if there is no memory for them."""
        for at in range(0, self.num_bytes, PIECE):  # nothing else in this process runs during a call
            try:
                self._map.madvise(MADV_POPULATE_WRITE, at, min(PIECE, self.num_bytes - at))
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                return

    def block(self, layer: int, block: int) -> memoryview:
        start = self.layout.offset(layer, block)
        return self.view[start : start + self.layout.block_bytes]

    def scratch(self, num_bytes: int) -> Sequence[memoryview]:
        """Where a receiver places the bytes of a probe."""
        return [self.memory[self.layout.total_bytes :][:num_bytes]]

    @property
    def address(self) -> int:
        return int(np.frombuffer(self.memory, dtype=np.uint8).ctypes.data)

    def close(self) -> None:
        """Give back the pages, and close the descriptor; the mapping itself ends with the last tensor over it."""
        self._map.madvise(mmap.MADV_REMOVE)
        os.close(self.fd)
