"""The devices that a worker may compute on, as one table: a new kind of device is a new row."""

from __future__ import annotations

import contextlib
import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from tercet.errors import UnsupportedSpec

CGROUP_LIMITS = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]  # v2, v1


@dataclass(frozen=True)
class Device:
    kind: str  # pools.*.accelerator
    torch_type: str
    collectives: str  # backend of torch.distributed between the ranks of a group; a worker of one rank needs none
    kernels: Literal["native", "torch", "triton"]  # the fastest for it
    staged: bool  # transfers read and write a copy of its KV in host memory (engine/kv_cache.py) ...
    pins: bool  # ... which can be registered with its driver, so that copies go at full speed and are not waited for
    captures: bool  # a step can be captured as a graph (engine/graphs.py)
    module: str = ""  # what torch needs beside itself

    def torch_device(self) -> torch.device:
        """The device of this process. Raises UnsupportedSpec if torch sees none."""
        if self.torch_type == "cpu":
            return torch.device("cpu")
        if self.module:
            self._import()
        if not torch.get_device_module(self.torch_type).is_available():
            raise UnsupportedSpec(
                f"accelerator {self.kind}: torch {torch.__version__} sees no {self.torch_type.upper()} device here; "
                "that takes such a device, its driver and a torch built for it"
            )
        return torch.device(self.torch_type, 0)

    def memory_bytes(self) -> int:
        """All of it. Raises UnsupportedSpec as `torch_device` does."""
        device = self.torch_device()
        if device.type == "cpu":
            return _host_memory_bytes()
        return int(torch.get_device_module(device).mem_get_info(device)[1])

    def _import(self) -> None:
        try:
            importlib.import_module(self.module)
        except ImportError as error:
            raise UnsupportedSpec(
                f"accelerator {self.kind}: needs {self.module}, which is not installed for this Python ({error})"
            ) from error


def _host_memory_bytes() -> int:
    """Of the machine, or what this process's control group may have of it, if that is less."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # not here, or "max"
            limits.append(int(file.read_text()))
    return min(limit for limit in limits if limit > 0)


DEVICES = {
    device.kind: device
    for device in (
        Device("cpu", "cpu", "gloo", "native", staged=False, pins=False, captures=False),
        # also AMD's, which torch calls cuda
        Device("gpu", "cuda", "nccl", "triton", staged=True, pins=True, captures=True),
        Device("npu", "npu", "hccl", "torch", staged=True, pins=False, captures=False, module="torch_npu"),
    )
}
BY_TORCH_TYPE = {device.torch_type: device for device in DEVICES.values()}


def device_of(where: torch.device) -> Device:
    return BY_TORCH_TYPE[where.type]
