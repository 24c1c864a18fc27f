"""What the ranks of a worker have counted of their routing, for who plans where experts lie (`tercet experts`)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tercet.distributed.routed import Routed
from tercet.errors import ClusterError
from tercet.models.footprint import expert_bytes
from tercet.models.shard import Shard
from tercet.models.transformer import Transformer

OwnCounts = tuple[bytes, bytes]  # int64: [layers here, n] rows of its requests; [layers here] rows that it computed


def own_counts(model: Transformer) -> OwnCounts:
    """Of this rank; empty if it has no mixture. May wait for the device."""
    if model.routing is None:
        return b"", b""
    load, spread = model.routing.load(), model.ranks.spread
    computed = load.sum(1)
    if spread is not None:
        computed = spread.computed(Shard(model.config, model.ranks.place).mixture_layers).sum(1).numpy()
    return load.tobytes(), computed.tobytes()


def routed(model: Transformer, dtype: str, counts: Mapping[int, OwnCounts]) -> Routed:
    """model: rank 0's; dtype: of its weights; counts: rank -> its own ones, of those that are there. Tensor ranks have
    the same requests, so the first of them speaks for all. Raises ClusterError if there is no mixture."""
    config, place, spread = model.config, model.ranks.place, model.ranks.spread
    if config.mixture is None:
        raise ClusterError("its model has no experts")
    experts, layers = config.mixture.experts, config.mixture.layers
    ranks = 1 if spread is None else spread.map.ranks
    load, computed = np.zeros((place.data, len(layers), experts), np.int64), np.zeros((len(layers), ranks), np.int64)
    for rank, (own_load, own_computed) in counts.items():
        at = place.of(rank)
        here = [layers.index(layer) for layer in Shard(config, at).mixture_layers]
        if at.tensor_rank == 0:
            load[at.data_rank, here] = np.frombuffer(own_load, np.int64).reshape(-1, experts)
        computed[here, rank % ranks] = np.frombuffer(own_computed, np.int64)
    held = np.arange(experts)[None] if spread is None else spread.map.phy2log.numpy()
    held = held[list(layers)] if len(held) > 1 else held
    placed = np.ascontiguousarray(np.broadcast_to(held, (len(layers), held.shape[1])))
    return Routed(load, computed, placed, config.mixture.top_k, expert_bytes(config, dtype))
