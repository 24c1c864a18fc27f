"""Files of models with mixtures of experts and latent attention: how they may say the same, and what is refused."""

from __future__ import annotations

import weakref

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2MLP

from tercet.errors import ModelFileCorrupt, UnsupportedModel
from tercet.models.sources import load_config
from tercet.models.weights import SafetensorsWeights
from tercet.spec import ModelSpec
from tests.unit.test_models_families import saved
from tests.unit.test_models_files import small, write_gguf
from tests.unit.test_models_moe import (
    DEEPSEEK,
    FAMILIES,
    V2,
    fields_of,
    loaded,
    same_logits,
    saved_with_bias,
    write_fields,
)

# ---- how files may say the same

OPTIONAL = (  # fields that transformers has a default for
    *("rms_norm_eps", "num_key_value_heads", "sliding_window", "use_sliding_window", "attention_bias", "mlp_bias"),
    *("norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", "topk_method", "n_group", "topk_group"),
    *("n_shared_experts", "first_k_dense_replace", "routed_scaling_factor", "rope_interleave", "rope_parameters"),
    *("max_position_embeddings", "tie_word_embeddings", "num_nextn_predict_layers", "head_dim", "q_lora_rank"),
)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("name", OPTIONAL)
def test_a_field_that_is_not_there_has_the_default_of_transformers(kind, name, tmp_path):
    config = transformers.AutoConfig.for_model(kind, num_experts_per_tok=4)  # DeepSeek-V2's has no default
    config.save_pretrained(tmp_path)
    fields, spec = fields_of(tmp_path), ModelSpec(source=str(tmp_path), max_context=1 << 30)
    whole = load_config(spec)
    write_fields(tmp_path, {key: value for key, value in fields.items() if key != name})
    assert load_config(spec) == whole


def test_the_other_name_of_num_experts(tmp_path):
    reference = saved(FAMILIES["qwen3-moe"], tmp_path)
    fields = fields_of(tmp_path)
    write_fields(tmp_path, fields | {"num_experts": fields.pop("num_local_experts")})
    same_logits(tmp_path, reference)


PUBLISHED = {  # what DeepSeek's own files say, beside the sizes
    "rope_theta": 500.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.9,
    },
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "ep_size": 1,
    "moe_layer_freq": 1,
    "pretraining_tp": 1,
}


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("deepseek-v2", {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}),
        ("deepseek-v3", {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": 1}),
    ],
)
def test_a_config_as_it_was_published(name, more, tmp_path):
    saved_with_bias(FAMILIES[name], tmp_path)
    fields = fields_of(tmp_path) | PUBLISHED | more
    for field in ("rope_parameters", "qk_head_dim", "head_dim", "rope_interleave"):
        fields.pop(field, None)
    write_fields(tmp_path, fields)
    same_logits(tmp_path, transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval())


