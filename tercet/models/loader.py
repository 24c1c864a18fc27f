"""From weights on disk to a `Transformer`. Called by `sources.load_model`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tercet.errors import ModelFileCorrupt
from tercet.kernels.kinds import Kernels
from tercet.kernels.norm import RmsNorm
from tercet.models.config import ModelConfig
from tercet.models.layer import DenseMlp, GroupedQuery, Layer
from tercet.models.reader import WeightReader
from tercet.models.transformer import Transformer, Weights
from tercet.models.weights import VISION, WeightSource


@dataclass(frozen=True)
class LoadedModel:
    model: Transformer
    config: ModelConfig
    fingerprint: str  # equal models are interchangeable


def build_model(config: ModelConfig, source: WeightSource, dtype: torch.dtype | None, kernels: Kernels) -> LoadedModel:
    """dtype: of weights and KV cache. None: matrices stay in the blocks that the file has, which takes native kernels;
    what is in no such blocks is float32, and the cache bfloat16.

    Raises ModelFileCorrupt for a tensor that is missing or has another shape than the config says, UnsupportedModel
    for one that the config has no place for."""
    _check_heads(source, config)
    names = {name for name in source.names() if config.vision is None or not name.startswith(VISION)}
    fan_in = max(config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim)
    reader = WeightReader(source, names, config, dtype, kernels, fan_in)
    with torch.inference_mode():
        weights = _weights(reader, config)
    reader.refuse_unused(config.architecture)
    return LoadedModel(Transformer(config, weights, kernels, dtype or torch.bfloat16), config, reader.fingerprint())


def _check_heads(source: WeightSource, config: ModelConfig) -> None:
    if config.num_heads % config.num_kv_heads:
        raise ModelFileCorrupt(
            f"{source.path}: {config.num_heads} heads cannot share {config.num_kv_heads} heads of KV"
        )
    if config.head_dim % 2 or config.head_dim < 2:
        raise ModelFileCorrupt(f"{source.path}: heads of {config.head_dim} dimensions cannot be rotated in pairs")


def _weights(reader: WeightReader, config: ModelConfig) -> Weights:
    embedding = reader.weight("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    layers = tuple(_layer(reader, config, f"model.layers.{i}.") for i in range(config.num_layers))
    norm = _norm(reader, config, "model.norm")
    if config.tie_word_embeddings and not reader.has("lm_head.weight"):  # used if there is one, as in transformers
        return Weights(embedding, layers, norm, reader.packed(["model.embed_tokens.weight"], [embedding]))
    return Weights(embedding, layers, norm, reader.linear(["lm_head"], [config.vocab_size], config.hidden_size, False))


def _norm(reader: WeightReader, config: ModelConfig, name: str) -> RmsNorm:
    return _norm_of(reader, config, reader.weight(f"{name}.weight", config.hidden_size))


def _norm_of(reader: WeightReader, config: ModelConfig, weight: Tensor) -> RmsNorm:
    return RmsNorm(weight.to(reader.activations), config.rms_norm_eps)


def _layer(reader: WeightReader, config: ModelConfig, at: str) -> Layer:
    return Layer(
        attention_norm=_norm(reader, config, f"{at}input_layernorm"),
        attention=_grouped_query(reader, config, f"{at}self_attn."),
        mlp_norm=_norm(reader, config, f"{at}post_attention_layernorm"),
        mlp=_dense_mlp(reader, config, f"{at}mlp."),
    )


def _grouped_query(reader: WeightReader, config: ModelConfig, at: str) -> GroupedQuery:
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    projections = [f"{at}{n}_proj" for n in "qkv"]
    return GroupedQuery(
        qkv=reader.linear(projections, [queries, keys, keys], config.hidden_size, config.qkv_bias),
        qk_norm=_qk_norm(reader, config, at) if config.qk_norm else None,
        output=reader.linear([f"{at}o_proj"], [config.hidden_size], queries, config.output_bias),
    )


def _dense_mlp(reader: WeightReader, config: ModelConfig, at: str) -> DenseMlp:
    hidden, middle, biased = config.hidden_size, config.intermediate_size, config.mlp_bias
    return DenseMlp(
        gate_up=reader.linear([f"{at}gate_proj", f"{at}up_proj"], [middle, middle], hidden, biased),
        down=reader.linear([f"{at}down_proj"], [hidden], middle, biased),
    )


def _qk_norm(reader: WeightReader, config: ModelConfig, at: str) -> RmsNorm:
    """One norm over queries and keys together; weight [H + Hkv, D]."""
    query = reader.weight(f"{at}q_norm.weight", config.head_dim).expand(config.num_heads, -1)
    key = reader.weight(f"{at}k_norm.weight", config.head_dim).expand(config.num_kv_heads, -1)
    return _norm_of(reader, config, torch.cat((query, key)))
