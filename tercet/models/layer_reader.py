"""Reads the weights of one decoder layer, of whatever kinds its halves are. Called by `loader.build_model`.

E hidden size   I intermediate size   n experts   R rank of the latent   P rotary, N plain, V value dimension of a head
"""

from __future__ import annotations

import torch
from torch import Tensor

from tercet.kernels.linear import PackedLinear
from tercet.kernels.moe import Experts, Routing
from tercet.kernels.norm import RmsNorm
from tercet.models.config import LatentConfig, MixtureConfig, ModelConfig
from tercet.models.layer import DenseMlp, GroupedQuery, Latent, Layer, MixtureMlp
from tercet.models.reader import WeightReader

LATENT_EPS = 1e-6  # of the norms of latents, whatever the model's others have
MIXTRAL = ("block_sparse_moe.", "w1", "w3", "w2")  # where a mixture is, and its matrices: gate, up, down
OTHERS = ("mlp.", "gate_proj", "up_proj", "down_proj")


def read_layer(reader: WeightReader, config: ModelConfig, number: int) -> Layer:
    at, mixture = f"model.layers.{number}.", config.mixture
    sparse = mixture is not None and number in mixture.layers
    return Layer(
        attention_norm=_norm(reader, config, f"{at}input_layernorm"),
        attention=_attention(reader, config, f"{at}self_attn."),
        mlp_norm=_norm(reader, config, f"{at}post_attention_layernorm"),
        mlp=_mixture(reader, config, at) if sparse else _dense(reader, config, f"{at}mlp.", config.intermediate_size),
    )


def _norm(reader: WeightReader, config: ModelConfig, name: str) -> RmsNorm:
    return reader.norm(name, config.hidden_size, config.rms_norm_eps)


# ---- attention


def _attention(reader: WeightReader, config: ModelConfig, at: str) -> GroupedQuery | Latent:
    if config.latent is not None:
        return _latent(reader, config, config.latent, at)
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    projections = [f"{at}{n}_proj" for n in "qkv"]
    return GroupedQuery(
        qkv=reader.linear(projections, [queries, keys, keys], config.hidden_size, config.qkv_bias),
        qk_norm=_qk_norm(reader, config, at) if config.qk_norm else None,
        output=reader.linear([f"{at}o_proj"], [config.hidden_size], queries, config.output_bias),
    )


def _qk_norm(reader: WeightReader, config: ModelConfig, at: str) -> RmsNorm:
    """One norm over queries and keys together; weight [H + Hkv, D]."""
    query = reader.weight(f"{at}q_norm.weight", config.head_dim).expand(config.num_heads, -1)
    key = reader.weight(f"{at}k_norm.weight", config.head_dim).expand(config.num_kv_heads, -1)
    return RmsNorm(torch.cat((query, key)).to(reader.activations), config.rms_norm_eps)


def _latent(reader: WeightReader, config: ModelConfig, latent: LatentConfig, at: str) -> Latent:
    hidden, rank = config.hidden_size, latent.query_rank
    key_up, value_up = _up(reader, config, latent, at)
    return Latent(
        query_down=reader.linear([f"{at}q_a_proj"], [rank], hidden, config.qkv_bias) if rank else None,
        query_norm=reader.norm(f"{at}q_a_layernorm", rank, LATENT_EPS) if rank else None,
        query=_query(reader, config, latent, at),
        latent=_down(reader, config, latent, at),
        latent_norm=reader.norm(f"{at}kv_a_layernorm", latent.rank, LATENT_EPS),
        key_up=key_up,
        value_up=value_up,
        output=reader.linear([f"{at}o_proj"], [hidden], config.num_heads * latent.value_dim, config.output_bias),
    )


def _query(reader: WeightReader, config: ModelConfig, latent: LatentConfig, at: str) -> PackedLinear:
    each = latent.plain_dim + latent.rotary_dim
    name = f"{at}q_b_proj.weight" if latent.query_rank else f"{at}q_proj.weight"
    weight = reader.weight(name, config.num_heads * each, latent.query_rank or config.hidden_size)
    heads = weight.view(config.num_heads, each, -1)
    return reader.packed([name], [_in_halves(heads, latent, 1).reshape(weight.shape)])


