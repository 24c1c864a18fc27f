"""The KV cache that a worker's model works in, and how its bytes reach the region that transfers read and write.

tensor  [layers, blocks, 2, block size, Hkv, D]; 2 is K, V
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tercet.devices import device_of
from tercet.transfer.memory.region import Region


class HostCache:
    """The model works in the memory of the region itself."""

    def __init__(self, region: Region, dtype: torch.dtype) -> None:
        self.tensor = torch.frombuffer(region.view, dtype=dtype).view(region.layout.shape)

    def publish(self, layer: int, blocks: Sequence[int]) -> None:
        """Let transfers read these blocks of a layer; they may when this returns."""

    def take(self, blocks: Sequence[int]) -> None:
        """Let the model's next step see these blocks, which transfers have written in all layers."""


class StagedCache(HostCache):
    """The model's cache lies on a device; block b of the region is the host's copy of block b."""

    def __init__(self, region: Region, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(region, dtype)
        self._host, self._device = self.tensor, device
        self.tensor = torch.zeros(region.layout.shape, dtype=dtype, device=device)
        if device.type == "cuda":  # else the driver stages every copy through a small pinned buffer
            region.pin(_pin)

    def publish(self, layer: int, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._host[layer, block].copy_(self.tensor[layer, block], non_blocking=True)
        self._wait()

    def take(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.tensor[:, block].copy_(self._host[:, block], non_blocking=True)
        self._wait()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


def cache_of(region: Region, dtype: torch.dtype, device: torch.device) -> HostCache:
    return StagedCache(region, dtype, device) if device_of(device).staged else HostCache(region, dtype)


def _pin(address: int, num_bytes: int) -> None:
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0))  # type: ignore[no-untyped-call]  # torch's own
