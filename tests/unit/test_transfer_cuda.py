"""Calls of CUDA's driver against a stub in C with the driver's signatures, for machines without a GPU."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from tercet.transfer.memory import cuda

COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C compiler"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="here the driver itself is tested"),
]
SIZE = 1 << 16
UUID = "0a0a0a0a-0a0a-0a0a-0a0a-0a0a0a0a0a0a"
OTHER = UUID.replace("a", "b")


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    built = tmp_path_factory.mktemp("stub") / "libcuda.so.1"
    source = Path(__file__).with_name("libcuda_stub.c")
    subprocess.run([COMPILER, "-shared", "-fPIC", "-Wall", "-Werror", "-O1", "-o", built, source], check=True)
    return built


@pytest.fixture
def gpu(library, monkeypatch) -> cuda.CudaGpu:
    monkeypatch.setattr(cuda, "LIBRARY", str(library))
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda *args, **options: (args, options))
    return cuda.CudaGpu(torch.device("cuda", 0))


def written(address: int, data: bytes) -> None:
    ctypes.memmove(address, data, len(data))


def test_a_gpu_has_the_name_that_its_driver_gives_it(gpu):
    assert gpu.uuid == UUID


def test_memory_goes_from_one_process_to_another(gpu, library):
    """The other one opens it, has 4 bytes copied from its own, and closes it."""
    address = gpu.allocate(SIZE)
    handle = gpu.export(address)
    assert len(handle) == 64
    code = f"""
import ctypes, torch
from tercet.transfer.memory import cuda
cuda.LIBRARY, torch.cuda.init, torch.cuda.ExternalStream = {str(library)!r}, lambda: None, lambda *a, **k: None
gpu = cuda.CudaGpu(torch.device("cuda", 0))
there, here, stream = gpu.open({handle!r}, {SIZE}, {UUID!r}), gpu.allocate(64), gpu.stream()
ctypes.memmove(here, b"word", 4)
stream.copy(there, here, [(0, 100, 4)])
gpu.close(there)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert ctypes.string_at(address + 100, 4) == b"word"


def test_transfer_libraries_know_it_by_kind_and_number(library, gpu):
    assert (gpu.kind, gpu.number) == ("VRAM", 0)
    assert cuda.CudaGpu(torch.device("cuda", 1)).number == 1


def test_all_that_was_asked_of_it_can_be_waited_for(gpu, library):
    thread = threading.Thread(target=gpu.settle)  # without a context of its own
    thread.start()
    thread.join()
    assert ctypes.CDLL(str(library)).stub_settled() == 1


def test_every_thread_gets_the_gpus_context(gpu):
    found = []
    thread = threading.Thread(target=lambda: found.append(gpu.export(gpu.allocate(SIZE))))
    thread.start()
    thread.join()
    assert len(found[0]) == 64


def test_a_stream_does_not_wait_for_the_default_one_and_ends(gpu, library):
    stream, source, target = gpu.stream(), gpu.allocate(SIZE), gpu.allocate(SIZE)
    (handle,), options = stream._stream
    assert handle == stream._handle.value
    assert options == {"device": torch.device("cuda", 0)}
    written(source, b"0123456789")
    stream.copy(target, source, [(2, 8, 5), (0, 20, 1)])
    assert ctypes.string_at(target, 21) == bytes(8) + b"23456" + bytes(7) + b"0"
    before = ctypes.CDLL(str(library)).stub_destroyed()
    del stream
    assert ctypes.CDLL(str(library)).stub_destroyed() == before + 1


def test_what_fails_is_told_in_the_drivers_words(gpu):
    with pytest.raises(RuntimeError, match="cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY, out of memory"):
        gpu.allocate(1 << 40)
    with pytest.raises(RuntimeError, match="cuIpcOpenMemHandle_v2: CUDA_ERROR_INVALID_VALUE"):
        gpu.open(bytes(64), SIZE, UUID)
    with pytest.raises(RuntimeError, match="cuIpcCloseMemHandle: CUDA_ERROR_INVALID_VALUE"):
        gpu.close(1)


def test_shorter_memory_is_refused_and_closed_again(gpu):
    handle = gpu.export(gpu.allocate(SIZE))
    closed = []
    real, gpu.close = gpu.close, lambda address: closed.append(real(address))
    with pytest.raises(RuntimeError, match=f"{SIZE} bytes long, not {SIZE + 1}"):
        gpu.open(handle, SIZE + 1, UUID)
    assert len(closed) == 1


def test_gpus_that_do_not_reach_each_other_are_named(gpu):
    handle = gpu.export(gpu.allocate(SIZE))
    with pytest.raises(RuntimeError, match=f"GPU {UUID} has no peer access to GPU {OTHER}"):
        gpu.open(handle, SIZE, OTHER)
    gpu.close(gpu.open(handle, SIZE, "a GPU that this process does not see"))


def test_without_a_driver_it_says_so(monkeypatch):
    monkeypatch.setattr(cuda, "LIBRARY", "libnone.so.1")
    cuda.missing.cache_clear()
    assert re.search("NVIDIA's driver.*: libnone.so.1", cuda.missing())
    cuda.missing.cache_clear()


def test_a_driver_without_a_gpu_that_torch_sees(library, monkeypatch):
    monkeypatch.setattr(cuda, "LIBRARY", str(library))
    cuda.missing.cache_clear()
    assert "a GPU: torch" in cuda.missing()
    cuda.missing.cache_clear()
