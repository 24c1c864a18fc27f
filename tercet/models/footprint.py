"""How much memory a model takes, known from its config before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping

from tercet.core import Role
from tercet.devices import Device
from tercet.errors import UnsupportedSpec
from tercet.models.config import ModelConfig
from tercet.models.sources import load_config, locate
from tercet.spec import EMBEDDING_BLOCK, ClusterSpec, KvSpec, ModelSpec

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
GIB = 1 << 30


def weight_count(config: ModelConfig) -> int:
    """Of all weights, each once."""
    hidden, middle = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = hidden * (queries + 2 * keys) + queries * hidden + (queries + 2 * keys) * config.qkv_bias
    attention += hidden * config.output_bias + 2 * config.head_dim * config.qk_norm
    mlp = 3 * hidden * middle + (2 * middle + hidden) * config.mlp_bias
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    return embeddings + config.num_layers * (attention + mlp + 2 * hidden) + hidden


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
    return kv.blocks * kv.block_size * 2 * config.num_layers * config.num_kv_heads * config.head_dim * item


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
