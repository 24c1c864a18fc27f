"""The config of a model in a Hugging Face directory (config.json, generation_config.json). Imports no torch.

Fields and defaults are those of transformers' LlamaConfig, MistralConfig, Qwen2Config and Qwen3Config, both in the
style of transformers 5 (`rope_parameters`) and before (`rope_theta`, `rope_scaling`).
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from tercet.errors import ModelFileCorrupt, ModelFileMissing, UnsupportedModel
from tercet.models.config import ModelConfig, RopeConfig
from tercet.models.config_fields import check
from tercet.models.vision.config_hf import ARCHITECTURES as SEEING
from tercet.models.vision.config_hf import text_fields, vision_config

ARCHITECTURES = {  # model_type -> the one class of it that is run
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
NEUTRAL = (  # fields that change results, with what leaves them as they are
    *(("hidden_act", "silu"), ("quantization_config", None), ("compression_config", None)),
    *(("auto_map", None), ("transformers_weights", None), ("is_causal", True)),
)
CONTEXT = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}  # where the file does not say
KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}  # where the file does not say; null, or llama: as many as heads
ROPE_FIELDS = {  # kind -> what its parameters may be, beside rope_theta and partial_rotary_factor
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
        *("attention_factor", "mscale", "mscale_all_dim", "truncate"),
    },
}


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
    biased = bool(fields.get("attention_bias", False)) and kind in ("llama", "qwen3")
    eos = generation.get("eos_token_id", fields.get("eos_token_id"))
    return ModelConfig(
        architecture=kind,
        vocab_size=fields["vocab_size"],
        hidden_size=hidden,
        intermediate_size=fields["intermediate_size"],
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=fields.get("num_key_value_heads", KV_HEADS.get(kind)) or heads,
        head_dim=fields.get("head_dim") or (128 if kind == "qwen3" else hidden // heads),
        max_context=min(max_context, _context(fields)),
        rms_norm_eps=fields.get("rms_norm_eps", 1e-6),
        rope=_rope(path, fields),
        sliding_windows=_windows(path, kind, fields, layers),
        qkv_bias=biased or kind == "qwen2",
        output_bias=biased,
        mlp_bias=bool(fields.get("mlp_bias", False)) and kind == "llama",
        qk_norm=kind == "qwen3",
        tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
        bos_token_id=fields.get("bos_token_id"),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
    )


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
    """Mistral slides in every layer, Qwen in those that `layer_types` or `max_window_layers` say, Llama in none."""
    if kind == "llama":
        return (None,) * layers
    if kind == "mistral":
        return (fields.get("sliding_window", 4096),) * layers
    window = fields.get("sliding_window", 4096) if fields.get("use_sliding_window") else None
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


def _rope(path: Path, fields: dict[str, Any]) -> RopeConfig:
    given = dict(fields.get("rope_scaling") or fields.get("rope_parameters") or {})
    if any(isinstance(value, dict) for value in given.values()):
        raise UnsupportedModel(f"{path}: rope_parameters that differ between kinds of layer are not supported")
    check(path, given)
    kind = given.pop("rope_type", None) or given.get("type") or "default"
    given.pop("type", None)
    sections, interleaved = tuple(given.pop("mrope_section", ())), bool(given.pop("mrope_interleaved", False))
    if kind == "mrope":
        kind = "default"
    theta = float(given.pop("rope_theta", None) or fields.get("rope_theta") or 10000.0)
    partial = given.pop("partial_rotary_factor", fields.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        raise UnsupportedModel(f"{path}: partial_rotary_factor = {partial} is not supported")
    if kind not in ROPE_FIELDS:
        raise UnsupportedModel(f"{path}: rope type {kind!r} is not supported; {', '.join(ROPE_FIELDS)} are")
    if kind == "default":
        return RopeConfig(theta, sections=sections, interleaved=interleaved)
    if sections:
        raise UnsupportedModel(f"{path}: rope type {kind!r} with mrope_section is not supported")
    if unknown := set(given) - ROPE_FIELDS[kind]:
        raise UnsupportedModel(f"{path}: rope {kind} has the unknown parameter {min(unknown)!r}")
    if kind == "linear":
        return RopeConfig(theta, "linear", float(given["factor"]))
    original = fields.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
    return _stretched(kind, theta, original or _context(fields), given, fields)


def _stretched(kind: str, theta: float, original: int, given: dict[str, Any], fields: dict[str, Any]) -> RopeConfig:
    if kind == "llama3":
        low, high = float(given["low_freq_factor"]), float(given["high_freq_factor"])
        return RopeConfig(theta, "llama3", float(given["factor"]), original, low, high)
    factor = float(given.get("factor") or _context(fields) / original)
    return RopeConfig(
        theta,
        "yarn",
        factor,
        original,
        beta_fast=float(given.get("beta_fast") or 32),
        beta_slow=float(given.get("beta_slow") or 1),
        truncate=bool(given.get("truncate", True)),
        attention_factor=_yarn_attention_factor(factor, given),
    )


def _yarn_attention_factor(factor: float, given: dict[str, Any]) -> float:
    """Equation 22 of arXiv:2309.00071, with the two scales that DeepSeek added."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    if given.get("mscale") and given.get("mscale_all_dim"):
        return scale(given["mscale"]) / scale(given["mscale_all_dim"])
    return scale(1.0)
