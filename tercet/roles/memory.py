"""Memory for a worker's KV, where the transport can reach it and near the cores that compute with it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from tercet.errors import UnsupportedSpec
from tercet.kernels.kinds import Kernels
from tercet.transfer.memory.device import DeviceRegion, KvRegion
from tercet.transfer.memory.layout import KvLayout
from tercet.transfer.memory.region import Region
from tercet.transfer.transports.table import in_device_memory, usable


def region_of(layout: KvLayout, transport: str, kernels: Kernels, cores: Sequence[int]) -> KvRegion:
    """Memory for the KV, where the transport can reach it. Raises SpecError, UnsupportedSpec."""
    if not in_device_memory(transport):
        return _host_region(layout, cores)
    usable(transport)  # raises if it is not
    from tercet.transfer.memory.cuda import CudaGpu

    try:
        return DeviceRegion(layout, CudaGpu(kernels.device, kernels.copy_runs), kernels.unit_digests)
    except RuntimeError as error:
        raise UnsupportedSpec(
            f"transfer.transport: {transport}: no {_size(layout)} in the GPU's memory: {error}"
        ) from error


def _host_region(layout: KvLayout, cores: Sequence[int]) -> Region:
    """Its pages are near the cores that will compute with them. Raises UnsupportedSpec."""
    region, before = Region(layout), os.sched_getaffinity(0)
    if cores:
        os.sched_setaffinity(0, cores)  # of this thread
    try:
        region.populate()
    except OSError as error:
        raise UnsupportedSpec(f"kv.blocks: no {_size(layout)} in this machine's memory: {error}") from error
    finally:
        os.sched_setaffinity(0, before)
    return region


def _size(layout: KvLayout) -> str:
    return f"{layout.total_bytes / 1e9:.1f} GB for {layout.blocks} blocks of KV"
