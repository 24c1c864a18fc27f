"""A GPU made of shared memory, for machines without one: the driver's part of `cuda_ipc` between real processes, and a
real NIXL between them, which is told that the memory is the host's.

As on a GPU, nothing that a stream is asked to copy happens before somebody waits for it, and a mark may come late.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
from functools import partial

import torch

from tercet.kernels.digest import UnitDigests, unit_digests_reference
from tercet.transfer.memory.device import DeviceRegion, Gpu, Stream
from tercet.transfer.memory.layout import KvLayout
from tercet.transfer.transports.cuda_ipc import CudaIpcTransport
from tercet.transfer.transports.nixl import NixlGpuTransport, NixlTransport

HANDLE_BYTES = 64
WAIT_S = 20.0


class SharedGpu(Gpu):
    """Every process that makes one has a GPU of its own, which reaches all others unless it is `alone`."""

    kind, number = "DRAM", 0

    def __init__(self, uuid: str = "", alone: bool = False) -> None:
        self.uuid = uuid or f"fake-{os.getpid()}"
        self.alone = alone
        self.mapped: dict[int, mmap.mmap] = {}  # address -> its own memory, or that of another process
        self.opened: list[int] = []
        self.made: dict[int, tuple[int, int]] = {}  # address -> descriptor, bytes
        self.marks: list[SharedMark] = []
        self.entered: set[int] = set()  # threads
        self.settled = 0  # times

    def enter(self) -> None:
        self.entered.add(threading.get_ident())

    def settle(self) -> None:
        self.settled += 1

    def allocate(self, num_bytes: int) -> int:
        fd = os.memfd_create("fake-gpu", os.MFD_CLOEXEC)
        os.ftruncate(fd, num_bytes)
        address = self._map(fd, num_bytes)
        self.made[address] = (fd, num_bytes)
        return address

    def tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        return torch.frombuffer(self.mapped[address], dtype=torch.uint8)[:num_bytes]

    def export(self, address: int) -> bytes:
        fd, _ = self.made[address]
        return f"{os.getpid()} {fd}".encode().ljust(HANDLE_BYTES)

    def open(self, handle: bytes, num_bytes: int, uuid: str) -> int:
        if self.alone and uuid != self.uuid:
            raise RuntimeError("cuIpcOpenMemHandle_v2: CUDA_ERROR_PEER_ACCESS_UNSUPPORTED")
        pid, number = handle.split()
        try:
            fd = os.open(f"/proc/{pid.decode()}/fd/{number.decode()}", os.O_RDWR)
        except OSError as error:
            raise RuntimeError(f"cuIpcOpenMemHandle_v2: {error}") from error
        try:
            if os.fstat(fd).st_size < num_bytes:
                raise RuntimeError(f"the memory behind the handle is not {num_bytes} bytes long")
            address = self._map(fd, num_bytes)
        finally:
            os.close(fd)
        self.opened.append(address)
        return address

    def close(self, address: int) -> None:
        self.opened.remove(address)
        del self.mapped[address]

    def mark(self) -> SharedMark:
        self.marks.append(SharedMark())
        return self.marks[-1]

    def stream(self) -> Stream:
        return SharedStream(self)

    def free(self) -> None:
        for fd, _ in self.made.values():
            os.close(fd)
        self.made.clear()

    def _map(self, fd: int, num_bytes: int) -> int:
        mapped = mmap.mmap(fd, num_bytes)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        self.mapped[address] = mapped
        return address


class SharedMark:
    """Passed from the start, unless a test holds it."""

    def __init__(self) -> None:
        self.passed = threading.Event()
        self.passed.set()


class SharedStream(Stream):
    def __init__(self, gpu: SharedGpu) -> None:
        self._gpu, self._asked = gpu, []

    def wait(self, marks) -> None:
        self._asked += [self._passed(mark) for mark in marks]

    @contextlib.contextmanager
    def using(self):
        self.synchronise()  # torch's operations on a CPU begin at once
        yield

    def copy(self, target: int, source: int, runs) -> None:
        self._asked += [partial(ctypes.memmove, target + to, source + at, size) for at, to, size in runs]

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        self.synchronise()
        return tensor.clone()

    def synchronise(self) -> None:
        asked, self._asked = self._asked, []
        for do in asked:
            do()

    def _passed(self, mark: SharedMark):
        def wait() -> None:
            assert mark.passed.wait(WAIT_S)

        return wait


class FakeIpc(CudaIpcTransport):
    """`cuda_ipc` over that GPU."""

    name = "cuda_ipc_fake"

    @classmethod
    def missing(cls) -> None:
        return None


class FakeNixl(NixlGpuTransport):
    """`nixl_gpu` over that GPU."""

    name = "nixl_gpu_fake"

    @classmethod
    def missing(cls) -> str | None:
        return NixlTransport.missing()


FAKES = (FakeIpc, FakeNixl)


class Window:
    """Bytes of a GPU's memory that a test reads and writes as if they were a memoryview."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __len__(self) -> int:
        return len(self._tensor)

    def __bytes__(self) -> bytes:
        return self._tensor.cpu().numpy().tobytes()

    def __iter__(self):
        return iter(bytes(self))

    def __getitem__(self, part: slice) -> Window:
        return Window(self._tensor[part])

    def __setitem__(self, part: slice, data) -> None:
        self._tensor[part] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self._tensor.device)
        if self._tensor.is_cuda:
            torch.cuda.synchronize()

    def __eq__(self, other: object) -> bool:
        return bytes(self) == bytes(other)

    __hash__ = None


class SeenRegion(DeviceRegion):
    """With what tests look at in a Region."""

    def __init__(self, layout: KvLayout, gpu: Gpu, digests: UnitDigests = unit_digests_reference) -> None:
        super().__init__(layout, gpu, digests)
        self.view = Window(self.bytes[: layout.total_bytes])

    def block(self, layer: int, block: int) -> Window:
        start = self.layout.offset(layer, block)
        return self.view[start : start + self.layout.block_bytes]

    def close(self) -> None:
        super().close()
        if isinstance(self.gpu, SharedGpu):
            self.gpu.free()
