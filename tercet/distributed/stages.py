"""Hidden states on their way from one stage of a pipeline to the next, by torch.distributed. What is sent is not waited
for, so a stage begins with its next micro-batch while the next stage computes this one."""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from tercet.distributed.collectives import waited
from tercet.distributed.place import Place

TAG = 0
MOST_SENT = 8  # micro-batches that the next stage has not taken yet


class Stages:
    """One rank's end; its share of the stage before sends to it, and it to that of the next. One thread."""

    def __init__(self, place: Place, group: dist.ProcessGroup) -> None:
        """group: of all ranks, by their numbers."""
        self._place, self._group = place, group
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()  # a tensor stays until it has been taken

    def receive(self, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """-> what the stage before gives, [rows, width]. Raises WorkerLost."""
        x = torch.empty(rows, width, dtype=dtype, device=device)
        if not rows:  # a replica without work
            return x
        waited(self._group.recv([x], self._place.at_stage(self._place.stage - 1), TAG))
        return x

    def send(self, x: Tensor) -> None:
        """Raises WorkerLost."""
        if not len(x):
            return
        self._sent.append((self._group.send([x], self._place.at_stage(self._place.stage + 1), TAG), x))
        while len(self._sent) > MOST_SENT or self._sent[0][0].is_completed():
            waited(self._sent.popleft()[0])
            if not self._sent:
                return
