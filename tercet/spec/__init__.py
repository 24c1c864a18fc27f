"""The cluster spec as frozen data: what a user may say of a cluster, with its defaults and its checks.

    base.py      what all parts are made of           role.py     a role's workers, ranks, scheduler, KV
    gateway.py   ports, keys, limits                  cluster.py  the whole, and all else

`cluster/spec_file.py` reads it from YAML and turns every fault into one SpecError with file, line and path.
What can be said but is not built yet is refused by `cluster/unbuilt.py`, by name.
"""

from tercet.spec.base import Frozen
from tercet.spec.cluster import (
    EMBEDDING_BLOCK,
    ROLES_OF,
    ClusterSpec,
    LoggingSpec,
    ModelSpec,
    NetworkSpec,
    PeerTlsSpec,
    PoolSpec,
    RaySpec,
    TracingSpec,
    TransferSpec,
)
from tercet.spec.gateway import GatewayImagesSpec, GatewaySpec, LimitsSpec, ListenSpec, TlsSpec
from tercet.spec.role import (
    MOST_RANKS,
    ExpertPlacementSpec,
    ImagesSpec,
    KvSpec,
    ParallelSpec,
    RoleSpec,
    SchedulerSpec,
)

__all__ = [
    "EMBEDDING_BLOCK",
    "MOST_RANKS",
    "ROLES_OF",
    "ClusterSpec",
    "ExpertPlacementSpec",
    "Frozen",
    "GatewayImagesSpec",
    "GatewaySpec",
    "ImagesSpec",
    "KvSpec",
    "LimitsSpec",
    "ListenSpec",
    "LoggingSpec",
    "ModelSpec",
    "NetworkSpec",
    "ParallelSpec",
    "PeerTlsSpec",
    "PoolSpec",
    "RaySpec",
    "RoleSpec",
    "SchedulerSpec",
    "TlsSpec",
    "TracingSpec",
    "TransferSpec",
]
