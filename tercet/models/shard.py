"""A rank's share of a model: which layers, and of each which heads, columns, experts and rows of the
vocabulary.

Column parallel: a linear layer's outputs are shared, as those of queries, keys, values, gate and up. Row parallel: its
inputs are, as those of the output and down projections, so that ranks sum what they make (arXiv:1909.08053, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tercet.distributed.place import Place, share
from tercet.distributed.spread import Spread
from tercet.kernels.routing_counts import RoutingCounts
from tercet.models.config import ModelConfig
from tercet.transfer.memory.layout import KvLayout, heads_at


@dataclass(frozen=True)
class Shard:
    config: ModelConfig  # of the whole model
    place: Place
    spread: Spread | None = None  # of a mixture's experts, if each rank has some of them whole
    counts: RoutingCounts | None = None  # of a mixture's routing

    @property
    def mixture_layers(self) -> list[int]:
        """Those that are here."""
        mixture = self.config.mixture
        return [] if mixture is None else [layer for layer in self.layers if layer in mixture.layers]

    def experts(self, layer: int) -> Sequence[int]:
        """Those that are here, in the order of their slots."""
        assert self.config.mixture is not None
        if self.spread is None:
            return range(self.config.mixture.experts)
        return self.spread.map.experts_on(self.spread.rank, layer)

    @property
    def expert_columns(self) -> range:
        """Of each expert's intermediate values."""
        assert self.config.mixture is not None
        size = self.config.mixture.intermediate_size
        return self.columns(size) if self.spread is None else range(size)

    @property
    def layers(self) -> range:
        return self.place.layers(self.config.num_layers)

    @property
    def heads(self) -> range:
        """Query heads."""
        return share(self.config.num_heads, self.place.tensor_rank, self.place.tensor)

    @property
    def kv_heads(self) -> range:
        return heads_at(self.config.num_kv_heads, self.place.tensor_rank, self.place.tensor)

    def columns(self, count: int) -> range:
        """Of `count` in a row that the tensor ranks share: a vocabulary, an MLP's intermediate values."""
        return share(count, self.place.tensor_rank, self.place.tensor)

    @property
    def adds_bias(self) -> bool:
        """Whether a row-parallel layer's bias is added here: once over all ranks."""
        return self.place.tensor_rank == 0

    @property
    def here(self) -> ModelConfig:
        """What the layers that are here look like to the kernels."""
        config, layers = self.config, self.layers
        return replace(
            config,
            num_layers=len(layers),
            num_heads=len(self.heads),
            num_kv_heads=len(self.kv_heads),
            intermediate_size=len(self.columns(config.intermediate_size)),
            sliding_windows=config.sliding_windows[layers.start : layers.stop],
        )


def values_of(heads: range, dim: int) -> range:
    """The rows that these heads have in a projection."""
    return range(heads.start * dim, heads.stop * dim)


def kv_layout(config: ModelConfig, place: Place, blocks: int, block_size: int, dtype: str) -> KvLayout:
    """Of a rank's KV cache."""
    layers = place.layers(config.num_layers)
    return KvLayout(
        len(layers),
        blocks,
        block_size,
        config.num_kv_heads,
        config.head_dim,
        dtype,
        parts=config.kv_parts,
        tp_size=place.tensor,
        tp_rank=place.tensor_rank,
        first_layer=layers.start,
        model_layers=config.num_layers,
    )
