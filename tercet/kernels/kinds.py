"""Which kernels a worker computes with: chosen once, when it starts.

native  C++, compiled for this CPU (native/); activations are float32
torch   torch's own operations, on any device; on a CPU with the weights packed for it (packing.py)
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import torch

from tercet.errors import UnsupportedSpec
from tercet.kernels.native.library import library
from tercet.kernels.native.trial import missing

Kind = Literal["native", "torch"]
CPU = torch.device("cpu")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernels:
    kind: Kind = "torch"
    device: torch.device = CPU

    @property
    def native(self) -> bool:
        return self.kind == "native"

    def set_threads(self, threads: int) -> None:
        """Compute threads of this process."""
        if self.native:
            library().set_threads(threads)
            threads = 1  # torch has small work only: a second team would take the cores from the first
        torch.set_num_threads(threads)

    def __str__(self) -> str:
        return f"native ({library().instructions().decode()})" if self.native else f"torch ({self.device.type})"


def choose_kernels(wanted: Literal["auto", "native", "torch"] = "auto", device: torch.device = CPU) -> Kernels:
    """auto: native on a CPU where they can be built, else torch; why not is logged. Raises UnsupportedSpec if native
    ones are wanted and cannot be had."""
    if wanted == "torch" or (wanted == "auto" and device.type != "cpu"):
        return Kernels("torch", device)
    reason = missing() if device.type == "cpu" else f"they are for CPUs, and this worker computes on {device.type}"
    if reason is None:
        return Kernels("native", device)
    if wanted == "native":
        raise UnsupportedSpec(f"kernels: native: {reason}")
    log.warning("no native kernels, torch's are used, which are slower: %s", reason)
    return Kernels("torch", device)
