"""What a step leaves on its device, on its way to the host: nobody waits before the results are asked for."""

from __future__ import annotations

import torch
from torch import Tensor


class Outputs:
    """`add` says under which number `fetched` has a tensor."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors: list[Tensor] = []
        self._ended: torch.Event | None = None

    def add(self, tensor: Tensor) -> int:
        """Begin to copy what a step computes."""
        self._tensors.append(tensor.to("cpu", non_blocking=True))
        return len(self._tensors) - 1

    def close(self) -> None:
        """The step is launched as a whole."""
        if self._device.type != "cpu":
            self._ended = torch.Event(self._device, blocking=True)
            self._ended.record()

    def fetched(self) -> list[Tensor]:
        """All of them, on the host; waits for the step's end."""
        if self._ended is not None:
            self._ended.synchronize()
        return self._tensors
