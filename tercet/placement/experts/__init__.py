"""Where the experts of a mixture shall lie: `solve_experts`, and DeepSeek's EPLB as the policy to compare with."""

from tercet.placement.experts.chain_model import local_fraction
from tercet.placement.experts.eplb import rebalance_experts
from tercet.placement.experts.model import (
    Dispatch,
    LayerReport,
    Objective,
    Placement,
    RoutingStats,
    Topology,
)
from tercet.placement.experts.solve import solve_experts

__all__ = [
    "Dispatch",
    "LayerReport",
    "Objective",
    "Placement",
    "RoutingStats",
    "Topology",
    "local_fraction",
    "rebalance_experts",
    "solve_experts",
]
