"""What the ranks of a worker have counted of their routing, for who plans where experts lie (`tercet experts`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tercet.distributed.expert_map import ExpertMap
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


def own_pairs(model: Transformer, layer: int) -> bytes:
    """[n, n] int64 of this rank's mixture layers `layer` and the next. May wait for the device."""
    assert model.routing is not None, "it has layers with experts"
    return model.routing.pairs(layer).tobytes()


def pair_layers(model: Transformer, rank: int) -> range:
    """Those of a rank's mixture layers that have a next one there, if it is to be asked for pairs: tensor ranks have
    the same requests. model: rank 0's."""
    at = model.ranks.place.of(rank)
    return range(len(Shard(model.config, at).mixture_layers) - 1 if at.tensor_rank == 0 else 0)


def paired(model: Transformer, pairs: Mapping[int, Sequence[bytes]]) -> NDArray[np.int64]:
    """model: rank 0's; pairs: rank -> of each of its `pair_layers`. -> [L - 1, n, n], zeros between the last layer of a
    pipeline stage and the first of the next, which no rank sees both of."""
    config, place = model.config, model.ranks.place
    assert config.mixture is not None, "it has counted"
    experts, layers = config.mixture.experts, config.mixture.layers
    found = np.zeros((len(layers) - 1, experts, experts), np.int64)
    for rank, its in pairs.items():
        here = Shard(config, place.of(rank)).mixture_layers
        for layer, counted in zip(here, its, strict=False):
            found[layers.index(layer)] += np.frombuffer(counted, np.int64).reshape(experts, experts)
    return found


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
    placed_now = None if spread is None else spread.map  # read once: it may be exchanged meanwhile
    held = np.arange(experts)[None] if placed_now is None else placed_now.phy2log.numpy()
    held = held[list(layers)] if len(held) > 1 else held
    placed = np.ascontiguousarray(np.broadcast_to(held, (len(layers), held.shape[1])))
    size, shares = expert_bytes(config, dtype), _shares(placed_now, layers)
    return Routed(load, computed, placed, config.mixture.top_k, size, shares)


def _shares(placed: ExpertMap | None, layers: Sequence[int]) -> NDArray[np.int64] | None:
    """-> [L, nodes, P]; zeros for layers without shares."""
    if placed is None or not placed.shares:
        return None
    its = {layer: shares.numpy() for layer, shares in placed.shares.items()}
    none = np.zeros_like(next(iter(its.values())))
    return np.stack([its.get(layer, none) for layer in layers])
