"""How much memory a model takes, known from its config before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping

from tercet.core import Role
from tercet.devices import Device
from tercet.errors import UnsupportedSpec
from tercet.models.config import LatentConfig, MixtureConfig, ModelConfig
from tercet.models.sources import load_config, locate
from tercet.spec import EMBEDDING_BLOCK, ClusterSpec, KvSpec, ModelSpec

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
GIB = 1 << 30


def weight_count(config: ModelConfig) -> int:
    """Of all weights, each once."""
    hidden, mixture, layers = config.hidden_size, config.mixture, config.num_layers
    sparse = 0 if mixture is None else len(mixture.layers)
    mlps = (layers - sparse) * _mlp_count(config, config.intermediate_size)
    if mixture is not None:
        mlps += sparse * _mixture_count(config, mixture)
    attention = _grouped_query_count(config) if config.latent is None else _latent_count(config, config.latent)
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    return embeddings + layers * (attention + 2 * hidden) + mlps + hidden


def _grouped_query_count(config: ModelConfig) -> int:
    hidden, queries, keys = (
        config.hidden_size,
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    )
    matrices = hidden * (queries + 2 * keys) + queries * hidden
    biases = (queries + 2 * keys) * config.qkv_bias + hidden * config.output_bias
    return matrices + biases + 2 * config.head_dim * config.qk_norm


def _latent_count(config: ModelConfig, latent: LatentConfig) -> int:
    hidden, heads, rank, ranks = config.hidden_size, config.num_heads, latent.rank, latent.query_rank or 0
    down = (hidden + config.qkv_bias) * (ranks + rank + latent.rotary_dim) + ranks + rank  # with biases and norms
    queries = (ranks or hidden) * heads * (latent.plain_dim + latent.rotary_dim)
    up = rank * heads * (latent.plain_dim + latent.value_dim)
    return down + queries + up + heads * latent.value_dim * hidden + hidden * config.output_bias


def _mlp_count(config: ModelConfig, middle: int) -> int:
    return 3 * config.hidden_size * middle + (2 * middle + config.hidden_size) * config.mlp_bias


def _mixture_count(config: ModelConfig, mixture: MixtureConfig) -> int:
    router = mixture.experts * (config.hidden_size + mixture.choice_bias)
    experts = mixture.experts * 3 * config.hidden_size * mixture.intermediate_size
    return router + experts + (_mlp_count(config, mixture.shared_size) if mixture.shared_size else 0)


def expert_bytes(config: ModelConfig, dtype: str) -> int:
    """Of one expert of a mixture in one layer."""
    assert config.mixture is not None, "asked of a mixture only"
    item = ITEM_BYTES["bfloat16" if dtype == "gguf" else dtype]
    return 3 * config.hidden_size * config.mixture.intermediate_size * item


def weight_bytes(config: ModelConfig, spec: ModelSpec, role: Role = Role.DECODE, *, apart: bool = False) -> int:
    """Of a worker. apart: images are encoded by workers of their own, which alone have the vision tower, and no text
    model; else those that compute prompts have it."""
    sees = role is Role.ENCODE if apart else role is not Role.DECODE
    vision = config.vision.weights if config.vision is not None and sees else 0
    item = ITEM_BYTES["bfloat16" if spec.dtype == "gguf" else spec.dtype]
    text = locate(spec).stat().st_size if spec.dtype == "gguf" else weight_count(config) * item
    return (0 if role is Role.ENCODE else text) + vision * item


def embedding_bytes(config: ModelConfig, blocks: int) -> int:
    """Of a worker's region by which embeddings cross."""
    if config.vision is None:
        return 0
    return blocks * EMBEDDING_BLOCK * config.vision.levels * config.vision.out_size * ITEM_BYTES["float32"]


def kv_bytes(config: ModelConfig, kv: KvSpec, dtype: str) -> int:
    """Of a worker's KV cache."""
    item = ITEM_BYTES["bfloat16" if dtype == "gguf" else dtype]
    per_token = config.kv_parts * config.num_layers * config.num_kv_heads * config.head_dim
    return kv.blocks * kv.block_size * per_token * item


def refuse_too_large(spec: ClusterSpec, replicas: Mapping[Role, int], device: Device, held: int) -> None:
    """Raises UnsupportedSpec if so many workers of the roles whose pools have such devices cannot fit: those on CPUs
    together in this machine's memory, every other one in that of a device. held: bytes of that memory.

    A worker takes more than what is counted here, so one that passes may still be too large."""
    config = load_config(spec.model)
    needs: dict[str, int] = {}
    weights = 0  # the most that one has
    apart = Role.ENCODE in spec.roles
    for role, count in replicas.items():
        wanted, its = spec.roles[role], weight_bytes(config, spec.model, role, apart=apart)
        weights = max(weights, its)
        cache = 0 if role is Role.ENCODE else kv_bytes(config, wanted.kv, spec.model.dtype)
        crossing = apart and role is not Role.DECODE
        region = embedding_bytes(config, wanted.images.blocks) if crossing else 0
        workers = count if device.kind == "cpu" else 1
        told = f"{workers} {role} with {_gib(cache)} of KV cache (kv.blocks {wanted.kv.blocks})"
        if role is Role.ENCODE:
            told = f"{workers} {role} with {_gib(region)} for embeddings (images.blocks {wanted.images.blocks})"
        needs[told] = workers * (its + cache + region)
    needed = sum(needs.values()) if device.kind == "cpu" else max(needs.values(), default=0)
    if needed > held:
        whose = "this machine has" if device.kind == "cpu" else f"a {device.kind.upper()} here has"
        raise UnsupportedSpec(
            f"the model does not fit: {_gib(weights)} of weights for each of {', '.join(needs)} are {_gib(needed)}, "
            f"and {whose} {_gib(held)}; use a smaller model, fewer bits (model.dtype), fewer replicas or a smaller "
            "roles.*.kv.blocks"
        )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
