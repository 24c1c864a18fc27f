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
from tercet.models.layer import DenseMlp, GroupedQuery, Latent, Layer, LayerCounts, MixtureMlp
from tercet.models.reader import WeightReader
from tercet.models.shard import Shard, values_of

LATENT_EPS = 1e-6  # of the norms of latents, whatever the model's others have
MIXTRAL = ("block_sparse_moe.", "w1", "w3", "w2")  # where a mixture is, and its matrices: gate, up, down
OTHERS = ("mlp.", "gate_proj", "up_proj", "down_proj")


def read_layer(reader: WeightReader, shard: Shard, number: int) -> Layer:
    """The share of it that is here."""
    at, config = f"model.layers.{number}.", shard.config
    sparse = config.mixture is not None and number in config.mixture.layers
    return Layer(
        attention_norm=_norm(reader, config, f"{at}input_layernorm"),
        attention=_attention(reader, shard, f"{at}self_attn."),
        mlp_norm=_norm(reader, config, f"{at}post_attention_layernorm"),
        mlp=_mixture(reader, shard, number) if sparse else _dense(reader, shard, f"{at}mlp.", config.intermediate_size),
    )


def _norm(reader: WeightReader, config: ModelConfig, name: str) -> RmsNorm:
    return reader.norm(name, config.hidden_size, config.rms_norm_eps)


# ---- attention


def _attention(reader: WeightReader, shard: Shard, at: str) -> GroupedQuery | Latent:
    if shard.config.latent is not None:
        return _latent(reader, shard, shard.config.latent, at)
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
        output=_output(reader, shard, at, dim),
    )


def _output(reader: WeightReader, shard: Shard, at: str, dim: int) -> PackedLinear:
    """dim: of what a head gives."""
    config, here = shard.config, values_of(shard.heads, dim)
    return reader.row_parallel(
        f"{at}o_proj",
        config.hidden_size,
        config.num_heads * dim,
        config.output_bias,
        here,
        adds_bias=shard.adds_bias,
    )


def _qk_norm(reader: WeightReader, shard: Shard, at: str) -> RmsNorm:
    """One norm over queries and keys together; weight [H + Hkv, D]."""
    config = shard.config
    query = reader.weight(f"{at}q_norm.weight", config.head_dim).expand(len(shard.heads), -1)
    key = reader.weight(f"{at}k_norm.weight", config.head_dim).expand(len(shard.kv_heads), -1)
    return RmsNorm(torch.cat((query, key)).to(reader.activations), config.rms_norm_eps)


def _latent(reader: WeightReader, shard: Shard, latent: LatentConfig, at: str) -> Latent:
    """Every rank makes the latents; the heads that read them are shared."""
    hidden, rank, biased = shard.config.hidden_size, latent.query_rank, shard.config.qkv_bias
    key_up, value_up = _up(reader, shard, latent, at)
    return Latent(
        query_down=reader.linear([f"{at}q_a_proj"], [rank], hidden, biased) if rank else None,
        query_norm=reader.norm(f"{at}q_a_layernorm", rank, LATENT_EPS) if rank else None,
        query=_query(reader, shard, latent, at),
        latent=_down(reader, shard.config, latent, at),
        latent_norm=reader.norm(f"{at}kv_a_layernorm", latent.rank, LATENT_EPS),
        key_up=key_up,
        value_up=value_up,
        output=_output(reader, shard, at, latent.value_dim),
    )


def _query(reader: WeightReader, shard: Shard, latent: LatentConfig, at: str) -> PackedLinear:
    count, each = shard.config.num_heads, latent.plain_dim + latent.rotary_dim
    name = f"{at}q_b_proj.weight" if latent.query_rank else f"{at}q_proj.weight"
    weight = reader.weight(name, count * each, latent.query_rank or shard.config.hidden_size)
    heads = _in_halves(weight.view(count, each, -1), latent, 1)
    return reader.packed([name], [heads.reshape(weight.shape)], rows=[values_of(shard.heads, each)])


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


