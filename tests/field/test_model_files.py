"""Whatever a model's files hold: logits equal to transformers', or a refusal that names what stands in the way."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tercet.errors import ModelError, ModelFileCorrupt, ModelFileMissing, UnsupportedModel
from tercet.models.sources import load_config, load_model
from tercet.spec import ModelSpec
from tests.unit.test_models_families import FAMILIES, SMALL, prefilled, saved

SHARD = "model.layers.1.mlp.up_proj.weight"


def change(directory, edit):
    """edit: of the dict of tensors of a directory with one file."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def renamed(rename):
    def edit(tensors):
        for name in list(tensors):
            tensors[rename(name)] = tensors.pop(name)

    return edit


def cast(dtype, part=""):
    def edit(tensors):
        for name in [n for n in tensors if part in n]:
            tensors[name] = tensors[name].to(dtype)

    return edit


def added(name, *shape):
    return lambda tensors: tensors.update({name: torch.rand(shape)})


def assert_same_logits(directory):
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    loaded = load_model(ModelSpec(source=str(directory), dtype="float32"))
    ids = torch.randint(0, SMALL["vocab_size"], (30,))
    with torch.no_grad():
        expected = reference(ids.unsqueeze(0)).logits[0]
    torch.testing.assert_close(prefilled(loaded, ids, [30]), expected, rtol=1e-4, atol=2e-4)


KINDS = ("llama", "mistral sliding", "qwen2", "qwen3 tied, bias")
RUN = {
    "as saved": lambda tensors: None,
    "without the prefix": renamed(lambda name: name.removeprefix("model.")),
    "some without the prefix": renamed(lambda name: name.removeprefix("model.") if ".1." in name else name),
    "frequencies": added("model.layers.0.self_attn.rotary_emb.inv_freq", 8),
    "float16": cast(torch.float16),
    "bfloat16": cast(torch.bfloat16),
    "float64": cast(torch.float64),
    "one of float64": cast(torch.float64, "model.norm"),
}


@pytest.mark.parametrize("edit", RUN)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_run(kind, edit, tmp_path):
    saved(FAMILIES[kind], tmp_path)
    change(tmp_path, RUN[edit])
    assert_same_logits(tmp_path)


@pytest.mark.parametrize("head", ["equal", "other"])
@pytest.mark.parametrize("kind", ["llama tied, biases, head_dim", "qwen3 tied, bias"])
def test_a_head_that_is_there_counts(kind, head, tmp_path):
    """Even if the config says that it is the embedding."""
    saved(FAMILIES[kind], tmp_path)

    def edit(tensors):
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = embedding.clone() if head == "equal" else torch.randn_like(embedding)

    change(tmp_path, edit)
    assert_same_logits(tmp_path)


REFUSED = {
    "lm_head.weight": lambda tensors: tensors.pop("lm_head.weight"),
    SHARD: lambda tensors: tensors.pop(SHARD),
    "layers.0.extra.weight": added("model.layers.0.extra.weight", 3),
    "layers.7.mlp.up_proj.weight": added("model.layers.7.mlp.up_proj.weight", 96, 64),
    "q_proj.bias": added("model.layers.0.self_attn.q_proj.bias", 64),
    "lm_head.bias": added("lm_head.bias", 131),
    "model.embed_tokens.weight": renamed(lambda name: f"language_model.{name}"),
    "input_layernorm.weight": renamed(lambda name: name.replace("norm.weight", "norm.gamma")),
    "lm_head.weight_scale": lambda tensors: tensors.update({f"{name}_scale": torch.ones(1) for name in list(tensors)}),
    "model.norm.weight' is": lambda tensors: tensors.update({"model.norm.weight": torch.ones(1, 64)}),
    "embed_tokens.weight' is": lambda tensors: tensors.update({"model.embed_tokens.weight": torch.ones(140, 64)}),
    "embed_tokens.weight' has dtype torch.float8": cast(torch.float8_e4m3fn, "embed"),
    "embed_tokens.weight' has dtype torch.int8": cast(torch.int8, "embed"),
    "twice, as 'norm.weight' and": added("norm.weight", 64),
}


@pytest.mark.parametrize("told", REFUSED)
def test_what_is_refused_by_its_name(told, tmp_path):
    saved(FAMILIES["llama"], tmp_path)
    change(tmp_path, REFUSED[told])
    with pytest.raises(ModelError, match=told):
        load_model(ModelSpec(source=str(tmp_path)))


