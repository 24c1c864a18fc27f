"""Which kernels a worker computes with: chosen once, when it starts.

native  C++, compiled for this CPU (native/); activations are float32
triton  Triton, compiled for this GPU (triton/); activations have the weights' dtype. With TRITON_INTERPRET=1 also on a
        CPU, in Triton's interpreter, which is for tests
torch   torch's own operations, on any device; on a CPU with the weights packed for it (packing.py)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from tercet.devices import device_of
from tercet.errors import UnsupportedSpec
from tercet.kernels.digest import UnitDigests, unit_digests_reference
from tercet.kernels.native import trial as native_trial
from tercet.kernels.native.library import library
from tercet.kernels.triton import trial as triton_trial

Kind = Literal["native", "torch", "triton"]
Wanted = Literal["auto", "native", "torch", "triton"]
CPU = torch.device("cpu")
CopyRuns = Callable[[int, int, Sequence[tuple[int, int, int]], torch.device], None]
"""(target, source, runs, device), see triton/copy.py."""
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

    @property
    def unit_digests(self) -> UnitDigests:
        """How they digest KV in a device's memory. All kinds give the same."""
        if self.kind != "triton":
            return unit_digests_reference
        from tercet.kernels.triton.digest import unit_digests  # it imports Triton, which other kernels do without

        return unit_digests

    @property
    def copy_runs(self) -> CopyRuns | None:
        """How they copy many runs within a device's reach; None: they leave that to its driver."""
        if self.kind != "triton":
            return None
        from tercet.kernels.triton.copy import copy_runs  # as above

        return copy_runs

    def __str__(self) -> str:
        return f"native ({library().instructions().decode()})" if self.native else f"{self.kind} ({self.device.type})"


def choose_kernels(wanted: Wanted = "auto", device: torch.device = CPU) -> Kernels:
    """auto: the device's fastest, where they can be had, else torch; why not is logged. Raises UnsupportedSpec if
    others than torch's are wanted and cannot be had."""
    kind = wanted if wanted != "auto" else device_of(device).kernels
    if kind == "torch":
        return Kernels("torch", device)
    reason = _refusal(kind, device)
    if reason is None:
        return Kernels(kind, device)
    if wanted != "auto":
        raise UnsupportedSpec(f"kernels: {wanted}: {reason}")
    log.warning("no %s kernels, torch's are used, which are slower: %s", kind, reason)
    return Kernels("torch", device)


def _refusal(kind: Literal["native", "triton"], device: torch.device) -> str | None:
    """Why these kernels cannot compute on this device; None if they can."""
    if kind == "native":
        if device.type != "cpu":
            return f"they are for CPUs, and this worker computes on {device.type}"
        return native_trial.missing()
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"they are for GPUs, and this worker computes on {device.type}"
    return triton_trial.missing(device)
