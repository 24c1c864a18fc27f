"""A GPU of NVIDIA's, by its driver's own interface (libcuda), whose functions keep their names and arguments for good.

Not by torch's `_share_cuda_`, which is private, and would hand out the whole segment of its allocator in which a tensor
happens to lie; nor can that be shared at all with `expandable_segments`. So the memory here is none of torch's: torch
sees it by `__cuda_array_interface__`.
"""

from __future__ import annotations

import ctypes
import functools
import uuid
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from ctypes import byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from typing import Any

import torch
from torch import Tensor

from tercet.transfer.memory.device import Gpu, Mark, Stream
from tercet.transfer.memory.layout import Run

LIBRARY = "libcuda.so.1"
CopyRuns = Callable[[int, int, Sequence[Run], torch.device], None]  # target, source, runs, device
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: such a stream does not wait for the default one
LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS


class IpcHandle(ctypes.Structure):
    """CUipcMemHandle; the driver takes it by value."""

    _fields_ = (("reserved", c_ubyte * 64),)


ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, c_void_p),
    "cuGetErrorString": (c_int, c_void_p),
    "cuDeviceGet": (c_void_p, c_int),
    "cuDeviceGetCount": (c_void_p,),
    "cuDeviceGetUuid_v2": (c_void_p, c_int),
    "cuDeviceCanAccessPeer": (c_void_p, c_int, c_int),
    "cuDevicePrimaryCtxRetain": (c_void_p, c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuCtxSynchronize": (),
    "cuMemAlloc_v2": (c_void_p, c_size_t),
    "cuMemGetAddressRange_v2": (c_void_p, c_void_p, c_uint64),
    "cuIpcGetMemHandle": (c_void_p, c_uint64),
    "cuIpcOpenMemHandle_v2": (c_void_p, IpcHandle, c_uint),
    "cuIpcCloseMemHandle": (c_uint64,),
    "cuStreamCreate": (c_void_p, c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuMemcpyAsync": (c_uint64, c_uint64, c_size_t, c_void_p),
}


class Driver:
    """libcuda. Raises OSError or AttributeError if it is not there or too old."""

    def __init__(self) -> None:
        library = ctypes.CDLL(LIBRARY)
        self._functions = {name: getattr(library, name) for name in ARGUMENTS}
        for name, arguments in ARGUMENTS.items():
            self._functions[name].argtypes = arguments

    def call(self, name: str, *arguments: Any) -> None:
        """Raises RuntimeError with the driver's name of the error."""
        code = self._functions[name](*arguments)
        if code:
            raise RuntimeError(f"{name}: {self._told('cuGetErrorName', code)}, {self._told('cuGetErrorString', code)}")

    def _told(self, name: str, code: int) -> str:
        text = c_char_p()
        self._functions[name](code, byref(text))
        return text.value.decode() if text.value else str(code)


class CudaGpu(Gpu):
    kind = "VRAM"

    def __init__(self, device: torch.device, copy_runs: CopyRuns | None = None) -> None:
        """copy_runs: for copies of many runs on torch's current stream; else the driver is asked for each run."""
        self._device, self._driver, self.copy_runs = device, Driver(), copy_runs
        self.number = device.index or 0
        torch.cuda.init()  # type: ignore[no-untyped-call]  # torch's own, as below
        self._number, context = c_int(), c_void_p()
        self._driver.call("cuInit", 0)
        self._driver.call("cuDeviceGet", byref(self._number), self.number)
        self._driver.call("cuDevicePrimaryCtxRetain", byref(context), self._number)  # torch's own
        self._context = context
        self.uuid = self._uuid_of(self._number)

    def enter(self) -> Callable[..., None]:
        """-> the driver's `call`, once this GPU's context is in force in the calling thread."""
        self._driver.call("cuCtxSetCurrent", self._context)
        return self._driver.call

    def call(self, name: str, *arguments: Any) -> None:
        self.enter()(name, *arguments)

    def settle(self) -> None:
        self.call("cuCtxSynchronize")

    def allocate(self, num_bytes: int) -> int:
        address = c_uint64()
        self.call("cuMemAlloc_v2", byref(address), num_bytes)
        return address.value

    def tensor(self, address: int, num_bytes: int) -> Tensor:
        return torch.as_tensor(_Bytes(address, num_bytes), device=self._device)

    def export(self, address: int) -> bytes:
        handle = IpcHandle()
        self.call("cuIpcGetMemHandle", byref(handle), address)
        return bytes(handle.reserved)

    def open(self, handle: bytes, num_bytes: int, uuid: str) -> int:
        self._require_peer_access(uuid)
        address, base, size = c_uint64(), c_uint64(), c_size_t()
        self.call("cuIpcOpenMemHandle_v2", byref(address), IpcHandle.from_buffer_copy(handle), LAZY_PEER_ACCESS)
        self.call("cuMemGetAddressRange_v2", byref(base), byref(size), address)
        if size.value < num_bytes:
            self.close(address.value)
            raise RuntimeError(f"the memory behind the handle is {size.value} bytes long, not {num_bytes}")
        return address.value

    def close(self, address: int) -> None:
        self.call("cuIpcCloseMemHandle", address)

    def mark(self) -> Mark:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def stream(self) -> Stream:
        return _CudaStream(self, self._device)

    def _require_peer_access(self, uuid: str) -> None:
        """A GPU that is hidden from this process cannot be asked; then the driver decides, which can map it too."""
        count, can = c_int(), c_int(1)
        self._driver.call("cuDeviceGetCount", byref(count))
        for ordinal in range(count.value):
            number = c_int()
            self._driver.call("cuDeviceGet", byref(number), ordinal)
            if number.value != self._number.value and self._uuid_of(number) == uuid:
                self._driver.call("cuDeviceCanAccessPeer", byref(can), self._number, number)
        if not can.value:
            raise RuntimeError(f"GPU {self.uuid} has no peer access to GPU {uuid}, over NVLink or PCIe")

    def _uuid_of(self, number: c_int) -> str:
        found = (c_ubyte * 16)()
        self._driver.call("cuDeviceGetUuid_v2", byref(found), number)
        return str(uuid.UUID(bytes=bytes(found)))


class _CudaStream(Stream):
    """A stream of its own, so that nothing but what it is asked for delays it."""

    def __init__(self, gpu: CudaGpu, device: torch.device) -> None:
        self._gpu, self._device, self._handle = gpu, device, c_void_p()
        gpu.call("cuStreamCreate", byref(self._handle), NON_BLOCKING)
        weakref.finalize(self, gpu.call, "cuStreamDestroy_v2", self._handle).atexit = False
        self._stream = torch.cuda.ExternalStream(self._handle.value, device=device)  # type: ignore[no-untyped-call]

    def wait(self, marks: Iterable[Mark]) -> None:
        for mark in marks:
            self._stream.wait_event(mark)  # type: ignore[arg-type]  # a Mark of CudaGpu's

    def using(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def copy(self, target: int, source: int, runs: Sequence[Run]) -> None:
        if self._gpu.copy_runs is not None:
            with self.using():
                self._gpu.copy_runs(target, source, runs, self._device)
            return
        call = self._gpu.enter()
        for at, to, size in runs:
            call("cuMemcpyAsync", target + to, source + at, size, self._handle)

    def fetch(self, tensor: Tensor) -> Tensor:
        with self.using():
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor, non_blocking=True)
        self.synchronise()
        return host

    def synchronise(self) -> None:
        # Blocking: the thread sleeps; else it would spin on a core.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        event.synchronize()


class _Bytes:
    """What torch is told of memory that it did not allocate."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


@functools.cache
def missing() -> str | None:
    """Why no CUDA GPU's memory can be shared by this process; None if it can."""
    try:
        Driver()
    except (OSError, AttributeError) as error:
        return f"NVIDIA's driver, which comes with a GPU and not with torch: {error}"
    if not torch.cuda.is_available():
        return f"a GPU: torch {torch.__version__} sees none here; that takes a GPU and a torch built for CUDA"
    return None
