"""Programmatic dependent launch (CUDA Programming Guide, section of that name; Hopper and later): a kernel is set up,
and may read what no kernel writes, while the one before it in the stream still runs. Each kernel that is launched so
waits in `after_previous` before it touches anything else, so that the order of reads and writes stays that of the
stream.
"""

from __future__ import annotations

import functools
from typing import Any

import triton
import triton.language as tl

HOPPER = 90


@triton.jit
def after_previous(PDL: tl.constexpr):
    """What comes behind it comes after all kernels before this one; the next one may be set up from here on."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@functools.cache
def dependent() -> dict[str, Any]:
    """The arguments of such a launch, for a kernel that takes PDL; on other devices those of a usual one."""
    if triton.knobs.runtime.interpret:
        return {"PDL": False}
    target = triton.runtime.driver.active.get_current_target()
    overlaps = target.backend == "cuda" and target.arch >= HOPPER
    return {"PDL": True, "launch_pdl": True} if overlaps else {"PDL": False}
