"""What a placement is worth on counts that it was not made from. Pure.

Node copies are the distinct nodes, beside its own, that a token is sent to. Only marginals are counted, so they are
expected ones under this model: a token of node s draws its k experts independently, each as its node's tokens do. With
the share q[s, n] of them dispatched to node n, it is sent there with probability 1 - (1 - q)^k. Group-limited routing
draws experts that belong together, and sends fewer copies.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tercet.errors import SpecError
from tercet.placement.experts.model import NO_SLOT, Dispatch, Floats, Ints, Placement, RoutingStats, Topology
from tercet.placement.experts.tables import tables_of


@dataclass(frozen=True)
class Score:
    """Of each layer."""

    cross_node: Floats  # [L], share of the tokens whose expert is computed on another node
    node_copies: Floats  # [L], of a token
    max_over_mean: Floats  # [L], of the GPUs' loads over speed


def score(placement: Placement, stats: RoutingStats, topo: Topology, dispatch: Dispatch) -> Score:
    """Of source_load, if it is dispatched so. Raises SpecError without source_load, or if it is of other nodes."""
    tokens = source_tokens(stats, topo)
    to_slot = dispatched(placement, tokens, dispatch)
    layers = len(tokens)
    load = to_slot.sum(axis=1).reshape(layers, topo.gpus, -1).sum(axis=2)
    flow = to_slot.reshape(layers, topo.nodes, topo.nodes, -1).sum(axis=3)
    total = tokens.sum(axis=(1, 2))
    crossing = 1 - np.einsum("lss->l", flow) / total
    worst = (load / topo.speed).max(axis=1) / (total / topo.gpus)
    return Score(crossing.clip(0.0), node_copies(flow, stats.top_k) / (total / stats.top_k), worst)


def source_tokens(stats: RoutingStats, topo: Topology) -> Floats:
    """-> [L, N, E]. A layer that nobody has asked yet counts as asked evenly. Raises SpecError."""
    if stats.source_load is None:
        raise SpecError("source_load is missing: traffic between nodes depends on where tokens come from")
    if stats.source_load.shape[1] != topo.nodes:
        raise SpecError(f"source_load is of {stats.source_load.shape[1]} nodes, the topology has {topo.nodes}")
    tokens = stats.source_load.astype(np.float64)
    tokens[tokens.sum(axis=(1, 2)) == 0] = 1.0
    return tokens


def dispatched(placement: Placement, tokens: Floats, dispatch: Dispatch) -> Floats:
    """tokens [L, N, E] -> [L, N, P], those of each node that each slot gets."""
    prob = placement.dispatch_prob.astype(np.float64)
    if dispatch is Dispatch.EVEN:
        there = placement.log2phy != NO_SLOT
        prob = np.repeat((there / placement.count[:, :, None])[:, None], tokens.shape[1], axis=1)
    found = np.zeros((*tokens.shape[:2], placement.phy2log.shape[1]))
    layer, expert, replica = (placement.log2phy != NO_SLOT).nonzero()
    slot = placement.log2phy[layer, expert, replica]
    found[layer, :, slot] = tokens[layer, :, expert] * prob[layer, :, expert, replica]
    return found


def node_copies(flow: Floats, top_k: int) -> Floats:
    """flow [..., N, N], tokens times experts from node to node -> [...], expected copies to other nodes."""
    total = flow.sum(axis=-1, keepdims=True)
    part = (flow / np.where(total > 0, total, 1.0)).clip(0.0, 1.0)
    sent = total / top_k * (1 - (1 - part) ** top_k)
    copies: Floats = sent.sum(axis=(-2, -1)) - np.einsum("...ss->...", sent)
    return copies


def evenly(phy2log: Ints, experts: int, nodes: int) -> Placement:
    """phy2log [L, P], of another policy too -> a placement that shares evenly among replicas."""
    log2phy, count = tables_of(phy2log, experts)
    prob = ((log2phy != NO_SLOT) / count[:, :, None]).astype(np.float32)
    return Placement(phy2log.astype(np.int32), log2phy, count, np.repeat(prob[:, None], nodes, axis=1))
