"""From weights on disk to a `Transformer`. Called by `sources.load_model`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tercet.distributed.place import Place
from tercet.distributed.ranks import Ranks
from tercet.errors import ModelFileCorrupt
from tercet.kernels.kinds import Kernels
from tercet.kernels.norm import RmsNorm
from tercet.models.config import ModelConfig
from tercet.models.layer import DenseMlp, GroupedQuery, Layer
from tercet.models.reader import WeightReader
from tercet.models.shard import Shard, values_of
from tercet.models.transformer import Transformer, Weights
from tercet.models.weights import VISION, WeightSource


@dataclass(frozen=True)
class LoadedModel:
    model: Transformer
    config: ModelConfig
    fingerprint: str  # equal models are interchangeable


def build_model(
    config: ModelConfig, source: WeightSource, dtype: torch.dtype | None, kernels: Kernels, ranks: Ranks | None = None
) -> LoadedModel:
    """dtype: of weights and KV cache. None: matrices stay in the blocks that the file has, which takes native kernels;
    what is in no such blocks is float32, and the cache bfloat16. ranks: of a group, if this rank has a share only.

    Raises ModelFileCorrupt for a tensor that is missing or has another shape than the config says, UnsupportedModel
    for one that the config has no place for."""
    _check_heads(source, config)
    names = {name for name in source.names() if config.vision is None or not name.startswith(VISION)}
    fan_in = max(config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim)
    reader = WeightReader(source, names, config, dtype, kernels, fan_in)
    with torch.inference_mode():
        weights = _weights(reader, Shard(config, ranks.place if ranks else Place()))
    reader.refuse_unused(config.architecture)
    model = Transformer(config, weights, kernels, dtype or torch.bfloat16, ranks)
    return LoadedModel(model, config, reader.fingerprint())


def _check_heads(source: WeightSource, config: ModelConfig) -> None:
    if config.num_heads % config.num_kv_heads:
        raise ModelFileCorrupt(
            f"{source.path}: {config.num_heads} heads cannot share {config.num_kv_heads} heads of KV"
        )
    if config.head_dim % 2 or config.head_dim < 2:
        raise ModelFileCorrupt(f"{source.path}: heads of {config.head_dim} dimensions cannot be rotated in pairs")


def _weights(reader: WeightReader, shard: Shard) -> Weights:
    config, place = shard.config, shard.place
    embedding = reader.weight("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    layers = tuple(_layer(reader, shard, f"model.layers.{i}.") for i in shard.layers)
    for elsewhere in {*range(config.num_layers)} - {*shard.layers}:
        reader.skim(f"model.layers.{elsewhere}.")
    norm, rows = _norm(reader, config, "model.norm"), [shard.columns(config.vocab_size)]
    if config.tie_word_embeddings and not reader.has("lm_head.weight"):  # used if there is one, as in transformers
        head = reader.packed(["model.embed_tokens.weight"], [embedding], rows=rows) if place.is_last else None
    elif place.is_last:
        head = reader.linear(["lm_head"], [config.vocab_size], config.hidden_size, bias=False, rows=rows)
    else:
        reader.skim("lm_head.")
        head = None
    here = embedding[rows[0].start : rows[0].stop].clone() if place.tensor > 1 else embedding
    return Weights(here if place.is_first else None, layers, norm if place.is_last else None, head)


def _norm(reader: WeightReader, config: ModelConfig, name: str) -> RmsNorm:
    return _norm_of(reader, config, reader.weight(f"{name}.weight", config.hidden_size))


def _norm_of(reader: WeightReader, config: ModelConfig, weight: Tensor) -> RmsNorm:
    return RmsNorm(weight.to(reader.activations), config.rms_norm_eps)


def _layer(reader: WeightReader, shard: Shard, at: str) -> Layer:
    return Layer(
        attention_norm=_norm(reader, shard.config, f"{at}input_layernorm"),
        attention=_grouped_query(reader, shard, f"{at}self_attn."),
        mlp_norm=_norm(reader, shard.config, f"{at}post_attention_layernorm"),
        mlp=_dense_mlp(reader, shard, f"{at}mlp."),
    )


def _grouped_query(reader: WeightReader, shard: Shard, at: str) -> GroupedQuery:
    config, dim = shard.config, shard.config.head_dim
    queries, keys = config.num_heads * dim, config.num_kv_heads * dim
    here, kv_here = values_of(shard.heads, dim), values_of(shard.kv_heads, dim)
    return GroupedQuery(
        qkv=reader.linear(
            [f"{at}{n}_proj" for n in "qkv"],
            [queries, keys, keys],
            config.hidden_size,
            config.qkv_bias,
            [here, kv_here, kv_here],
        ),
        qk_norm=_qk_norm(reader, shard, at) if config.qk_norm else None,
        output=reader.row_parallel(
            f"{at}o_proj", config.hidden_size, queries, config.output_bias, here, adds_bias=shard.adds_bias
        ),
    )


def _dense_mlp(reader: WeightReader, shard: Shard, at: str) -> DenseMlp:
    config = shard.config
    hidden, middle, biased = config.hidden_size, config.intermediate_size, config.mlp_bias
    here = shard.columns(middle)
    return DenseMlp(
        gate_up=reader.linear([f"{at}gate_proj", f"{at}up_proj"], [middle, middle], hidden, biased, rows=[here, here]),
        down=reader.row_parallel(f"{at}down_proj", hidden, middle, biased, here, adds_bias=shard.adds_bias),
    )


def _qk_norm(reader: WeightReader, shard: Shard, at: str) -> RmsNorm:
    """One norm over queries and keys together; weight [H + Hkv, D]."""
    config = shard.config
    query = reader.weight(f"{at}q_norm.weight", config.head_dim).expand(len(shard.heads), -1)
    key = reader.weight(f"{at}k_norm.weight", config.head_dim).expand(len(shard.kv_heads), -1)
    return _norm_of(reader, config, torch.cat((query, key)))
