"""The placement policy of DeepSeek's EPLB, as the baseline: its steps are those that its README describes (DeepSeek-V3,
arXiv 2412.19437, section 3.4; github.com/deepseek-ai/EPLB). `rebalance_experts` has its signature and results.

Hierarchical, if the nodes divide the groups of experts: groups onto nodes, replicas within each node, replicas onto its
GPUs. Else global: replicas over all, onto all GPUs. A pack is filled greedily, the heaviest item first.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tercet.errors import SpecError
from tercet.placement.experts.model import NO_SLOT, Floats

Longs = NDArray[np.int64]


def rebalance_experts(
    weight: ArrayLike, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Longs, Longs, Longs]:
    """weight [L, E] -> phy2log [L, num_replicas], log2phy [L, E, R] padded with -1, count [L, E]. Raises SpecError."""
    load = np.asarray(weight, dtype=np.float64)
    _check(load, num_replicas, num_groups, num_nodes, num_gpus)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    layers = [_layer(row, num_replicas, num_groups, num_nodes, num_gpus) for row in load]
    phy2log, rank = (np.array(each) for each in zip(*layers, strict=True))
    count = np.array([np.bincount(row, minlength=load.shape[1]) for row in phy2log])
    log2phy = np.full((*load.shape, int(count.max())), NO_SLOT, dtype=np.int64)
    for layer, (experts, ranks) in enumerate(zip(phy2log, rank, strict=True)):
        log2phy[layer, experts, ranks] = np.arange(num_replicas)
    return phy2log, log2phy, count


def _layer(load: Floats, replicas: int, groups: int, nodes: int, gpus: int) -> tuple[Longs, Longs]:
    """-> the expert in each slot, and the number of that replica among its expert's."""
    size = len(load) // groups
    node_of, place = packs_of(load.reshape(groups, size).sum(axis=1), nodes)
    first = (node_of * (groups // nodes) + place) * size  # of each group, in the order of nodes
    expert_at = np.argsort((first[:, None] + np.arange(size)).ravel())  # place in that order -> expert
    each, experts, ranks = len(load) // nodes, [], []
    for node in range(nodes):
        here = expert_at[node * each : (node + 1) * each]
        local, rank, count = _replicated(load[here], replicas // nodes)
        gpu, slot = packs_of((load[here] / count)[local], gpus // nodes)
        order = np.argsort(gpu * (replicas // gpus) + slot)
        experts.append(here[local[order]])
        ranks.append(rank[order])
    return np.concatenate(experts), np.concatenate(ranks)


def packs_of(load: Floats, packs: int) -> tuple[Longs, Longs]:
    """Items onto packs of as many each, the heaviest one first to the lightest pack. -> pack and place of each item."""
    most, pack, place = len(load) // packs, np.zeros(len(load), np.int64), np.zeros(len(load), np.int64)
    if most == 1:
        return np.arange(len(load)), place
    total, filled = np.zeros(packs), np.zeros(packs, np.int64)
    for item in np.argsort(-load, kind="stable"):
        chosen = int(np.where(filled < most, total, np.inf).argmin())
        pack[item], place[item] = chosen, filled[chosen]
        total[chosen] += load[item]
        filled[chosen] += 1
    return pack, place


def _replicated(load: Floats, replicas: int) -> tuple[Longs, Longs, Longs]:
    """One more replica, again and again, of the expert whose replicas have most each. -> of each replica its expert and
    its number, and how many each expert has."""
    experts, ranks = [*range(len(load))], [0] * len(load)
    count = np.ones(len(load), np.int64)
    for _ in range(replicas - len(load)):
        hottest = int((load / count).argmax())
        experts.append(hottest)
        ranks.append(int(count[hottest]))
        count[hottest] += 1
    return np.array(experts), np.array(ranks), count


def _check(load: Floats, replicas: int, groups: int, nodes: int, gpus: int) -> None:
    if load.ndim != 2 or not load.size or not np.isfinite(load).all() or (load < 0).any():
        raise SpecError(f"weight must be [layers, experts] of finite numbers from 0 on, not {load.shape}")
    experts = load.shape[1]
    if min(replicas, groups, nodes, gpus) < 1 or experts % groups or replicas % gpus or gpus % nodes:
        raise SpecError(
            f"{experts} experts in {groups} groups, {replicas} replicas on {gpus} GPUs of {nodes} nodes do not divide"
        )
    if replicas < experts:
        raise SpecError(f"{replicas} replicas are fewer than {experts} experts")
