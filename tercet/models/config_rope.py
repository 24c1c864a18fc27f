"""What config.json says of rotary position embedding, in the style of transformers 5 (`rope_parameters`) and before
(`rope_theta`, `rope_scaling`). Imports no torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tercet.errors import UnsupportedModel
from tercet.models.config import RopeConfig
from tercet.models.config_fields import check

ROPE_FIELDS = {  # kind -> what its parameters may be, beside rope_theta and partial_rotary_factor
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
        *("attention_factor", "mscale", "mscale_all_dim", "truncate"),
    },
}


def rope_fields(fields: dict[str, Any]) -> dict[str, Any]:
    return dict(fields.get("rope_scaling") or fields.get("rope_parameters") or {})


def rope_config(path: Path, fields: dict[str, Any], context: int, theta: float) -> RopeConfig:
    """context, theta: the model's own context, and what it has where the file does not say.

    Raises UnsupportedModel naming what cannot be run."""
    given = rope_fields(fields)
    if any(isinstance(value, dict) for value in given.values()):
        raise UnsupportedModel(f"{path}: rope_parameters that differ between kinds of layer are not supported")
    check(path, given)
    kind = given.pop("rope_type", None) or given.get("type") or "default"
    given.pop("type", None)
    sections, interleaved = tuple(given.pop("mrope_section", ())), bool(given.pop("mrope_interleaved", False))
    if kind == "mrope":
        kind = "default"
    theta = float(given.pop("rope_theta", None) or fields.get("rope_theta") or theta)
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
    return _stretched(kind, theta, original or context, given, context)


def _stretched(kind: str, theta: float, original: int, given: dict[str, Any], context: int) -> RopeConfig:
    if kind == "llama3":
        low, high = float(given["low_freq_factor"]), float(given["high_freq_factor"])
        return RopeConfig(theta, "llama3", float(given["factor"]), original, low, high)
    factor = float(given.get("factor") or context / original)
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
    """Equation 22 of arXiv:2309.00071, with the two weights that DeepSeek added."""
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    if given.get("mscale") and given.get("mscale_all_dim"):
        return yarn_scale(factor, given["mscale"]) / yarn_scale(factor, given["mscale_all_dim"])
    return yarn_scale(factor, 1.0)


def yarn_scale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
