"""The vision part of config.json: fields and defaults are those of transformers' Qwen2_5_VLConfig, Qwen3VLConfig,
Idefics3Config and SmolVLMConfig. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tercet.errors import ModelFileCorrupt, UnsupportedModel
from tercet.models.config_fields import check
from tercet.models.vision.config import Activation, VisionConfig

ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
ARCHITECTURES = {  # model_type -> the one class of it that is run
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
}
TEXT_TYPES = {  # the text model's model_type -> that of the family that it is
    "qwen2_5_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen3_vl_text": "qwen3",
}
MROPE = {  # model_type -> rope_theta and mrope_section where the file does not say
    "qwen2_5_vl": (1e6, [16, 24, 24]),
    "qwen3_vl": (5e5, [24, 20, 20]),
}


def text_fields(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of the text model alone, as if it were the only one. Before transformers 4.52 they lay beside
    `vision_config`."""
    inner = dict(fields.get("text_config") or fields)
    check(path, inner)
    for name in ("architectures", "vision_config"):
        inner.pop(name, None)
    inner["model_type"] = TEXT_TYPES.get(kind := inner.get("model_type", fields["model_type"]), kind)
    if "tie_word_embeddings" in fields:
        inner["tie_word_embeddings"] = fields["tie_word_embeddings"]
    if fields["model_type"] in MROPE:
        theta, sections = MROPE[fields["model_type"]]
        given = dict(inner.pop("rope_scaling", None) or inner.get("rope_parameters") or {})
        given = {"rope_theta": inner.get("rope_theta") or theta, "mrope_section": sections} | given
        inner["rope_parameters"] = given | {"mrope_interleaved": fields["model_type"] == "qwen3_vl"}
    return inner


def vision_config(path: Path, fields: dict[str, Any], out_size: int) -> VisionConfig:
    """Raises UnsupportedModel naming what cannot be run, ModelFileCorrupt for a field that is of a wrong kind."""
    kind, vision = fields["model_type"], dict(fields["vision_config"])
    check(path, vision)
    if (named := fields.get("architectures") or [ARCHITECTURES[kind]]) != [ARCHITECTURES[kind]]:
        raise UnsupportedModel(f"{path}: architectures {named} is not supported; {ARCHITECTURES[kind]} is")
    config = _qwen(path, kind, fields, vision) if kind.startswith("qwen") else _idefics3(path, fields, vision, out_size)
    if config.out_size != out_size:
        raise ModelFileCorrupt(
            f"{path}: out_hidden_size of vision_config is {config.out_size}, the text model's hidden_size is {out_size}"
        )
    if config.hidden_size % (config.num_heads * (4 if config.rope_theta else 1)):
        raise ModelFileCorrupt(
            f"{path}: vision_config: {config.num_heads} heads cannot share a hidden_size of {config.hidden_size}"
        )
    return config


def _activation(path: Path, name: str) -> Activation:
    if name not in ACTIVATIONS:
        raise UnsupportedModel(f"{path}: hidden_act {name!r} of vision_config is not supported")
    return ACTIVATIONS[name]


def _qwen(path: Path, kind: str, fields: dict[str, Any], vision: dict[str, Any]) -> VisionConfig:
    newer = kind == "qwen3_vl"
    patch, frames = vision.get("patch_size", 16 if newer else 14), vision.get("temporal_patch_size", 2)
    rope = vision.get("rope_parameters") or {}
    if rope.get("rope_type", "axial") != "axial":
        raise UnsupportedModel(f"{path}: rope type {rope['rope_type']!r} of vision_config is not supported")
    side = round(vision.get("num_position_embeddings", 2304) ** 0.5) if newer else 0
    if newer and side**2 != vision.get("num_position_embeddings", 2304):
        raise ModelFileCorrupt(f"{path}: num_position_embeddings of vision_config is no square")
    return VisionConfig(
        family="qwen3_vl" if newer else "qwen2_5_vl",
        hidden_size=vision["hidden_size"],
        intermediate_size=vision["intermediate_size"],
        num_layers=vision["depth"],
        num_heads=vision.get("num_heads", 16),
        patch=(vision.get("in_channels", 3), frames, patch, patch),
        merge=vision.get("spatial_merge_size", 2),
        out_size=vision["out_hidden_size"],
        activation=_activation(path, vision.get("hidden_act", "gelu_pytorch_tanh" if newer else "silu")),
        image_token=fields.get("image_token_id", 151655),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        positions=side,
        window=0 if newer else vision.get("window_size", 112),
        full_layers=() if newer else tuple(vision.get("fullatt_block_indexes", (7, 15, 23, 31))),
        deepstack_layers=tuple(vision.get("deepstack_visual_indexes", (8, 16, 24))) if newer else (),
    )


def _idefics3(path: Path, fields: dict[str, Any], vision: dict[str, Any], out_size: int) -> VisionConfig:
    patch, size = vision.get("patch_size", 32), vision.get("image_size", 224)
    merge = fields.get("scale_factor", 2)
    if size % patch or size // patch % merge:
        raise ModelFileCorrupt(
            f"{path}: image_size {size} of vision_config is not made of {merge} x {merge} patches of {patch}"
        )
    return VisionConfig(
        family="idefics3",
        hidden_size=vision.get("hidden_size", 1152),
        intermediate_size=vision.get("intermediate_size", 3072),
        num_layers=vision.get("num_hidden_layers", 12),
        num_heads=vision.get("num_attention_heads", 16),
        patch=(vision.get("num_channels", 3), patch, patch),
        merge=merge,
        out_size=out_size,
        activation=_activation(path, vision.get("hidden_act", "gelu_pytorch_tanh")),
        image_token=fields.get("image_token_id", 128257),
        norm_eps=vision.get("layer_norm_eps", 1e-6),
        positions=size // patch,
    )