def test_every_other_layer_is_a_mixture(tmp_path):
    """moe_layer_freq, which DeepSeek's files have and transformers does not read."""
    torch.manual_seed(0)
    reference = transformers.AutoModelForCausalLM.from_config(V2(**DEEPSEEK | {"first_k_dense_replace": 0})).eval()
    reference.model.layers[1].mlp = DeepseekV2MLP(reference.config)
    torch.nn.init.normal_(reference.model.layers[1].mlp.down_proj.weight, std=0.3)
    reference.config.save_pretrained(tmp_path)
    save_file(reference.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    write_fields(tmp_path, fields_of(tmp_path) | {"moe_layer_freq": 2, "architectures": ["DeepseekV2ForCausalLM"]})
    same_logits(tmp_path, reference)


def test_layers_that_predict_further_tokens_are_not_read(tmp_path):
    """num_nextn_predict_layers: DeepSeek-V3's files have them behind the last layer."""
    reference = saved_with_bias(FAMILIES["deepseek-v3"], tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for number in (3, 4):
        save_file(weights | {f"model.layers.{number}.eh_proj.weight": torch.ones(2)}, tmp_path / "model.safetensors")
        if number == 3:
            same_logits(tmp_path, reference)
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.4\.eh_proj"):
        loaded(tmp_path)


def test_experts_are_read_one_at_a_time(tmp_path, monkeypatch):
    """So that a layer of experts is never held twice."""
    saved(FAMILIES["mixtral"], tmp_path)
    read, held = SafetensorsWeights.read, []

    def watched(self, name):
        weight = read(self, name)
        if ".experts." in name:
            assert all(ref() is None for ref in held)
            held.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(SafetensorsWeights, "read", watched)
    loaded(tmp_path)
    assert len(held) == 3 * 6 * 3


# ---- what is refused, by name

REFUSED = [
    ("deepseek-v2", "topk_method", "noaux_tc"),
    ("deepseek-v2", "scoring_func", "sigmoid"),
    ("deepseek-v2", "norm_topk_prob", True),
    ("deepseek-v2", "num_key_value_heads", 2),
    ("deepseek-v3", "topk_method", "greedy"),
    ("deepseek-v3", "scoring_func", "softmax"),
    ("deepseek-v3", "num_key_value_heads", 2),
    ("deepseek-v3", "quantization_config", {"quant_method": "fp8"}),
    ("deepseek-v3", "rope_parameters", {"rope_type": "longrope", "rope_theta": 1e4}),
    ("mixtral", "shared_expert_intermediate_size", 32),
    ("mixtral", "hidden_act", "gelu"),
    ("qwen3-moe", "moe_router_score", "sigmoid"),
    ("qwen3-moe", "num_expert_group", 2),
]


@pytest.mark.parametrize(("name", "field", "value"), REFUSED)
def test_refused_by_name(name, field, value, tmp_path):
    fields = FAMILIES[name].to_dict() | {"architectures": None, field: value}
    write_fields(tmp_path, fields)
    with pytest.raises(UnsupportedModel, match=value["rope_type"] if field == "rope_parameters" else field):
        load_config(ModelSpec(source=str(tmp_path)))


CORRUPT = [
    ("deepseek-v3", {"n_group": 3}, "n_group"),
    ("deepseek-v3", {"n_group": 8}, "n_group"),
    ("deepseek-v3", {"topk_group": 5}, "topk_group"),
    ("deepseek-v3", {"num_experts_per_tok": 5}, "num_experts_per_tok"),
    ("deepseek-v3", {"kv_lora_rank": 0}, "kv_lora_rank"),
    ("deepseek-v3", {"qk_rope_head_dim": "8"}, "qk_rope_head_dim"),
    ("deepseek-v2", {"num_experts_per_tok": None}, "num_experts_per_tok"),
    ("mixtral", {"num_local_experts": 1}, "num_experts_per_tok"),
    ("mixtral", {"num_local_experts": 2.5}, "num_local_experts"),
    ("qwen3-moe", {"mlp_only_layers": [-1]}, "mlp_only_layers"),
    ("qwen3-moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
]


@pytest.mark.parametrize(("name", "changed", "told"), CORRUPT)
def test_a_config_that_contradicts_itself(name, changed, told, tmp_path):
    write_fields(tmp_path, FAMILIES[name].to_dict() | {"architectures": None} | changed)
    with pytest.raises(ModelFileCorrupt, match=told):
        load_config(ModelSpec(source=str(tmp_path)))


@pytest.mark.parametrize("name", ["kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "n_routed_experts"])
def test_a_size_that_is_not_there(name, tmp_path):
    fields = FAMILIES["deepseek-v3"].to_dict()
    write_fields(tmp_path, {key: value for key, value in fields.items() if key not in (name, "architectures")})
    with pytest.raises(ModelFileCorrupt, match=name):
        load_config(ModelSpec(source=str(tmp_path)))


@pytest.mark.parametrize("odd", [7, 1])
def test_a_rotary_part_without_pairs(odd, tmp_path):
    saved_with_bias(FAMILIES["deepseek-v3"], tmp_path)
    write_fields(tmp_path, fields_of(tmp_path) | {"qk_rope_head_dim": odd})
    with pytest.raises(ModelFileCorrupt, match=f"{odd} dimensions"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("mixtral", "model.layers.2.block_sparse_moe.experts.3.w3.weight"),
        ("qwen3-moe", "model.layers.1.mlp.gate.weight"),
        ("deepseek-v3", "model.layers.2.mlp.gate.e_score_correction_bias"),
        ("deepseek-v3", "model.layers.2.mlp.shared_experts.up_proj.weight"),
        ("deepseek-v2", "model.layers.0.self_attn.kv_b_proj.weight"),
        ("deepseek-v2", "model.layers.0.self_attn.kv_a_layernorm.weight"),
    ],
)
def test_a_weight_that_is_missing_or_of_another_shape(name, tensor, tmp_path):
    saved_with_bias(FAMILIES[name], tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    whole = weights.pop(tensor)
    for changed in (weights, weights | {tensor: whole[1:].clone()}):
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(ModelFileCorrupt, match=tensor.replace(".", r"\.")):
            loaded(tmp_path)
    save_file(weights | {tensor: whole, f"{tensor}2": whole.clone()}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModel, match="2' has no place"):
        loaded(tmp_path)


@pytest.mark.parametrize("arch", ["qwen3moe", "deepseek2", "llama"])
def test_gguf_files_of_these_models(arch, tmp_path):
    """llama: Mixtral, of which a file says no more than how many experts there are."""
    more = {"more": lambda writer: writer.add_expert_count(8)} if arch == "llama" else {}
    write_gguf(tmp_path / "m.gguf", small(transformers.LlamaConfig), arch=arch, **more)
    with pytest.raises(UnsupportedModel, match="expert_count" if arch == "llama" else arch):
        load_config(ModelSpec(source=str(tmp_path / "m.gguf")))