def _up(reader: WeightReader, shard: Shard, latent: LatentConfig, at: str) -> tuple[Tensor, Tensor]:
    """-> key_up [H, N, R], value_up [H, V, R]."""
    count, each = shard.config.num_heads, latent.plain_dim + latent.value_dim
    weight = reader.weight(f"{at}kv_b_proj.weight", count * each, latent.rank).to(reader.activations)
    heads = weight.view(count, each, latent.rank)[shard.heads.start : shard.heads.stop]
    key_up, value_up = torch.split(heads, [latent.plain_dim, latent.value_dim], 1)
    return key_up.clone(), value_up.clone()


# ---- MLP


def _dense(reader: WeightReader, shard: Shard, at: str, middle: int) -> DenseMlp:
    hidden, biased, here = shard.config.hidden_size, shard.config.mlp_bias, shard.columns(middle)
    return DenseMlp(
        gate_up=reader.linear([f"{at}gate_proj", f"{at}up_proj"], [middle, middle], hidden, biased, rows=[here, here]),
        down=reader.row_parallel(f"{at}down_proj", hidden, middle, biased, here, adds_bias=shard.adds_bias),
    )


def _mixture(reader: WeightReader, shard: Shard, layer: int) -> MixtureMlp:
    mixture, at = shard.config.mixture, f"model.layers.{layer}."
    assert mixture is not None
    where, *matrices = MIXTRAL if reader.has(f"{at}{MIXTRAL[0]}gate.weight") else OTHERS
    at, bias = f"{at}{where}", None
    router = reader.weight(f"{at}gate.weight", mixture.experts, shard.config.hidden_size).float()
    if mixture.choice_bias:
        bias = reader.weight(f"{at}gate.e_score_correction_bias", mixture.experts)
    return MixtureMlp(
        router=router,
        bias=bias,
        routing=_routing(mixture),
        experts=_experts(reader, shard, layer, f"{at}experts.", matrices),
        shared=_dense(reader, shard, f"{at}shared_experts.", mixture.shared_size) if mixture.shared_size else None,
        layer=layer,
        spread=shard.spread,
        counts=LayerCounts(shard.counts, shard.mixture_layers.index(layer)) if shard.counts else None,
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


def _experts(reader: WeightReader, shard: Shard, layer: int, at: str, matrices: list[str]) -> Experts:
    """Of one tensor for each expert's matrix, which goes straight to its place, or of one for all experts. All are
    read, and those of this rank's slots are kept, or the columns that are here of all."""
    mixture, held, columns = shard.config.mixture, shard.experts(layer), shard.expert_columns
    assert mixture is not None
    count, hidden, middle = mixture.experts, shard.config.hidden_size, mixture.intermediate_size
    here = slice(columns.start, columns.stop)
    if reader.has(f"{at}gate_up_proj"):
        both = reader.weight(f"{at}gate_up_proj", count, 2 * middle, hidden).view(count, 2, middle, hidden)
        downs = reader.weight(f"{at}down_proj", count, hidden, middle)
        return reader.experts(both[held][:, :, here].flatten(1, 2), downs[held][..., here].contiguous())
    gate, up, down = matrices
    gates, downs = reader.empty(len(held), 2, len(columns), hidden), reader.empty(len(held), hidden, len(columns))
    for expert in range(count):
        slots = [slot for slot, its in enumerate(held) if its == expert]
        gates[slots, 0] = reader.weight(f"{at}{expert}.{gate}.weight", middle, hidden)[here]
        gates[slots, 1] = reader.weight(f"{at}{expert}.{up}.weight", middle, hidden)[here]
        downs[slots] = reader.weight(f"{at}{expert}.{down}.weight", hidden, middle)[:, here]
    return reader.experts(gates.flatten(1, 2), downs)
