"""Sums and gathers of tensors over the ranks that share each layer of a model.

A step makes two sums a layer, so what counts is how long a small one takes. On two cores that share a host, a sum of
2.3 KB by gloo took 281 us, by shared memory see benchmarks/RESULTS.md.

Every rank calls the same operations in the same order. All of them raise WorkerLost once a rank is gone: nobody waits
for the time limit of a collective, since whoever notices a death calls `stop`.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tercet.errors import WorkerLost
from tercet.kernels.native.communicator import CommunicatorError, NativeCommunicator

Result = TypeVar("Result")
NEVER_SENT = 1  # a tag


@dataclass
class Traffic:
    """What a rank has done so far."""

    calls: int = 0
    num_bytes: int = 0  # that it gave
    seconds: float = 0.0  # its waiting for others included

    def add(self, num_bytes: int, began: float) -> None:
        """An operation has ended that began at `began`, time.monotonic()."""
        self.calls += 1
        self.num_bytes += num_bytes
        self.seconds += time.monotonic() - began


class Collectives(ABC):
    """rank, size: in the group that sums."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.traffic = Traffic()

    @abstractmethod
    def all_reduce(self, x: Tensor) -> Tensor:
        """-> the sum over the ranks, with the same bits everywhere; x, of one shape everywhere, may be overwritten. It
        is added up in float32."""

    @abstractmethod
    def gather(self, x: Tensor) -> Tensor | None:
        """x of one shape everywhere, [R, n] -> [ranks, R, n] at rank 0, None elsewhere."""

    def stop(self) -> None:  # noqa: B027  # one that is alone waits for nobody
        """End what this rank waits for. Any thread."""

    def close(self) -> None:  # noqa: B027  # nor does it hold anything
        """Once nothing runs: let go of what leads to the other ranks."""


class Alone(Collectives):
    """Of a group of one."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor) -> Tensor | None:
        return x.unsqueeze(0)


class _Counted(Collectives):
    def all_reduce(self, x: Tensor) -> Tensor:
        return self._counted(self._all_reduce, x)

    def gather(self, x: Tensor) -> Tensor | None:
        return self._counted(self._gather, x)

    @abstractmethod
    def _all_reduce(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _gather(self, x: Tensor) -> Tensor | None: ...

    def _counted(self, operation: Callable[[Tensor], Result], x: Tensor) -> Result:
        began = time.monotonic()
        result = operation(x)
        self.traffic.add(x.nbytes, began)
        return result


class TorchCollectives(_Counted):
    """By torch.distributed: gloo, nccl or hccl, as the device says."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group.rank(), group.size())
        self._group = group

    def _all_reduce(self, x: Tensor) -> Tensor:
        wide = x.float().contiguous()
        waited(self._group.allreduce([wide]))
        return wide.to(x.dtype)

    def _gather(self, x: Tensor) -> Tensor | None:
        parts = x.new_empty(self.size, *x.shape)
        waited(self._group.allgather([list(parts)], [x.contiguous()]))
        return parts if self.rank == 0 else None

    def stop(self) -> None:
        break_off(self._group)

    def close(self) -> None:
        del self._group  # it ends here, with its sockets and threads


def break_off(group: dist.ProcessGroup) -> None:
    """Whoever waits in it gets WorkerLost. Any thread. gloo has no call for this, but lets every wait of a group fail
    once one has run out of time. What waits on a GPU ends with the process."""
    if isinstance(group, dist.ProcessGroupGloo):
        other = (group.rank() + 1) % group.size()
        with contextlib.suppress(RuntimeError):
            group.recv([torch.empty(1)], other, NEVER_SENT).wait(timedelta(milliseconds=1))


def waited(work: dist.Work) -> None:
    """Raises WorkerLost if a rank is gone."""
    try:
        work.wait()
    except RuntimeError as error:  # torch has no narrower one
        raise WorkerLost(f"a rank of the group is gone: {str(error).partition('This is')[0][:300]}") from error


class HostCollectives(_Counted):
    """Through memory that the ranks of one host share."""

    def __init__(self, communicator: NativeCommunicator, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._communicator = communicator

    def _all_reduce(self, x: Tensor) -> Tensor:
        wide = x.float().contiguous()
        self._run(self._communicator.all_reduce, wide)
        return wide.to(x.dtype)

    def _gather(self, x: Tensor) -> Tensor | None:
        wanted = self.rank == 0
        return self._run(lambda given: self._communicator.gather(given, wanted=wanted), x.contiguous())

    def stop(self) -> None:
        self._communicator.stop()

    def close(self) -> None:
        del self._communicator  # the memory ends here

    @staticmethod
    def _run(operation: Callable[[Tensor], Result], x: Tensor) -> Result:
        try:
            return operation(x)
        except CommunicatorError as error:
            why = "the group is broken" if error.stopped else "it did not come in time"
            raise WorkerLost(f"waited for rank {error.rank} of the group: {why}") from error