class TestShards:
    @pytest.fixture
    def index(self, tmp_path):
        """-> the index's weight_map; what the test leaves in it is written."""
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"]).save_pretrained(
            tmp_path, max_shard_size="100KB"
        )
        self.directory, self.path = tmp_path, tmp_path / "model.safetensors.index.json"
        self.index = json.loads(self.path.read_text())
        return self.index["weight_map"]

    def written(self):
        self.path.write_text(json.dumps(self.index))
        return self.directory

    def test_a_tensor_in_another_file_than_said(self, index):
        index[SHARD] = next(file for file in index.values() if file != index[SHARD])
        assert_same_logits(self.written())

    def test_a_tensor_that_is_not_said(self, index):
        del index[SHARD]
        assert_same_logits(self.written())

    def test_a_tensor_that_is_not_there(self, index):
        index["model.layers.9.ghost.weight"] = index[SHARD]
        assert_same_logits(self.written())

    def test_a_tensor_in_two_files(self, index):
        for file in {*index.values()} - {index[SHARD]}:
            tensors = load_file(self.directory / file) | {SHARD: torch.randn(96, 64)}
            save_file(tensors, self.directory / file, metadata={"format": "pt"})
        assert_same_logits(self.written())

    def test_one_file_comes_before_an_index(self, index):
        tensors = {name: t for file in {*index.values()} for name, t in load_file(self.directory / file).items()}
        whole = {name: tensor * 1.5 for name, tensor in tensors.items()}
        save_file(whole, self.directory / "model.safetensors", metadata={"format": "pt"})
        assert_same_logits(self.written())

    def test_a_file_that_is_not_there(self, index):
        (self.directory / index[SHARD]).unlink()
        with pytest.raises(ModelFileMissing, match=index[SHARD]):
            load_model(ModelSpec(source=str(self.written())))

    def test_a_file_that_is_not_said(self, index):
        lost = index[SHARD]
        for name in [n for n, file in index.items() if file == lost]:
            del index[name]
        with pytest.raises(ModelFileCorrupt, match=r"has no tensor 'model\.layers\.1"):
            load_model(ModelSpec(source=str(self.written())))


@pytest.mark.parametrize("name", ["consolidated.safetensors", "model.fp16.safetensors", "pytorch_model.bin"])
def test_other_files_are_named(name, tmp_path):
    saved(FAMILIES["llama"], tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    with pytest.raises(ModelFileMissing, match=f"no model.safetensors.*{name}"):
        load_model(ModelSpec(source=str(tmp_path)))


def test_an_adapter_is_refused(tmp_path):
    saved(FAMILIES["llama"], tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match=r"adapter_config\.json"):
        load_model(ModelSpec(source=str(tmp_path)))


@pytest.mark.parametrize(("kind", "heads"), [("llama", 4), ("mistral full", 8), ("qwen2", 32)])
def test_fields_that_lack_are_as_in_transformers(kind, heads, tmp_path):
    saved(FAMILIES[kind], tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    lacking = ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "hidden_act", "eos_token_id")
    for name in (*lacking, "max_position_embeddings"):
        fields.pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ours, theirs = (
        load_config(ModelSpec(source=str(tmp_path), max_context=10**6)),
        transformers.AutoConfig.from_pretrained(tmp_path),
    )
    assert ours.num_kv_heads == (theirs.num_key_value_heads or theirs.num_attention_heads) == heads
    assert ours.max_context == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings


ODD = (None, "4", [4], {"a": 1}, 0, -1, 2.5, True, "", [], {}, float("nan"))
FIELDS = (
    "model_type",
    "architectures",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_size",
)
FIELDS += ("intermediate_size", "vocab_size", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters")
FIELDS += ("rope_scaling", "rope_theta", "partial_rotary_factor", "max_window_layers", "sliding_window", "layer_types")
FIELDS += ("use_sliding_window", "tie_word_embeddings", "eos_token_id", "bos_token_id", "hidden_act", "auto_map")


@pytest.mark.parametrize("kind", ["mistral sliding", "qwen2"])
@pytest.mark.parametrize("field", FIELDS)
def test_odd_values_are_read_or_refused_by_name(field, kind, tmp_path):
    saved(FAMILIES[kind], tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    for value in ODD:
        path.write_text(json.dumps(fields | {"use_sliding_window": kind == "qwen2", field: value}))
        for load in (load_config, load_model):
            with contextlib.suppress(ModelError):
                load(ModelSpec(source=str(tmp_path)))


ROPES = (5, "yarn", [1], {"rope_type": 5}, {"rope_type": ["x"]}, {"rope_theta": "x"}, {"rope_theta": [1]})
ROPES += ({"rope_type": "linear"}, {"rope_type": "linear", "factor": "2"}, {"rope_type": "yarn", "factor": "x"})
CORRUPT = [("rope_parameters", value) for value in ROPES]
CORRUPT += [("max_position_embeddings", None), ("num_hidden_layers", "4"), ("rms_norm_eps", None), ("model_type", [])]
CORRUPT += [("head_dim", "4"), ("head_dim", 15), ("num_key_value_heads", 3), ("num_hidden_layers", 10**12)]


@pytest.mark.parametrize(("field", "value"), CORRUPT)
def test_values_of_a_wrong_kind_are_named(field, value, tmp_path):
    saved(FAMILIES["llama"], tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ModelFileCorrupt, match=r"config\.json|heads"):
        load_model(ModelSpec(source=str(tmp_path)))


@pytest.mark.parametrize("value", [{}, "</s>", ["x"], [1, None], [1.5], True])
def test_ends_that_are_no_ids_are_refused(value, tmp_path):
    """An answer would never end there."""
    saved(FAMILIES["llama"], tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ModelFileCorrupt, match=r"generation_config\.json: eos_token_id"):
        load_config(ModelSpec(source=str(tmp_path)))


def test_attention_that_sees_what_follows_is_refused(tmp_path):
    saved(FAMILIES["llama"], tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"is_causal": True}))
    assert_same_logits(tmp_path)
    path.write_text(json.dumps(fields | {"is_causal": False}))
    with pytest.raises(UnsupportedModel, match="is_causal"):
        load_model(ModelSpec(source=str(tmp_path)))


def test_weights_in_a_file_of_another_name_are_refused(tmp_path):
    saved(FAMILIES["llama"], tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"transformers_weights": "other.safetensors"}))
    with pytest.raises(UnsupportedModel, match="transformers_weights"):
        load_model(ModelSpec(source=str(tmp_path)))
