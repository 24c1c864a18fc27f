"""The devices that a worker may compute on, as one table: a new kind of device is a new row."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tercet.errors import UnsupportedSpec


@dataclass(frozen=True)
class Device:
    kind: str  # pools.*.accelerator
    torch_type: str
    collectives: str  # backend of torch.distributed between the ranks of a group; a worker of one rank needs none
    kernels: str  # how torch's kernels take weights. cpu: packed for it; plain: as they are
    staged: bool  # transfers read and write a copy of its KV in host memory (engine/kv_cache.py)

    def torch_device(self) -> torch.device:
        """The device of this process. Raises UnsupportedSpec if torch sees none."""
        if self.torch_type == "cuda" and not torch.cuda.is_available():
            raise UnsupportedSpec(
                f"accelerator {self.kind}: torch {torch.__version__} sees no CUDA device here; that takes a GPU, its "
                "driver and a torch built for CUDA"
            )
        return torch.device("cuda", 0) if self.torch_type == "cuda" else torch.device(self.torch_type)


DEVICES = {
    "cpu": Device("cpu", "cpu", "gloo", "cpu", staged=False),
    "gpu": Device("gpu", "cuda", "nccl", "plain", staged=True),
}  # pools.*.accelerator -> what it means
BY_TORCH_TYPE = {device.torch_type: device for device in DEVICES.values()}


def device_of(where: torch.device) -> Device:
    return BY_TORCH_TYPE[where.type]
