"""Sums and gathers between the processes of one host, through memory that they share."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from tercet.kernels.native.library import Communicator, library

CAPACITY = 1 << 18  # bytes that a rank gives in one round; more takes several
SPINS = 4000  # some tens of microseconds, before a rank sleeps
FAILED, STOPPED = 256, 1  # a failure is FAILED * the rank that was waited for + its kind


def communicator_bytes(size: int) -> int:
    """Of the shared memory of so many ranks."""
    return int(library().communicator_bytes(size, CAPACITY))


class NativeCommunicator:
    """One rank's end. Every rank calls the same operations in the same order, on one thread; `stop` is for any."""

    def __init__(self, memory: memoryview, rank: int, size: int, timeout_s: float, *, spins: int = SPINS) -> None:
        """memory: `communicator_bytes`, zeros at first, mapped by all ranks. spins: 0 where ranks share cores."""
        self._memory = torch.frombuffer(memory, dtype=torch.uint8)
        self._rank, self._size = rank, size
        self._struct = Communicator(self._memory.data_ptr(), rank, size, CAPACITY, spins, timeout_s, 0)

    def all_reduce(self, x: Tensor) -> None:
        """x: float32, contiguous, of one shape everywhere; becomes the sum over the ranks, with the same bits
        everywhere. Raises CommunicatorError."""
        self._check(library().communicator_all_reduce(ctypes.byref(self._struct), x.data_ptr(), x.numel()))

    def gather(self, x: Tensor, *, wanted: bool = True) -> Tensor | None:
        """x: contiguous, of one shape and dtype everywhere -> [ranks, *shape], or None where it is not wanted. Raises
        CommunicatorError."""
        out = x.new_empty(self._size, *x.shape) if wanted else None
        to = None if out is None else out.data_ptr()
        self._check(library().communicator_gather(ctypes.byref(self._struct), x.data_ptr(), x.nbytes, to))
        return out

    def stop(self) -> None:
        """Every call at every rank fails within moments, now and ever after."""
        library().communicator_stop(ctypes.byref(self._struct))

    def _check(self, failure: int) -> None:
        if failure:
            raise CommunicatorError(failure // FAILED, stopped=failure % FAILED == STOPPED)


class CommunicatorError(Exception):
    def __init__(self, rank: int, *, stopped: bool) -> None:
        """rank: the one that was waited for. stopped: somebody has called `stop`; else it did not come in time."""
        super().__init__(f"waiting for rank {rank}: {'stopped' if stopped else 'it did not come in time'}")
        self.rank, self.stopped = rank, stopped
