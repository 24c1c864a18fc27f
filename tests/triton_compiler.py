"""Compiles the Triton kernels for an H100 without one: what the interpreter runs need not be what the compiler takes.

`python -m tests.triton_compiler [operation ..]` calls each operation's launch function with tensors on the CPU. Instead
of a launch, its kernels are compiled as far as the machine code. It fails where a launch function looks at a value of a
tensor, since that waits for the device and cannot be captured in a CUDA graph.
"""

from __future__ import annotations

import inspect
import sys
import time

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tests import triton_launches


class NoDriver:
    """Of a device that nothing can be launched on."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class NoWait(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in {"_local_scalar_dense", "nonzero", "equal", "unique", "_unique2"}, (
            func
        )
        return func(*args, **(kwargs or {}))


def compile_only(kernel, grid):
    def run(*args, **kwargs):
        began = time.monotonic()
        compiled = kernel.run(*args, grid=grid, warmup=True, **kwargs)
        took = time.monotonic() - began
        assert compiled.asm["cubin"]
        print(f"  {kernel.__name__}: {took:.1f} s, {compiled.metadata.shared} B shared", flush=True)

    return run


def main(operations: list[str]) -> None:
    assert not triton.knobs.runtime.interpret
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    driver.set_active(NoDriver())
    JITFunction.__getitem__ = compile_only
    for name, launch in inspect.getmembers(triton_launches, inspect.isfunction):
        if not name.startswith("_") and name in (operations or [name]):
            print(name, flush=True)
            with NoWait():
                launch()


if __name__ == "__main__":
    main(sys.argv[1:])
