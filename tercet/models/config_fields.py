"""What the fields of config.json, generation_config.json and their rope_parameters must be. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tercet.errors import ModelFileCorrupt


def _is_count(value: Any, least: int = 1) -> bool:
    return type(value) is int and least <= value < 2**48


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(type(item) is kind for item in value)


Kind = tuple[str, Callable[[Any], bool]]
COUNT: Kind = ("a positive whole number", _is_count)
NUMBER: Kind = ("a number", _is_number)
FLAG: Kind = ("true or false", lambda value: isinstance(value, bool))
TEXT: Kind = ("a text", lambda value: isinstance(value, str))
OBJECT: Kind = ("an object", lambda value: isinstance(value, dict))
TEXTS: Kind = ("a list of texts", _is_list_of(str))
ID: Kind = ("a token's id", lambda value: type(value) is int)
IDS: Kind = ("a token's id or a list of them", lambda value: type(value) is int or _is_list_of(int)(value))
WHOLES: Kind = ("a list of whole numbers", lambda value: _is_list_of(int)(value) and all(0 <= i < 2**16 for i in value))
LAYERS: Kind = ("a whole number of layers", lambda value: _is_count(value, 0) and value < 2**16)

# What the fields that are read must be; a name with ? may be null as well.
FIELDS: dict[str, Kind] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"), COUNT),
    **dict.fromkeys(("num_key_value_heads?", "head_dim?", "original_max_position_embeddings?"), COUNT),
    "max_position_embeddings": COUNT,
    **dict.fromkeys(("depth", "num_heads", "patch_size", "temporal_patch_size", "spatial_merge_size"), COUNT),
    **dict.fromkeys(("in_channels", "num_channels", "image_size", "scale_factor", "window_size"), COUNT),
    **dict.fromkeys(("out_hidden_size", "num_position_embeddings"), COUNT),
    **dict.fromkeys(("fullatt_block_indexes", "deepstack_visual_indexes", "mrope_section"), WHOLES),
    **dict.fromkeys(("num_hidden_layers", "max_window_layers", "num_nextn_predict_layers"), LAYERS),
    "first_k_dense_replace?": LAYERS,
    **dict.fromkeys(("decoder_sparse_step", "n_routed_experts", "num_experts_per_tok"), COUNT),
    **dict.fromkeys(("moe_intermediate_size", "n_group?", "topk_group?", "moe_layer_freq?", "q_lora_rank?"), COUNT),
    **dict.fromkeys(("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), COUNT),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_shared_experts?"), ("a whole number", lambda value: _is_count(value, 0))
    ),
    "mlp_only_layers?": WHOLES,
    "sliding_window?": ("a whole number", lambda value: _is_count(value, 0)),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "rope_theta?", "partial_rotary_factor?"), NUMBER),
    "routed_scaling_factor": NUMBER,
    **dict.fromkeys(("factor?", "low_freq_factor?", "high_freq_factor?", "attention_factor?"), NUMBER),
    **dict.fromkeys(("beta_fast?", "beta_slow?", "mscale?", "mscale_all_dim?"), NUMBER),
    **dict.fromkeys(("attention_bias?", "mlp_bias?", "tie_word_embeddings?", "use_sliding_window?", "truncate?"), FLAG),
    **dict.fromkeys(("mrope_interleaved?", "norm_topk_prob?", "rope_interleave?"), FLAG),
    **dict.fromkeys(("model_type", "rope_type?", "type?", "topk_method?", "scoring_func?"), TEXT),
    **dict.fromkeys(("rope_parameters?", "rope_scaling?", "text_config?", "vision_config"), OBJECT),
    **dict.fromkeys(("architectures?", "layer_types?"), TEXTS),
    **dict.fromkeys(("bos_token_id?", "image_token_id"), ID),
    "eos_token_id?": IDS,
}


def check(path: Path, fields: dict[str, Any]) -> None:
    """Raises ModelFileCorrupt for a field that is of another kind than it must be."""
    for name, (words, fits) in FIELDS.items():
        key = name.removesuffix("?")
        value = fields.get(key)
        if key in fields and not (fits(value) or (value is None and name != key)):
            raise ModelFileCorrupt(f"{path}: {key} is {value!r:.60}, not {words}")
