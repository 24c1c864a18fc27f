"""The config of a model in a GGUF file. Imports no torch.

Key names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
from typing import Any

from tercet.errors import UnsupportedModel
from tercet.models.config import ModelConfig, RopeConfig
from tercet.models.gguf_file import GgufFile

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral and SmolLM2 are stored as llama
ROPE_FREQS = "rope_freqs.weight"  # how GGUF stores Llama 3's stretched RoPE
# Keys that change results and that only these values leave as they are.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "attention.clamp_kqv": (0.0,),
    "attention.scale": (0.0,),
    "attention.causal": (True,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scale_linear": (0.0, 1.0),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
}


def config_from_gguf(file: GgufFile, max_context: int) -> ModelConfig:
    """Raises UnsupportedModel naming the key that cannot be run, ModelFileCorrupt for one that lacks."""
    arch = file.architecture
    if arch not in ARCHITECTURES:
        raise UnsupportedModel(f"{file.path}: architecture {arch!r} is not supported; {', '.join(ARCHITECTURES)} are")
    keys = {k.removeprefix(f"{arch}."): v for k, v in file.metadata.items() if k.startswith(f"{arch}.")}
    _refuse_unsupported(file, keys)
    heads, hidden = file.count(f"{arch}.attention.head_count"), file.count(f"{arch}.embedding_length")
    layers = file.count(f"{arch}.block_count")
    head_dim = keys.get("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.get(key, head_dim) != head_dim:
            raise UnsupportedModel(
                f"{file.path}: {arch}.{key} is {keys[key]}; only the head dimension {head_dim} is run"
            )
    return ModelConfig(
        architecture=arch,
        vocab_size=file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in file.tensors else 0,
        hidden_size=hidden,
        intermediate_size=file.count(f"{arch}.feed_forward_length"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=keys.get("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_context=min(max_context, file.count(f"{arch}.context_length")),
        rms_norm_eps=file.require(f"{arch}.attention.layer_norm_rms_epsilon"),
        rope=_rope(file, keys),
        sliding_windows=(keys.get("attention.sliding_window") or None,) * layers,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        qk_norm=arch == "qwen3",
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=file.metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=eos_token_ids(file),
    )


def _refuse_unsupported(file: GgufFile, keys: dict[str, Any]) -> None:
    for key, allowed in NEUTRAL.items():
        if key in keys and keys[key] not in allowed:
            raise UnsupportedModel(f"{file.path}: {file.architecture}.{key} = {keys[key]} is not supported")
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length", "attention.sliding_window"):
        if isinstance(keys.get(key), list):
            raise UnsupportedModel(f"{file.path}: {file.architecture}.{key} differs from layer to layer")


def _rope(file: GgufFile, keys: dict[str, Any]) -> RopeConfig:
    theta = float(keys.get("rope.freq_base", 10000.0))
    kind = keys.get("rope.scaling.type", "none")
    factor = float(keys.get("rope.scaling.factor", 1.0))
    if ROPE_FREQS in file.tensors:
        if kind != "none":
            raise UnsupportedModel(
                f"{file.path}: has {ROPE_FREQS} and rope.scaling.type {kind!r}; only one is supported"
            )
        return RopeConfig(theta, freq_factors=tuple(file.read(ROPE_FREQS).tolist()))
    if kind == "none":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, "linear", factor)
    if kind == "yarn":
        original = int(file.require(f"{file.architecture}.rope.scaling.original_context_length"))
        return RopeConfig(theta, "yarn", factor, original, attention_factor=0.1 * math.log(factor) + 1.0)
    raise UnsupportedModel(f"{file.path}: rope.scaling.type {kind!r} is not supported; none, linear and yarn are")


def eos_token_ids(file: GgufFile) -> tuple[int, ...]:
    ids = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return tuple(dict.fromkeys(i for i in ids if i is not None))
