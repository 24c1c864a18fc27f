"""How much memory a model takes, known from its config before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping

from tercet.core import Role
from tercet.devices import Device
from tercet.errors import UnsupportedSpec
from tercet.models.config import ModelConfig
from tercet.models.sources import load_config, locate
from tercet.spec import ClusterSpec, KvSpec, ModelSpec

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


def weight_bytes(config: ModelConfig, spec: ModelSpec, role: Role = Role.DECODE) -> int:
    """Of a worker; one that only decodes has no vision tower."""
    if spec.dtype == "gguf":
        return locate(spec).stat().st_size
    vision = 0 if config.vision is None or role is Role.DECODE else config.vision.weights
    return (weight_count(config) + vision) * ITEM_BYTES[spec.dtype]


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
    for role, count in replicas.items():
        kv, its = spec.roles[role].kv, weight_bytes(config, spec.model, role)
        weights = max(weights, its)
        cache = kv_bytes(config, kv, spec.model.dtype)
        workers = count if device.kind == "cpu" else 1
        needs[f"{workers} {role} with {_gib(cache)} of KV cache (kv.blocks {kv.blocks})"] = workers * (its + cache)
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
