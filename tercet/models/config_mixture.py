"""What config.json says of a mixture of experts: Mixtral, Qwen3-MoE, DeepSeek-V2 and V3, each in its own words, as
transformers' configs have them. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tercet.errors import ModelFileCorrupt, UnsupportedModel
from tercet.models.config import MixtureConfig

ROUTING = ("expert", "moe", "rout", "topk", "group", "scor")  # what names of fields contain that are about routing
WITHOUT_EFFECT = {  # of those, the ones that change training, or where experts are computed, and no result
    *("router_aux_loss_coef", "output_router_logits", "router_jitter_noise", "aux_loss_alpha", "seq_aux", "ep_size"),
}
READ = {  # model_type -> of those, the ones that are read
    "mixtral": {"num_local_experts", "num_experts_per_tok"},
    "qwen3_moe": {
        *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
    },
    "deepseek_v2": {
        *("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts", "norm_topk_prob"),
        *("moe_layer_freq", "routed_scaling_factor", "n_group", "topk_group", "topk_method", "scoring_func"),
    },
}
READ["deepseek_v3"] = READ["deepseek_v2"]


def mixture_config(path: Path, fields: dict[str, Any]) -> MixtureConfig | None:
    """None: the model has no experts. Raises UnsupportedModel naming the field that cannot be run, ModelFileCorrupt
    for numbers that contradict each other."""
    kind = fields["model_type"]
    if kind not in READ:
        return None
    _refuse_unknown(path, fields, READ[kind])
    if kind == "mixtral":
        mixture = _mixtral(fields)
    elif kind == "qwen3_moe":
        mixture = _qwen3_moe(fields)
    else:
        mixture = _deepseek(path, fields)
    _check(path, mixture)
    return mixture if mixture.layers else None


def _refuse_unknown(path: Path, fields: dict[str, Any], read: set[str]) -> None:
    for name, value in fields.items():
        if any(word in name for word in ROUTING) and name not in read | WITHOUT_EFFECT and value is not None:
            raise UnsupportedModel(f"{path}: {name} = {value!r:.60} is not supported")


def _mixtral(fields: dict[str, Any]) -> MixtureConfig:
    return MixtureConfig(
        layers=tuple(range(fields["num_hidden_layers"])),
        experts=fields["num_local_experts"],
        top_k=fields.get("num_experts_per_tok", 2),
        intermediate_size=fields["intermediate_size"],
        normalise=True,
    )


def _qwen3_moe(fields: dict[str, Any]) -> MixtureConfig:
    experts = fields["num_experts"] if "num_experts" in fields else fields["num_local_experts"]
    step, dense = fields.get("decoder_sparse_step", 1), fields.get("mlp_only_layers") or ()
    sparse = [i for i in range(fields["num_hidden_layers"]) if i not in dense and (i + 1) % step == 0 and experts]
    return MixtureConfig(
        layers=tuple(sparse),
        experts=experts,
        top_k=fields.get("num_experts_per_tok", 8),
        intermediate_size=fields["moe_intermediate_size"],
        normalise=bool(fields.get("norm_topk_prob", False)),
    )


def _deepseek(path: Path, fields: dict[str, Any]) -> MixtureConfig:
    """V2 takes the best experts by softmax, of all or of the groups whose best expert is best; V3 by sigmoid and a
    bias, of the groups whose best two are best (arXiv:2412.19437, section 2.1.2)."""
    third = fields["model_type"] == "deepseek_v3"
    method = fields.get("topk_method") or ("noaux_tc" if third else "greedy")
    _refuse_others(path, "topk_method", method, ("noaux_tc",) if third else ("greedy", "group_limited_greedy"))
    score = "sigmoid" if third else "softmax"
    _refuse_others(path, "scoring_func", fields.get("scoring_func") or score, (score,))
    normalise = fields.get("norm_topk_prob", third)
    if not third:
        _refuse_others(path, "norm_topk_prob", normalise, (False, None))  # transformers does not normalise there
    layers, first, step = fields["num_hidden_layers"], fields.get("first_k_dense_replace"), fields.get("moe_layer_freq")
    first = (3 if third else 0) if first is None else first
    groups = fields.get("n_group", 8 if third else None) if method != "greedy" else 1
    middle = fields["moe_intermediate_size"]
    return MixtureConfig(
        layers=tuple(i for i in range(first, layers) if i % (step or 1) == 0),
        experts=fields["n_routed_experts"],
        top_k=fields["num_experts_per_tok"],
        intermediate_size=middle,
        shared_size=middle * (fields.get("n_shared_experts", 1 if third else 2) or 0),
        score="sigmoid" if third else "softmax",
        normalise=bool(normalise),
        scale=float(fields.get("routed_scaling_factor", 2.5 if third else 1.0)),
        groups=groups or 1,
        top_groups=(fields.get("topk_group", 4 if third else None) or 1) if method != "greedy" else 1,
        group_score="top2" if third else "max",
        choice_bias=third,
    )


def _refuse_others(path: Path, name: str, value: Any, supported: tuple[Any, ...]) -> None:
    if value not in supported:
        raise UnsupportedModel(f"{path}: {name} = {value!r:.60} is not supported; {', '.join(map(str, supported))} is")


def _check(path: Path, mixture: MixtureConfig) -> None:
    if not mixture.layers:
        return
    each = mixture.experts // mixture.groups
    if mixture.experts % mixture.groups or each < (2 if mixture.group_score == "top2" else 1):
        raise ModelFileCorrupt(f"{path}: {mixture.experts} experts cannot be divided into n_group = {mixture.groups}")
    if mixture.top_groups > mixture.groups:
        raise ModelFileCorrupt(f"{path}: topk_group = {mixture.top_groups} of n_group = {mixture.groups}")
    if mixture.top_k > mixture.top_groups * each:
        raise ModelFileCorrupt(
            f"{path}: num_experts_per_tok = {mixture.top_k}, and {mixture.top_groups * each} experts to choose from"
        )
