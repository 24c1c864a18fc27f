"""What config.json says of multi-head latent attention, in the words of transformers' DeepseekV2Config and
DeepseekV3Config. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tercet.errors import UnsupportedModel
from tercet.models.config import LatentConfig, RopeConfig
from tercet.models.config_rope import rope_fields, yarn_scale


def latent_config(path: Path, fields: dict[str, Any], rope: RopeConfig) -> LatentConfig:
    """Raises UnsupportedModel for keys and values that some heads share."""
    heads = fields["num_attention_heads"]
    if (kv_heads := fields.get("num_key_value_heads")) not in (None, heads):
        raise UnsupportedModel(
            f"{path}: num_key_value_heads = {kv_heads} is not supported; each of the {heads} heads has keys and values "
            "of its own"
        )
    plain, rotary = fields["qk_nope_head_dim"], fields["qk_rope_head_dim"]
    return LatentConfig(
        rank=fields["kv_lora_rank"],
        query_rank=fields.get("q_lora_rank", 1536),
        plain_dim=plain,
        rotary_dim=rotary,
        value_dim=fields["v_head_dim"],
        softmax_scale=(plain + rotary) ** -0.5 * _stretch(fields, rope),
        interleaved=fields["model_type"] == "deepseek_v2" or fields.get("rope_interleave", True) is not False,
    )


def _stretch(fields: dict[str, Any], rope: RopeConfig) -> float:
    """Of the softmax scale, for a context that YaRN stretched (arXiv:2309.00071, equation 22). cos and sin multiply the
    rotary part alone, so they have the ratio of the two weights, and the scale has the square of one."""
    weight = rope_fields(fields).get("mscale_all_dim") if rope.kind == "yarn" else None
    return yarn_scale(rope.factor, weight) ** 2 if weight else 1.0
