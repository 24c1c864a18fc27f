"""What the placement of experts is decided from, and what comes out. Arrays only.

L layers   E experts   G GPUs, of K slots each   P = G * K slots   N nodes   R most replicas of an expert
GPU g lies on node g // gpus_per_node, slot s on GPU s // K. phy2log, log2phy and count are named as in DeepSeek's EPLB.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from tercet.errors import SpecError

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]
Clock = Callable[[], float]  # seconds
NO_SLOT = -1  # pads the rows of log2phy
OPTIMAL = 1e-4  # above its bound at most


class Objective(StrEnum):
    BALANCE = "balance"  # the load of the busiest GPU
    INTERNODE = "internode"  # tokens that leave their node, once for each expert
    INTERNODE_DEDUP = "internode_dedup"  # the same, once for each node
    INTERLAYER = "interlayer"  # pairs of experts of neighbouring layers on different nodes


class Dispatch(StrEnum):
    """How the tokens of an expert are shared among its replicas."""

    EVEN = "even"
    WEIGHTED = "weighted"  # by dispatch_prob


@dataclass(frozen=True)
class RoutingStats:
    """What has been counted. Raises SpecError for what cannot be."""

    load: Floats  # [windows, L, E] tokens; the windows may have any length
    source_load: Floats | None = None  # [L, N, E] tokens of each node's requests
    pair: Floats | None = None  # [L - 1, E, E] tokens that went from an expert to one of the next layer
    top_k: int = 1  # experts of a token

    def __post_init__(self) -> None:
        _check("load", self.load, 3)
        windows, layers, experts = self.load.shape
        if not windows * layers * experts:
            raise SpecError(f"load of {windows} windows, {layers} layers and {experts} experts: nothing was counted")
        if not 1 <= self.top_k <= experts:
            raise SpecError(f"top_k {self.top_k} of {experts} experts")
        if self.source_load is not None:
            _check("source_load", self.source_load, 3)
            if (self.source_load.shape[0], self.source_load.shape[2]) != (layers, experts):
                raise SpecError(f"source_load is {self.source_load.shape}, load has {layers} layers, {experts} experts")
        if self.pair is not None:
            _check("pair", self.pair, 3)
            if self.pair.shape != (layers - 1, experts, experts):
                raise SpecError(f"pair is {self.pair.shape}, and must be {(layers - 1, experts, experts)}")

    @property
    def weight(self) -> Floats:
        """-> [L, E], the mean window. A layer that nobody has asked yet counts as asked evenly."""
        mean: Floats = self.load.mean(axis=0)
        silent = mean.sum(axis=1) == 0
        mean[silent] = 1.0
        return mean


@dataclass(frozen=True)
class Topology:
    """Raises SpecError for one that is none."""

    nodes: int
    gpus_per_node: int
    slots_per_gpu: int
    expert_bytes: int = 0  # weights of one expert in one layer
    gpu_speed: Floats | None = None  # [G], of a GPU in proportion to others; all alike if it is not given
    bandwidth_intra: float = 400e9  # bytes/s within a node: NVLink 4 (450 GB/s each way, less overhead)
    bandwidth_inter: float = 45e9  # bytes/s of a GPU to other nodes: 400 Gbit/s InfiniBand
    least_replicas: int = 1  # of each expert, on as many GPUs: with two, any GPU may be lost

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "slots_per_gpu"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} is {getattr(self, name)}, and must be at least 1")
        if not 1 <= self.least_replicas <= self.gpus:
            raise SpecError(f"least_replicas is {self.least_replicas}; of an expert there are 1 to {self.gpus}")
        speed = self.gpu_speed
        if speed is not None and (speed.shape != (self.gpus,) or not np.isfinite(speed).all() or (speed <= 0).any()):
            raise SpecError(f"gpu_speed must be {self.gpus} numbers above 0")

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def slots(self) -> int:
        return self.gpus * self.slots_per_gpu

    @property
    def speed(self) -> Floats:
        """-> [G], one in the mean."""
        speed = np.ones(self.gpus) if self.gpu_speed is None else self.gpu_speed.astype(np.float64)
        scaled: Floats = speed / speed.mean()
        return scaled


@dataclass(frozen=True)
class LayerReport:
    """What the placement of one layer is worth on the counts that it was made from."""

    objective: float  # tokens: `balance` of the busiest GPU (over its speed), `internode*` that leave their node
    bound: float  # no placement is below it
    max_over_mean: float  # of the GPUs' loads
    cross_node: float  # share of the tokens whose expert is on another node; 0 if that was not counted
    moved_slots: int  # that held another expert before
    moved_bytes: int
    status: str  # `status_of`
    seconds: float
    relaxed: str = ""  # what could not be kept, with the value it has instead: "eps 0.031, kappa 0.62"

    @property
    def gap(self) -> float:
        if not self.bound:
            return math.inf if self.objective else 0.0
        return self.objective / self.bound - 1


@dataclass(frozen=True, eq=False)
class Placement:
    phy2log: Ints  # [L, P], the expert in each slot
    log2phy: Ints  # [L, E, R], the slots of each expert in ascending order
    count: Ints  # [L, E], its replicas
    dispatch_prob: NDArray[np.float32]  # [L, N, E, R], which share of a node's tokens each replica gets
    layers: tuple[LayerReport, ...] = field(default=(), repr=False)


def status_of(value: float, bound: float, *, late: bool) -> str:
    """late: the deadline has cut the search short."""
    return "optimal" if value <= bound * (1 + OPTIMAL) else "deadline" if late else "feasible"


def _check(name: str, array: Floats, dimensions: int) -> None:
    if array.ndim != dimensions:
        raise SpecError(f"{name} has {array.ndim} dimensions, and must have {dimensions}")
    if not np.isfinite(array).all():
        raise SpecError(f"{name} has {int((~np.isfinite(array)).sum())} values that are no finite numbers")
    if (array < 0).any():
        raise SpecError(f"{name} has {int((array < 0).sum())} values below 0")
