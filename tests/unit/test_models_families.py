"""Every family from a tiny random config: what `load_model` makes of the saved directory, against transformers."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from tercet.errors import UnsupportedModel
from tercet.models.batch import PrefillChunk, StepBatch
from tercet.models.sources import load_config, load_model
from tercet.spec import ModelSpec

BLOCK = 8
SMALL = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # sharp attention, so that a wrong mask or angle shows
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES = {
    "llama": transformers.LlamaConfig(**SMALL),
    "llama tied, biases, head_dim": transformers.LlamaConfig(
        **SMALL, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=24
    ),
    "llama linear": transformers.LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}
    ),
    "llama llama3": transformers.LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "llama yarn": transformers.LlamaConfig(**SMALL, rope_parameters=YARN),
    "qwen3 yarn, mscale": transformers.Qwen3Config(
        **SMALL, head_dim=32, rope_parameters=YARN | {"mscale": 0.7, "mscale_all_dim": 0.3, "beta_fast": 8.0}
    ),
    "mistral sliding": transformers.MistralConfig(**SMALL, sliding_window=11),
    "mistral full": transformers.MistralConfig(**SMALL, sliding_window=None),
    "qwen2": transformers.Qwen2Config(**SMALL),
    "qwen2 sliding": transformers.Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "qwen3 tied, bias": transformers.Qwen3Config(**SMALL, head_dim=32, tie_word_embeddings=True, attention_bias=True),
    "qwen3 layer_types": transformers.Qwen3Config(
        **SMALL,
        head_dim=16,
        use_sliding_window=True,
        sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}


def saved(config, directory, seed=0):
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():  # biases and norms begin as 0 and 1, which would hide a swap
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(directory)
    return model


def prefilled(loaded, ids, chunks):
    """Logits of every row of `ids`, computed in chunks of the given lengths."""
    config, blocks = loaded.config, -(-len(ids) // BLOCK)
    cache = torch.zeros(config.num_layers, blocks * 2, 2, BLOCK, config.num_kv_heads, config.head_dim)
    table = torch.randperm(blocks * 2)[:blocks]
    none, logits, start = torch.zeros(0, 0, dtype=torch.int64), [], 0
    for length in chunks:
        at = torch.arange(start, start + length)
        chunk = PrefillChunk(0, length, start + length, table[: -(-(start + length) // BLOCK)])
        slots = table[at // BLOCK] * BLOCK + at % BLOCK
        batch = StepBatch(ids[at], at, slots, 0, none, none.flatten(), (chunk,), torch.arange(length))
        logits.append(loaded.model.forward(batch, cache))
        start += length
    return torch.cat(logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits(name, tmp_path):
    reference = saved(FAMILIES[name], tmp_path)
    loaded = load_model(ModelSpec(source=str(tmp_path), dtype="float32"))
    ids = torch.randint(0, SMALL["vocab_size"], (90,))
    with torch.no_grad():
        expected = reference(ids.unsqueeze(0)).logits[0]
    assert (expected.std() > 0.1).all()
    for chunks in ([90], [33, 1, 40, 16]):
        torch.testing.assert_close(prefilled(loaded, ids, chunks), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_that_wants_no_logits(dtype, tmp_path):
    """A chunk that is not the prompt's last."""
    saved(FAMILIES["qwen3 tied, bias"], tmp_path)
    model = load_model(ModelSpec(source=str(tmp_path), dtype=dtype)).model
    cache = torch.zeros(3, 1, 2, BLOCK, 2, 32, dtype=model.dtype)
    none, at = torch.zeros(0, 0, dtype=torch.int64), torch.arange(5)
    batch = StepBatch(at, at, at, 0, none, none.flatten(), (PrefillChunk(0, 5, 5, torch.zeros(1).long()),), at[:0])
    assert model.forward(batch, cache).shape == (0, SMALL["vocab_size"])
    assert cache[:, 0, :, :5].abs().sum((1, 2, 3, 4)).gt(0).all()


def test_shards(tmp_path):
    """Weights in several files with an index, and stored in bfloat16."""
    stored = transformers.AutoModelForCausalLM.from_config(FAMILIES["qwen2"]).to(torch.bfloat16)
    stored.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    loaded = load_model(ModelSpec(source=str(tmp_path), dtype="float32"))
    ids = torch.randint(0, SMALL["vocab_size"], (20,))
    with torch.no_grad():
        expected = reference(ids.unsqueeze(0)).logits[0]
    torch.testing.assert_close(prefilled(loaded, ids, [20]), expected, rtol=1e-4, atol=2e-4)


def test_config_of_before_transformers_5(tmp_path):
    """rope_theta and rope_scaling with `type`, in place of rope_parameters."""
    saved(FAMILIES["llama linear"], tmp_path)
    new = load_config(ModelSpec(source=str(tmp_path)))
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    del fields["rope_parameters"]
    path.write_text(json.dumps(fields | {"rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 3.0}}))
    assert load_config(ModelSpec(source=str(tmp_path))) == new


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "gemma3"),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("hidden_act", "gelu"),
        ("quantization_config", {"quant_method": "gptq"}),
        ("auto_map", {"AutoModel": "code.py"}),
        ("partial_rotary_factor", 0.5),
        ("rope_parameters", {"rope_type": "longrope", "rope_theta": 1e4}),
        ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "wobble": 1}),
        ("rope_parameters", {"full_attention": {"rope_type": "default"}}),
    ],
)
def test_refused_by_name(field, value, tmp_path):
    fields = FAMILIES["llama"].to_dict() | {"architectures": ["LlamaForCausalLM"], field: value}
    if field == "partial_rotary_factor":
        del fields["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    told = value["rope_type"] if isinstance(value, dict) and "rope_type" in value and "wobble" not in value else field
    with pytest.raises(UnsupportedModel, match="wobble" if "wobble" in str(value) else told):
        load_config(ModelSpec(source=str(tmp_path)))


def test_layer_types_refused_by_name(tmp_path):
    fields = FAMILIES["qwen3 layer_types"].to_dict() | {"layer_types": ["chunked_attention"] * 3}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UnsupportedModel, match="chunked_attention"):
        load_config(ModelSpec(source=str(tmp_path)))


def test_a_weight_without_a_place_is_refused(tmp_path):
    saved(FAMILIES["qwen3 tied, bias"], tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"attention_bias": False}))
    with pytest.raises(UnsupportedModel, match=r"k_proj\.bias"):
        load_model(ModelSpec(source=str(tmp_path)))


def test_fingerprint_tells_models_apart(tmp_path):
    def fingerprint(seed, **options):
        saved(FAMILIES["llama"], tmp_path, seed)
        return load_model(ModelSpec(source=str(tmp_path), **options)).fingerprint

    first = fingerprint(0)
    assert fingerprint(0) == first
    assert len({first, fingerprint(1), fingerprint(0, dtype="float32"), fingerprint(0, max_context=100)}) == 4
