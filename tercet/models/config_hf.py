"""The config of a model in a Hugging Face directory (config.json, generation_config.json). Imports no torch.

Fields and defaults are those of transformers' configs of the same names.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tercet.errors import ModelFileCorrupt, ModelFileMissing, UnsupportedModel
from tercet.models.config import LatentConfig, ModelConfig
from tercet.models.config_fields import check
from tercet.models.config_latent import latent_config
from tercet.models.config_mixture import mixture_config
from tercet.models.config_rope import rope_config
from tercet.models.vision.config_hf import ARCHITECTURES as SEEING
from tercet.models.vision.config_hf import text_fields, vision_config

ARCHITECTURES = {  # model_type -> the one class of it that is run
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
NEUTRAL = (  # fields that change results, with what leaves them as they are
    *(("hidden_act", "silu"), ("quantization_config", None), ("compression_config", None)),
    *(("auto_map", None), ("transformers_weights", None), ("is_causal", True)),
)
CONTEXT = {  # where the file does not say
    "llama": 2048,
    "mistral": 131072,
    "qwen2": 32768,
    "qwen3": 32768,
    "mixtral": 131072,
    "qwen3_moe": 32768,
    "deepseek_v2": 2048,
    "deepseek_v3": 4096,
}
KV_HEADS = {  # where the file does not say; null, or others: as many as heads
    "mistral": 8,
    "qwen2": 32,
    "qwen3": 32,
    "mixtral": 8,
    "qwen3_moe": 4,
}
EPS, THETA = {"mixtral": 1e-5}, {"mixtral": 1e6}  # where the file does not say; others: 1e-6 and 1e4
BIASED = ("llama", "qwen3", "qwen3_moe", "deepseek_v2", "deepseek_v3")  # those that read attention_bias


def read_json(path: Path) -> dict[str, Any]:
    """Raises ModelFileMissing, or ModelFileCorrupt if it is no JSON object."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelFileMissing(f"{path}: cannot read it: {error.strerror}") from error
    except ValueError as error:
        raise ModelFileCorrupt(f"{path}: is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelFileCorrupt(f"{path}: is no JSON object")
    return content


def config_from_hf(directory: Path, max_context: int) -> ModelConfig:
    """Raises UnsupportedModel naming the field that cannot be run, ModelFileCorrupt for one that is missing."""
    path = directory / "config.json"
    fields = read_json(path)
    try:
        check(path, fields)
        if fields["model_type"] not in SEEING:
            return _config(path, fields, max_context, _generation(directory))
        config = _config(path, text_fields(path, fields), max_context, _generation(directory))
        if (sections := config.rope.sections) and sum(sections) != config.head_dim // 2:
            raise ModelFileCorrupt(f"{path}: mrope_section {[*sections]} are not the pairs of {config.head_dim} values")
        return replace(config, vision=vision_config(path, fields, config.hidden_size))
    except KeyError as error:
        raise ModelFileCorrupt(f"{path}: has no field {error}") from error


def _config(path: Path, fields: dict[str, Any], max_context: int, generation: dict[str, Any]) -> ModelConfig:
    kind = fields["model_type"]
    _refuse_unsupported(path, kind, fields)
    heads, layers, hidden = fields["num_attention_heads"], fields["num_hidden_layers"], fields["hidden_size"]
    biased = bool(fields.get("attention_bias", False)) and kind in BIASED
    eos = generation.get("eos_token_id", fields.get("eos_token_id"))
    rope = rope_config(path, fields, _context(fields), THETA.get(kind, 1e4))
    latent = latent_config(path, fields, rope) if kind.startswith("deepseek") else None
    kv_heads, head_dim = _cached(kind, fields, latent)
    return ModelConfig(
        architecture=kind,
        vocab_size=fields["vocab_size"],
        hidden_size=hidden,
        intermediate_size=fields["intermediate_size"],
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_context=min(max_context, _context(fields)),
        rms_norm_eps=fields.get("rms_norm_eps", EPS.get(kind, 1e-6)),
        rope=rope,
        sliding_windows=_windows(path, kind, fields, layers),
        qkv_bias=biased or kind == "qwen2",
        output_bias=biased,
        mlp_bias=bool(fields.get("mlp_bias", False)) and kind in ("llama", "deepseek_v2"),
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
        bos_token_id=fields.get("bos_token_id"),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        mixture=mixture_config(path, fields),
        latent=latent,
        unused_layers=fields.get("num_nextn_predict_layers", 1) if kind == "deepseek_v3" else 0,
    )


def _cached(kind: str, fields: dict[str, Any], latent: LatentConfig | None) -> tuple[int, int]:
    """-> heads of KV that the cache holds, and their dimension."""
    if latent is not None:
        return 1, latent.rank + latent.rotary_dim
    heads = fields["num_attention_heads"]
    kv_heads = fields.get("num_key_value_heads", KV_HEADS.get(kind)) or heads
    return kv_heads, fields.get("head_dim") or (128 if kind == "qwen3" else fields["hidden_size"] // heads)


def _context(fields: dict[str, Any]) -> int:
    tokens: int = fields.get("max_position_embeddings", CONTEXT[fields["model_type"]])
    return tokens


def _generation(directory: Path) -> dict[str, Any]:
    path = directory / "generation_config.json"
    fields = read_json(path) if path.exists() else {}
    check(path, fields)
    return fields


def _refuse_unsupported(path: Path, kind: str, fields: dict[str, Any]) -> None:
    if kind not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{path}: model_type {kind!r} is not supported; {', '.join((*ARCHITECTURES, *SEEING))} are"
        )
    named = fields.get("architectures") or [ARCHITECTURES[kind]]
    if named != [ARCHITECTURES[kind]]:
        raise UnsupportedModel(f"{path}: architectures {named} is not supported; {ARCHITECTURES[kind]} is")
    for name, neutral in NEUTRAL:
        if fields.get(name, neutral) != neutral:
            raise UnsupportedModel(f"{path}: {name} = {fields[name]!r} is not supported")


def _windows(path: Path, kind: str, fields: dict[str, Any], layers: int) -> tuple[int | None, ...]:
    """Mistral, Mixtral and Qwen3-MoE slide in every layer, if at all, other Qwen in those that `layer_types` or
    `max_window_layers` say, Llama and DeepSeek in none."""
    if kind in ("llama", "deepseek_v2", "deepseek_v3"):
        return (None,) * layers
    if kind in ("mistral", "mixtral"):
        return (fields.get("sliding_window", 4096 if kind == "mistral" else None),) * layers
    window = fields.get("sliding_window", 4096) if fields.get("use_sliding_window") else None
    if kind == "qwen3_moe":
        return (window,) * layers
    first = fields.get("max_window_layers", 28) if window else layers
    types = fields.get("layer_types") or ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    for name in types:
        if name not in ("full_attention", "sliding_attention"):
            raise UnsupportedModel(
                f"{path}: layer_types has {name!r}; full_attention and sliding_attention are supported"
            )
    if len(types) != layers:
        raise ModelFileCorrupt(f"{path}: layer_types names {len(types)} layers, num_hidden_layers is {layers}")
    return tuple(window if name == "sliding_attention" else None for name in types)
