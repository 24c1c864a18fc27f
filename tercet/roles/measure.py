"""What a rank says of itself when it is asked: how it talks to the others, and the memory that it takes."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path
from typing import Any

from tercet.distributed.ranks import Ranks

KIB = 1024


def measured(ranks: Ranks) -> dict[str, Any]:
    """traffic: kind of parallelism -> [calls, bytes, seconds] so far. peak_bytes: the most memory that this process has
    had, files mapped by it included. private_bytes: what it has now and no other process shares."""
    return {
        "traffic": {kind: list(astuple(traffic)) for kind, traffic in ranks.traffic.items()},
        "peak_bytes": _kib_of("status", "VmHWM") * KIB,
        "private_bytes": (_kib_of("smaps_rollup", "Private_Clean") + _kib_of("smaps_rollup", "Private_Dirty")) * KIB,
    }


def _kib_of(file: str, name: str) -> int:
    """A figure that Linux keeps of this process."""
    lines = (line.partition(":") for line in Path("/proc/self", file).read_text().splitlines())
    return next(int(value.split()[0]) for key, _, value in lines if key == name)
