"""From weights on disk to a `Transformer`. Called by `sources.load_model`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tercet.distributed.place import Place
from tercet.distributed.ranks import Ranks
from tercet.errors import ModelFileCorrupt
from tercet.kernels.kinds import Kernels
from tercet.kernels.routing_counts import RoutingCounts
from tercet.models.config import ModelConfig
from tercet.models.layer_reader import read_layer
from tercet.models.progress import Hear
from tercet.models.reader import WeightReader
from tercet.models.shard import Shard
from tercet.models.transformer import Transformer, Weights
from tercet.models.weights import VISION, WeightSource


@dataclass(frozen=True)
class LoadedModel:
    model: Transformer
    config: ModelConfig
    fingerprint: str  # equal models are interchangeable


def build_model(
    config: ModelConfig,
    source: WeightSource,
    dtype: torch.dtype | None,
    kernels: Kernels,
    ranks: Ranks | None,
    hear: Hear,
) -> LoadedModel:
    """dtype: of weights and KV cache. None: matrices stay in the blocks that the file has, which takes native kernels;
    what is in no such blocks is float32, and the cache bfloat16. ranks: of a group, if this rank has a share only.

    Raises ModelFileCorrupt for a tensor that is missing or has another shape than the config says, UnsupportedModel
    for one that the config has no place for."""
    _check_heads(source, config)
    reader = WeightReader(source, _names(source, config), config, dtype, kernels, _fan_in(config), hear)
    with torch.inference_mode():
        shard = _shard(config, kernels, ranks)
        weights = _weights(reader, shard)
    reader.refuse_unused(config.architecture)
    model = Transformer(config, weights, kernels, dtype or torch.bfloat16, ranks, shard.counts)
    return LoadedModel(model, config, reader.fingerprint())


def _shard(config: ModelConfig, kernels: Kernels, ranks: Ranks | None) -> Shard:
    shard = Shard(config, Place()) if ranks is None else Shard(config, ranks.place, ranks.spread)
    if config.mixture is None or not shard.mixture_layers:
        return shard
    return replace(shard, counts=RoutingCounts(len(shard.mixture_layers), config.mixture.experts, kernels.device))


def _names(source: WeightSource, config: ModelConfig) -> set[str]:
    """Of the tensors that must all be read."""
    unused = [VISION] if config.vision is not None else []
    unused += [f"model.layers.{config.num_layers + i}." for i in range(config.unused_layers)]
    return {name for name in source.names() if not name.startswith(tuple(unused))}


def _fan_in(config: ModelConfig) -> int:
    """The largest of a packed matrix."""
    latent, mixture = config.latent, config.mixture
    attended = config.num_heads * (config.head_dim if latent is None else latent.value_dim)
    shared = 0 if mixture is None else mixture.shared_size
    rank = 0 if latent is None else latent.query_rank or 0
    return max(config.hidden_size, config.intermediate_size, attended, shared, rank)


def _check_heads(source: WeightSource, config: ModelConfig) -> None:
    if config.num_heads % config.num_kv_heads:
        raise ModelFileCorrupt(
            f"{source.path}: {config.num_heads} heads cannot share {config.num_kv_heads} heads of KV"
        )
    if config.rotary_dim % 2 or config.rotary_dim < 2:
        raise ModelFileCorrupt(f"{source.path}: heads of {config.rotary_dim} dimensions cannot be rotated in pairs")


def _weights(reader: WeightReader, shard: Shard) -> Weights:
    config, place = shard.config, shard.place
    embedding = reader.weight("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    layers = tuple(read_layer(reader, shard, i) for i in shard.layers)
    for elsewhere in {*range(config.num_layers)} - {*shard.layers}:
        reader.skim(f"model.layers.{elsewhere}.")
    norm, rows = reader.norm("model.norm", config.hidden_size, config.rms_norm_eps), [shard.columns(config.vocab_size)]
    if config.tie_word_embeddings and not reader.has("lm_head.weight"):  # used if there is one, as in transformers
        head = reader.packed(["model.embed_tokens.weight"], [embedding], rows=rows) if place.is_last else None
    elif place.is_last:
        head = reader.linear(["lm_head"], [config.vocab_size], config.hidden_size, bias=False, rows=rows)
    else:
        reader.skim("lm_head.")
        head = None
    here = embedding[rows[0].start : rows[0].stop].clone() if place.tensor > 1 else embedding
    return Weights(here if place.is_first else None, layers, norm if place.is_last else None, head)
