"""KV in a GPU's memory: the region that holds a worker's cache there, and what it asks of the GPU and its driver.

A `Gpu` is one device in this process (memory/cuda.py); the tests have one made of shared memory. All its work goes by a
`Stream`, in order; nothing waits on the host but `synchronise` and `fetch`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np

from tercet.transfer.memory.layout import KvLayout, Run, Units
from tercet.transfer.memory.region import SCRATCH, Region

if TYPE_CHECKING:  # a mover over host memory starts without torch, seconds sooner
    from torch import Tensor, dtype

UnitDigests = Callable[["Tensor", "Tensor", "Tensor", tuple[int, int, int]], "Tensor"]  # see kernels/digest.py
Mark = object  # a point in the engine's work, such as the end of a layer


class Gpu(ABC):
    """From any thread. Its methods, and those of a `Stream`, raise RuntimeError, as torch's do on a GPU."""

    uuid: str  # of the device, the same in every process, whatever CUDA_VISIBLE_DEVICES says
    kind: str  # of its memory, as transfer libraries name it
    number: int  # of the device in this process, by which they know it

    @abstractmethod
    def enter(self) -> object:
        """In the calling thread, libraries find this device to be the current one."""

    @abstractmethod
    def settle(self) -> None:
        """Wait until all is done that anything in this process has asked of the device so far."""

    @abstractmethod
    def allocate(self, num_bytes: int) -> int:
        """-> address of memory of its own, which `export` can hand to other processes; it lives as long as this one."""

    @abstractmethod
    def tensor(self, address: int, num_bytes: int) -> Tensor:
        """The bytes of memory that `allocate` gave, uint8 [num_bytes]."""

    @abstractmethod
    def export(self, address: int) -> bytes:
        """A handle by which another process of this host can open memory that `allocate` gave."""

    @abstractmethod
    def open(self, handle: bytes, num_bytes: int, uuid: str) -> int:
        """Map another process's memory, so many bytes on GPU `uuid` or more. -> address, until `close`."""

    @abstractmethod
    def close(self, address: int) -> None:
        """Unmap memory that was opened."""

    @abstractmethod
    def mark(self) -> Mark:
        """The end of what the calling thread has asked its current stream to do."""

    @abstractmethod
    def stream(self) -> Stream: ...


class Stream(ABC):
    """For one thread. It ends with its last reference, once what it was asked for is done."""

    @abstractmethod
    def wait(self, marks: Iterable[Mark]) -> None:
        """What is asked of the stream from here on comes after these."""

    @abstractmethod
    def using(self) -> AbstractContextManager[object]:
        """Within it, torch's operations go by this stream."""

    @abstractmethod
    def copy(self, target: int, source: int, runs: Sequence[Run]) -> None:
        """Runs from memory at one address to memory at another; either may be another GPU's, if it was opened."""

    @abstractmethod
    def fetch(self, tensor: Tensor) -> Tensor:
        """A copy in host memory, once all before it is done."""

    @abstractmethod
    def synchronise(self) -> None:
        """Wait until all is done. If this raises, it is not known to be."""


class DeviceRegion:
    """The cache and a scratch in one allocation of their own, since a handle to memory gives all of its allocation."""

    def __init__(self, layout: KvLayout, gpu: Gpu, unit_digests: UnitDigests) -> None:
        """unit_digests: equal in all workers, whatever computes it."""
        self.layout = layout
        self.gpu = gpu
        self.unit_digests = unit_digests
        self.num_bytes = layout.total_bytes + SCRATCH
        self.memory = gpu.allocate(self.num_bytes)  # its address
        self.bytes = gpu.tensor(self.memory, self.num_bytes)
        self.published = 0
        self.broken = ""  # why copies of it may not have ended, and never will
        self._computed: dict[tuple[int, int], tuple[int, Mark]] = {}  # (layer, block) -> which `publish`, its end
        stream = gpu.stream()
        with stream.using():
            self.bytes.zero_()
            first = DeviceUnits(self, layout.window, Units([0], 0, 1), layout.block_size, layout.heads)
            first.digests(0)  # so that what has to be compiled is, before a transfer waits for it
        for word in (8, 4, 2, 1):
            stream.copy(self.memory, self.memory, [(0, 0, word)])
        stream.synchronise()

    def publish(self, layer: int, blocks: Sequence[int]) -> None:
        """On the engine's thread: these blocks of the layer are complete once the current stream has come this far."""
        self.published += 1
        self._computed.update(dict.fromkeys(((layer, block) for block in blocks), (self.published, self.gpu.mark())))

    def forget(self, number: int) -> None:
        """On the engine's thread: the device is known to be past the first `number` of `publish`."""
        for place in [place for place, (at, _) in self._computed.items() if at <= number]:
            del self._computed[place]

    def computed(self, layers: range, blocks: Sequence[int]) -> list[Mark]:
        """What whoever reads these blocks of the layers must wait for, which is no step that was launched later."""
        found = (self._computed.get((layer, block)) for layer in layers for block in blocks)
        return [*dict(each for each in found if each is not None).values()]

    def scratch(self, num_bytes: int) -> Sequence[memoryview]:
        """Where a receiver places the bytes of a probe: nowhere, since the writer does."""
        return ()

    def close(self) -> None:
        """The memory is freed with the process: while another may have it mapped, to free it is not defined."""


KvRegion = Region | DeviceRegion


class DeviceUnits:
    """Some units, of some layers and heads, in a cache in a GPU's memory; as `Cells` for one in host memory."""

    def __init__(self, region: DeviceRegion, layers: range, units: Units, unit: int, heads: range) -> None:
        """unit: tokens of one. heads: numbers in the model."""
        self._region, self._layers, self._units, self._unit, self._heads = region, layers, units, unit, heads

    def digests(self, first_unit: int) -> Tensor:
        """int64 [layers, units, heads]. first_unit: number of the first one."""
        first = (self._layers.start, first_unit, self._heads.start)
        return self._region.unit_digests(self._rows(), *self._places(), first)

    def zero(self) -> None:
        blocks, subs = self._places()
        self._rows()[:, blocks, subs] = 0

    def _rows(self) -> Tensor:
        """[layers, blocks, units of a block, heads, parts, unit tokens, words], a view."""
        layout, held = self._region.layout, self._region.layout.heads
        per_block = layout.block_size // self._unit
        inner = (per_block, self._unit, len(held)) if layout.order == "NHD" else (len(held), per_block, self._unit)
        start = layout.offset(self._layers.start, 0)
        flat = self._region.bytes[start : start + len(self._layers) * layout.layer_bytes]
        shape = (len(self._layers), layout.blocks, layout.parts, *inner, -1)
        axes = (0, 1, 3, 5, 2, 4, 6) if layout.order == "NHD" else (0, 1, 4, 3, 2, 5, 6)
        rows = flat.view(_word(layout.row_bytes)).view(shape).permute(axes)
        first = self._heads.start - held.start
        return rows[:, :, :, first : first + len(self._heads)]

    def _places(self) -> tuple[Tensor, Tensor]:
        import torch

        found = torch.from_numpy(np.stack(self._units.places(self._region.layout.block_size // self._unit)))
        device = self._region.bytes.device
        if device.type == "cuda":  # else the host would wait for all that the stream was asked for before
            found = found.pin_memory()
        blocks, subs = found.to(device, non_blocking=True)
        return blocks, subs


def _word(row_bytes: int) -> dtype:
    """The largest integer type that divides a row."""
    import torch

    size = next(size for size in (8, 4, 2, 1) if row_bytes % size == 0)
    return {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[size]
