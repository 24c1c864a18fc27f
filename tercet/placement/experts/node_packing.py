"""From nodes to GPUs: the replicas of each node onto its GPUs, each node's dispatch, and the plans to start from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tercet.placement.experts.arranging import arranged, shares_of
from tercet.placement.experts.eplb import packs_of
from tercet.placement.experts.model import NO_SLOT, Dispatch, Floats, Ints, LayerReport, Placement, Topology
from tercet.placement.experts.node_programme import NodePlan
from tercet.placement.experts.packing import packed, replicas_of
from tercet.placement.experts.tables import tables_of

ENOUGH = 1e-3  # above a node's mean load: its GPUs are not packed better


def node_topology(topo: Topology, node: int) -> Topology:
    """One node of it."""
    own = slice(node * topo.gpus_per_node, (node + 1) * topo.gpus_per_node)
    return Topology(1, topo.gpus_per_node, topo.slots_per_gpu, gpu_speed=topo.speed[own])


def floor_plan(tokens: Floats, topo: Topology, groups: int) -> NodePlan:
    """tokens [N, E] -> the greedy placement for balance, shared evenly among replicas; with groups, each group with all
    its replicas on one node. Raises SpecError if the experts do not fill the slots."""
    weight, nodes = tokens.sum(axis=0), topo.nodes
    if groups:
        copies = np.zeros((len(weight), nodes))
        node_of, _ = packs_of(weight.reshape(groups, -1).sum(axis=1), nodes)
        for node in range(nodes):
            own = np.flatnonzero(np.repeat(node_of, len(weight) // groups) == node)
            copies[own, node] = replicas_of(weight[own], node_topology(topo, node))
    else:
        held = packed(weight, replicas_of(weight, topo), topo).held
        copies = copies_of(held, len(weight), nodes).astype(np.float64)
    return NodePlan(copies, tokens[:, :, None] * (copies / copies.sum(axis=1, keepdims=True)))


def copies_of(held: Ints, experts: int, nodes: int) -> Ints:
    """held [G, K] -> replicas [E, N]."""
    each = [np.bincount(own.ravel(), minlength=experts) for own in held.reshape(nodes, -1)]
    return np.array(each, dtype=np.int32).T


def packed_within(plan: NodePlan, topo: Topology) -> Ints:
    """-> held [G, K]. Slots that the plan leaves empty get one more of the busiest replicas of their node."""
    held, tokens = [], plan.flow.sum(axis=0)
    for node in range(topo.nodes):
        own = node_topology(topo, node)
        count = _filled(plan.copies[:, node].astype(np.int32), tokens[:, node], own)
        here = np.flatnonzero(count)
        weight = tokens[here, node]
        enough = float(weight.sum() / topo.gpus_per_node) * (1 + ENOUGH)
        found, _ = arranged(weight, count[here], own, Dispatch.WEIGHTED, enough)
        held.append(here[found])
    return np.concatenate(held).astype(np.int32)


def _filled(count: Ints, tokens: Floats, topo: Topology) -> Ints:
    """count, tokens [E] of one node -> counts that fill its slots."""
    count = count.copy()
    for _ in range(topo.slots - int(count.sum())):
        busy = np.where(count > 0, tokens / np.maximum(count, 1), -1.0)
        count[int(np.where(count < topo.gpus, busy, -2.0).argmax())] += 1
    return count


def source_aware(held: Ints, flow: Sequence[Floats], topo: Topology, reports: Sequence[LayerReport] = ()) -> Placement:
    """held [L, G, K], flow [N, E, N] of each layer -> the placement with exactly that dispatch between nodes. Within a
    node all sources share an expert's tokens alike, so that its busiest GPU has little to do."""
    layers, experts = len(held), flow[0].shape[1]
    phy2log = held.reshape(layers, -1).astype(np.int32)
    log2phy, count = tables_of(phy2log, experts)
    prob = np.zeros((layers, topo.nodes, *log2phy.shape[1:]), np.float32)
    for layer, own in enumerate(flow):
        of_slot = _slot_probability(held[layer], own, topo)
        prob[layer] = np.where(log2phy[layer] == NO_SLOT, 0.0, of_slot[:, log2phy[layer].clip(0)])
    return Placement(phy2log, log2phy, count, prob, tuple(reports))


def _slot_probability(held: Ints, flow: Floats, topo: Topology) -> Floats:
    """-> [N, P], which share of a node's tokens of the expert in a slot goes to this slot."""
    copies = copies_of(held, flow.shape[1], topo.nodes)
    between, found = _node_probability(flow, copies), []
    for node, own in enumerate(held.reshape(topo.nodes, topo.gpus_per_node, -1)):
        here, inverse = np.unique(own, return_inverse=True)
        tokens = flow[:, here, node].sum(axis=0)
        local: Ints = inverse.reshape(own.shape).astype(np.int32)
        share = shares_of(local, tokens, node_topology(topo, node), Dispatch.WEIGHTED).ravel()
        total = np.bincount(local.ravel(), share)[local.ravel()]
        part = np.where(total > 0, share / np.where(total > 0, total, 1.0), 1 / copies[own.ravel(), node])
        found.append(between[:, own.ravel(), node] * part)
    return np.concatenate(found, axis=1)


def _node_probability(flow: Floats, copies: Ints) -> Floats:
    """-> [N, E, N]. What a node never asked it will ask at home, if it is there, else at all replicas alike."""
    default = np.repeat((copies / copies.sum(axis=1, keepdims=True))[None], len(flow), axis=0)
    own = copies.T > 0  # [N, E]
    default[own] = np.eye(len(flow))[own.nonzero()[0]]
    total = flow.sum(axis=2, keepdims=True)
    found: Floats = np.where(total > 0, flow / np.where(total > 0, total, 1.0), default)
    return found
