"""The KV cache that a worker's model works in, and how its bytes reach the region that transfers read and write.

tensor  [layers, blocks, parts, block size, Hkv, D]; the parts are K and V, or one for latents
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence

import torch

from tercet.devices import device_of
from tercet.transfer.memory.device import DeviceRegion, KvRegion
from tercet.transfer.memory.region import Region

Published = Callable[[], object]
"""Called once transfers may read what was published."""


class HostCache:
    """The model works in the memory of the region itself."""

    def __init__(self, region: Region, dtype: torch.dtype) -> None:
        self.tensor = torch.frombuffer(region.view, dtype=dtype).view(region.layout.shape)

    def begin(self, landed: Sequence[int]) -> None:
        """Before a step: let the model see these blocks, which transfers have written in all layers."""

    def publish(self, layer: int, blocks: Sequence[int], published: Published) -> None:
        """During a step, once the layer has written them: let transfers read these blocks of it."""
        published()

    def mark(self) -> int:
        """How many `publish` there have been so far."""
        return 0

    def wait(self, mark: int) -> None:
        """Until that many are published. Raises what one of them has raised."""

    def close(self) -> None:
        """No step follows. The region may be closed after this."""


class StagedCache(HostCache):
    """The model's cache lies elsewhere; block b of the region is the host's copy of block b."""

    def __init__(self, region: Region, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(region, dtype)
        self._host = self.tensor
        self.tensor = torch.zeros(region.layout.shape, dtype=dtype, device=device)

    def begin(self, landed: Sequence[int]) -> None:
        for layer in range(len(self.tensor)):
            for run in _runs(landed):
                self.tensor[layer, run].copy_(self._host[layer, run], non_blocking=True)

    def publish(self, layer: int, blocks: Sequence[int], published: Published) -> None:
        self._copy_out(layer, blocks)
        published()

    def _copy_out(self, layer: int, blocks: Sequence[int]) -> None:
        for run in _runs(blocks):
            self._host[layer, run].copy_(self.tensor[layer, run], non_blocking=True)


class DeviceCache(StagedCache):
    """The model's cache lies on a device. Blocks are copied out in a stream of their own, behind the layer that has
    written them and beside the next one; a thread waits for the copies, so that neither step nor engine does."""

    def __init__(self, region: Region, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(region, dtype, device)
        self._pinned = device_of(device).pins  # else the driver stages every copy through a small buffer of its own
        self._region = region
        if self._pinned:
            _cuda("cudaHostRegister", region.address, region.num_bytes, 0)
        self._device, self._copies = device, torch.Stream(device)
        self._marked = self._published = 0
        self._failure: Exception | None = None
        self._waiting: queue.SimpleQueue[tuple[torch.Event, Published] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._publisher = threading.Thread(target=self._publish_all, name="kv-publish", daemon=True)
        self._publisher.start()

    def begin(self, landed: Sequence[int]) -> None:
        # No block is written anew while it is still copied out.
        torch.accelerator.current_stream(self._device).wait_stream(self._copies)
        super().begin(landed)

    def publish(self, layer: int, blocks: Sequence[int], published: Published) -> None:
        self._copies.wait_stream(torch.accelerator.current_stream(self._device))
        with self._copies:
            self._copy_out(layer, blocks)
        copied = torch.Event(self._device, blocking=True)
        copied.record(self._copies)
        self._marked += 1
        self._waiting.put((copied, published))

    def mark(self) -> int:
        return self._marked

    def wait(self, mark: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._published >= mark or self._failure is not None)
            if self._failure is not None:
                raise self._failure

    def close(self) -> None:
        self._waiting.put(None)
        self._publisher.join()
        if self._pinned:
            _cuda("cudaHostUnregister", self._region.address)

    def _publish_all(self) -> None:
        try:
            while (waiting := self._waiting.get()) is not None:
                copied, published = waiting
                copied.synchronize()
                published()
                with self._changed:
                    self._published += 1
                    self._changed.notify_all()
        except Exception as error:  # noqa: BLE001  # the engine raises it, in `wait`
            with self._changed:
                self._failure = error
                self._changed.notify_all()


class MappedCache(HostCache):
    """The model works in the region, which lies in a GPU's memory, and other GPUs read and write it there. So a block
    may be given to another owner only once the device has ended what it was told to do with it."""

    def __init__(self, region: DeviceRegion, dtype: torch.dtype) -> None:
        self._region = region
        self.tensor = region.bytes[: region.layout.total_bytes].view(dtype).view(region.layout.shape)

    def publish(self, layer: int, blocks: Sequence[int], published: Published) -> None:
        """Transfers wait for the blocks on the device; nothing waits here."""
        self._region.publish(layer, blocks)
        published()

    def mark(self) -> int:
        return self._region.published

    def wait(self, mark: int) -> None:
        self._region.forget(mark)  # the step's result is here, so the device is past them


def cache_of(region: KvRegion, dtype: torch.dtype, device: torch.device) -> HostCache:
    if isinstance(region, DeviceRegion):
        return MappedCache(region, dtype)
    return DeviceCache(region, dtype, device) if device_of(device).staged else HostCache(region, dtype)


def _runs(blocks: Sequence[int]) -> list[slice]:
    """Neighbours together: each is a copy of its own, of memory in one piece, so that nobody waits for it."""
    runs: list[slice] = []
    for block in sorted(blocks):
        if runs and runs[-1].stop == block:
            runs[-1] = slice(runs[-1].start, block + 1)
        else:
            runs.append(slice(block, block + 1))
    return runs


def _cuda(name: str, *arguments: int) -> None:
    """Call a function of CUDA's runtime."""
    torch.cuda.check_error(getattr(torch.cuda.cudart(), name)(*arguments))  # type: ignore[no-untyped-call]  # torch's own