def _down(reader: WeightReader, config: ModelConfig, latent: LatentConfig, at: str) -> PackedLinear:
    name, outs = f"{at}kv_a_proj_with_mqa", latent.rank + latent.rotary_dim
    weight = _in_halves(reader.weight(f"{name}.weight", outs, config.hidden_size), latent, 0)
    bias = _in_halves(reader.weight(f"{name}.bias", outs), latent, 0) if config.qkv_bias else None
    return reader.packed([f"{name}.weight"], [weight], bias)


def _in_halves(weight: Tensor, latent: LatentConfig, dim: int) -> Tensor:
    """Pairs that are rotated together are neighbours in DeepSeek's files; here they are the two halves of the last P
    values along `dim`. Scores are sums over the pairs, so their order does not matter."""
    if not latent.interleaved:
        return weight
    plain, rotary = torch.split(weight, [weight.shape[dim] - latent.rotary_dim, latent.rotary_dim], dim)
    shape = (*rotary.shape[:dim], -1, 2, *rotary.shape[dim + 1 :])
    pairs = rotary.reshape(shape).transpose(dim, dim + 1).reshape(rotary.shape)
    return torch.cat((plain, pairs), dim)


def _up(reader: WeightReader, config: ModelConfig, latent: LatentConfig, at: str) -> tuple[Tensor, Tensor]:
    """-> key_up [H, N, R], value_up [H, V, R]."""
    each = latent.plain_dim + latent.value_dim
    weight = reader.weight(f"{at}kv_b_proj.weight", config.num_heads * each, latent.rank).to(reader.activations)
    heads = weight.view(config.num_heads, each, latent.rank)
    key_up, value_up = torch.split(heads, [latent.plain_dim, latent.value_dim], 1)
    return key_up.contiguous(), value_up.contiguous()


# ---- MLP


def _dense(reader: WeightReader, config: ModelConfig, at: str, middle: int) -> DenseMlp:
    hidden, biased = config.hidden_size, config.mlp_bias
    return DenseMlp(
        gate_up=reader.linear([f"{at}gate_proj", f"{at}up_proj"], [middle, middle], hidden, biased),
        down=reader.linear([f"{at}down_proj"], [hidden], middle, biased),
    )


def _mixture(reader: WeightReader, config: ModelConfig, at: str) -> MixtureMlp:
    mixture = config.mixture
    assert mixture is not None
    where, *matrices = MIXTRAL if reader.has(f"{at}{MIXTRAL[0]}gate.weight") else OTHERS
    at, bias = f"{at}{where}", None
    router = reader.weight(f"{at}gate.weight", mixture.experts, config.hidden_size).float()
    if mixture.choice_bias:
        bias = reader.weight(f"{at}gate.e_score_correction_bias", mixture.experts, dtype=torch.float32)
    return MixtureMlp(
        router=router,
        bias=bias,
        routing=_routing(mixture),
        experts=_experts(reader, config, mixture, f"{at}experts.", matrices),
        shared=_dense(reader, config, f"{at}shared_experts.", mixture.shared_size) if mixture.shared_size else None,
    )


def _routing(mixture: MixtureConfig) -> Routing:
    return Routing(
        experts=mixture.experts,
        top_k=mixture.top_k,
        score=mixture.score,
        normalise=mixture.normalise,
        scale=mixture.scale,
        groups=mixture.groups,
        top_groups=mixture.top_groups,
        group_score=mixture.group_score,
    )


def _experts(
    reader: WeightReader, config: ModelConfig, mixture: MixtureConfig, at: str, matrices: list[str]
) -> Experts:
    """Of one tensor for each expert's matrix, which goes straight to its place, or of all in one."""
    count, hidden, middle = mixture.experts, config.hidden_size, mixture.intermediate_size
    if reader.has(f"{at}gate_up_proj"):
        gate_up = reader.weight(f"{at}gate_up_proj", count, 2 * middle, hidden)
        return reader.experts(gate_up, reader.weight(f"{at}down_proj", count, hidden, middle))
    gate, up, down = matrices
    gates, downs = reader.empty(count, 2, middle, hidden), reader.empty(count, hidden, middle)
    for i in range(count):
        gates[i, 0] = reader.weight(f"{at}{i}.{gate}.weight", middle, hidden)
        gates[i, 1] = reader.weight(f"{at}{i}.{up}.weight", middle, hidden)
        downs[i] = reader.weight(f"{at}{i}.{down}.weight", hidden, middle)
    return reader.experts(gates.flatten(1, 2), downs)
