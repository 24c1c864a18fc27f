"""Hidden states on their way from one stage of a pipeline to the next, by torch.distributed. What is sent is not waited
for, so a stage begins with its next micro-batch while the next stage computes this one."""

from __future__ import annotations

import time
from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from tercet.distributed.collectives import Traffic, break_off, waited
from tercet.distributed.place import Place

TAG = 0
MOST_SENT = 8  # micro-batches that the next stage has not taken yet


class Stages:
    """One rank's end; its share of the stage before sends to it, and it to that of the next. One thread."""

    def __init__(self, place: Place, group: dist.ProcessGroup) -> None:
        """group: of all ranks, by their numbers."""
        self._place, self._group = place, group
        self.traffic = Traffic()  # seconds: mostly those that a stage waits for the one before
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()  # a tensor stays until it has been taken

    def receive(self, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """-> what the stage before gives, [rows, width]. Raises WorkerLost."""
        x = torch.empty(rows, width, dtype=dtype, device=device)
        if not rows:  # a replica without work
            return x
        began = time.monotonic()
        waited(self._group.recv([x], self._place.at_stage(self._place.stage - 1), TAG))
        self.traffic.add(0, began)
        return x

    def send(self, x: Tensor) -> None:
        """Raises WorkerLost."""
        if not len(x):
            return
        began = time.monotonic()
        self._sent.append((self._group.send([x], self._place.at_stage(self._place.stage + 1), TAG), x))
        self.traffic.add(x.nbytes, began)
        while len(self._sent) > MOST_SENT or self._sent[0][0].is_completed():
            waited(self._sent.popleft()[0])
            if not self._sent:
                return

    def stop(self) -> None:
        """End what this rank waits for. Any thread."""
        break_off(self._group)

    def close(self) -> None:
        """Once nothing runs: let go of the group, with its sockets and threads."""
        self._sent.clear()
        del self._group
