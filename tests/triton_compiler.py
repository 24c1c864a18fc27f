"""Compiles the Triton kernels for an H100 without one: what the interpreter runs need not be what the compiler takes.

`python -m tests.triton_compiler [operation ..]` calls each operation's launch function with tensors on the CPU. Instead
of a launch, its kernels are compiled as far as the machine code.
"""

from __future__ import annotations

import inspect
import sys
import time

import torch
import triton
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
        if name.startswith("_"):
            continue
        if launch.__module__ == triton_launches.__name__ and name in (operations or [name]):
            print(name, flush=True)
            launch()


if __name__ == "__main__":
    main(sys.argv[1:])
