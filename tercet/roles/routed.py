"""What the ranks of a worker have counted of their routing, for who plans where experts lie (`tercet experts`)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tercet.distributed.routed import Routed
from tercet.errors import ClusterError
from tercet.models.footprint import expert_bytes
from tercet.models.shard import Shard
from tercet.models.transformer import Transformer


def own_load(model: Transformer) -> bytes:
    """-> int64 [layers here, n] of this rank; empty if it has no mixture. May wait for the device."""
    return b"" if model.routing is None else model.routing.load().tobytes()


def routed(model: Transformer, dtype: str, loads: Mapping[int, bytes]) -> Routed:
    """model: rank 0's; dtype: of its weights; loads: rank -> its `own_load`, of those that are there. Tensor ranks have
    the same requests, so the first of them speaks for all. Raises ClusterError if there is no mixture."""
    config, place = model.config, model.ranks.place
    if config.mixture is None:
        raise ClusterError("its model has no experts")
    experts, layers = config.mixture.experts, config.mixture.layers
    load = np.zeros((place.data, len(layers), experts), np.int64)
    for rank, told in loads.items():
        at = place.of(rank)
        if at.tensor_rank == 0:
            here = [layers.index(layer) for layer in Shard(config, at).mixture_layers]
            load[at.data_rank, here] = np.frombuffer(told, np.int64).reshape(-1, experts)
    spread = model.ranks.spread
    held = np.arange(experts)[None] if spread is None else spread.map.phy2log.numpy()
    ranks = 1 if spread is None else spread.map.ranks
    placed = np.ascontiguousarray(np.broadcast_to(held, (len(layers), held.shape[1])))
    return Routed(load, placed, ranks, config.mixture.top_k, expert_bytes(config, dtype))
