"""Model files: small GGUFs of every architecture against transformers, and files that are cut, wrong or missing."""

from __future__ import annotations

import contextlib

import gguf
import numpy as np
import pytest
import torch
import transformers

from tercet.errors import ModelFileCorrupt, ModelFileMissing, UnsupportedModel
from tercet.models.gguf_file import GgufFile
from tercet.models.sources import load_config, load_model, load_tokenizer, locate, served_name
from tercet.spec import ModelSpec
from tests.unit.test_models_families import LLAMA3, SMALL, YARN, prefilled

SIZES = SMALL | {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 96}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{n}_proj": f"attn_{n}" for n in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{n}_norm": f"attn_{n}_norm" for n in "qk"},
    **{f"mlp.{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")},
}
Kind = gguf.GGMLQuantizationType


def gguf_name(name):
    if not name.startswith("model.layers."):
        return {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[
            name[:-7]
        ] + ".weight"
    _, _, layer, *part, kind = name.split(".")
    return f"blk.{layer}.{LAYER_NAMES['.'.join(part)]}.{kind}"


def interleaved(weight, head_dim):
    """As llama.cpp's converter stores llama's query and key rows: rotary pairs as neighbours."""
    halves = weight.reshape(-1, 2, head_dim // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, kind=Kind.F32, arch=None, more=lambda writer: None, **options):
    """The model as a GGUF; its matrices quantised, and the model's own weights set to what that made of them."""
    config = model.config
    arch = arch or config.model_type
    writer = gguf.GGUFWriter(path, arch, **options)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim if hasattr(config, "head_dim") else 16)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_eos_token_id(7)
    more(writer)
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        if values.ndim == 2:
            packed = gguf.quantize(values, kind)
            values = gguf.dequantize(packed, kind)
            parameter.data.copy_(torch.from_numpy(values))
        if arch == "llama" and (".q_proj" in name or ".k_proj" in name):
            values = interleaved(values, config.head_dim)
        stored = gguf.quantize(values, kind) if values.ndim == 2 else values
        writer.add_tensor(gguf_name(name), stored, raw_dtype=kind if values.ndim == 2 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def small(config_class, **options):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**SIZES | options)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def compare(path, model):
    loaded = load_model(ModelSpec(source=str(path), dtype="float32"))
    ids = torch.randint(0, SIZES["vocab_size"], (70,))
    with torch.no_grad():
        expected = model(ids.unsqueeze(0)).logits[0]
    torch.testing.assert_close(prefilled(loaded, ids, [50, 20]), expected, rtol=1e-4, atol=2e-4)
    return loaded


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_1])
def test_quantisations(kind, tmp_path):
    model = small(transformers.LlamaConfig)
    write_gguf(tmp_path / "m.gguf", model, kind)
    assert compare(tmp_path / "m.gguf", model).config.eos_token_ids == (7,)


@pytest.mark.parametrize(
    "model",
    [
        small(transformers.LlamaConfig, tie_word_embeddings=True, attention_bias=True),
        small(transformers.Qwen2Config),
        small(transformers.Qwen3Config, head_dim=32),
    ],
    ids=lambda model: model.config.model_type,
)
def test_architectures(model, tmp_path):
    write_gguf(tmp_path / "m.gguf", model)
    compare(tmp_path / "m.gguf", model)


def test_yarn(tmp_path):
    def more(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(YARN["factor"])
        writer.add_rope_scaling_orig_ctx_len(YARN["original_max_position_embeddings"])

    model = small(transformers.Qwen2Config, rope_parameters=YARN)
    write_gguf(tmp_path / "m.gguf", model, more=more)
    compare(tmp_path / "m.gguf", model)


def test_llama3_rope_is_stored_as_factors(tmp_path):
    def more(writer):
        """Each frequency's divisor, by Llama 3.1's published rule."""
        wavelength = 2 * np.pi * 500.0 ** (np.arange(0, 16, 2) / 16)
        smooth = np.clip((64 / wavelength - 1) / (4 - 1), 0, 1)
        writer.add_tensor("rope_freqs.weight", (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32))

    model = small(transformers.LlamaConfig, rope_parameters=LLAMA3)
    write_gguf(tmp_path / "m.gguf", model, more=more)
    compare(tmp_path / "m.gguf", model)


@pytest.mark.parametrize(
    ("told", "more"),
    [
        ("expert_count", lambda writer: writer.add_expert_count(8)),
        ("longrope", lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)),
        ("rope.dimension_count", lambda writer: writer.add_rope_dimension_count(8)),
        ("attention.scale", lambda writer: writer.add_attention_scale(0.5)),
        ("mystery", lambda writer: writer.add_tensor("blk.0.mystery.weight", np.ones(4, np.float32))),
    ],
)
def test_refused_by_name(told, more, tmp_path):
    write_gguf(tmp_path / "m.gguf", small(transformers.LlamaConfig), more=more)
    with pytest.raises(UnsupportedModel, match=told):
        load_model(ModelSpec(source=str(tmp_path / "m.gguf")))


def test_unknown_architecture(tmp_path):
    write_gguf(tmp_path / "m.gguf", small(transformers.LlamaConfig), arch="gemma3")
    with pytest.raises(UnsupportedModel, match="gemma3"):
        load_config(ModelSpec(source=str(tmp_path / "m.gguf")))


class TestCutGguf:
    """The embedded model's file, cut. Its header ends after 1.9 MB of 98 MB."""

    @pytest.mark.parametrize("size", [0, 3, 10, 24, 100, 5_000, 400_000, 1_000_000, 1_800_000])
    def test_in_the_header(self, size, tmp_path):
        self.cut(tmp_path / "m.gguf", size)
        for load in (load_config, load_tokenizer, load_model):
            with pytest.raises(ModelFileCorrupt, match=r"m\.gguf"):
                load(ModelSpec(source=str(tmp_path / "m.gguf")))

    @pytest.mark.parametrize("size", [2_500_000, 98_362_431])
    def test_in_the_tensors(self, size, tmp_path):
        self.cut(tmp_path / "m.gguf", size)
        with pytest.raises(ModelFileCorrupt, match="cut short"):
            load_model(ModelSpec(source=str(tmp_path / "m.gguf")))

    def cut(self, path, size):
        with locate(ModelSpec()).open("rb") as whole:
            path.write_bytes(whole.read(size))


def test_any_byte_of_a_header_may_be_wrong(tmp_path):
    """A flipped byte is a named error or an odd value, never a hang or another exception."""
    path = tmp_path / "m.gguf"
    write_gguf(path, small(transformers.LlamaConfig))
    whole = bytearray(path.read_bytes())
    header = min(tensor.offset for tensor in GgufFile(path).tensors.values())
    for at in range(0, header, 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with contextlib.suppress(ModelFileCorrupt, UnsupportedModel):
            load_config(ModelSpec(source=str(path)))


class TestDirectory:
    @pytest.fixture
    def directory(self, tmp_path):
        small(transformers.LlamaConfig).save_pretrained(tmp_path)
        return tmp_path

    @pytest.mark.parametrize("keep", [0, 5, 500, 50_000, -1])
    def test_cut_safetensors(self, keep, directory):
        path = directory / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(ModelFileCorrupt, match=r"model\.safetensors"):
            load_model(ModelSpec(source=str(directory)))

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
    def test_missing_file(self, name, directory):
        (directory / name).unlink()
        with pytest.raises(ModelFileMissing, match=name):
            load_model(ModelSpec(source=str(directory)))

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_type": "llama"}', "\xff"])
    def test_wrong_config(self, text, directory):
        (directory / "config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(ModelFileCorrupt, match=r"config\.json"):
            load_config(ModelSpec(source=str(directory)))

    def test_weights_of_another_shape(self, directory):
        other = small(transformers.LlamaConfig, intermediate_size=32).config
        other.architectures = ["LlamaForCausalLM"]
        other.save_pretrained(directory)
        with pytest.raises(ModelFileCorrupt, match=r"gate_proj.*96.*32"):
            load_model(ModelSpec(source=str(directory)))

    def test_a_lacking_weight(self, directory):
        model = small(transformers.LlamaConfig, num_hidden_layers=2)
        model.config.num_hidden_layers = 4
        model.save_pretrained(directory)
        with pytest.raises(ModelFileCorrupt, match=r"layers\.2"):
            load_model(ModelSpec(source=str(directory)))


@pytest.mark.parametrize("source", ["package:no-such-package", "/no/such.gguf", "./no/such/dir", "nonsense"])
def test_missing(source):
    for load in (load_config, load_tokenizer, load_model):
        with pytest.raises(ModelFileMissing, match=source.split(":")[-1]):
            load(ModelSpec(source=source))


def test_package_without_a_model():
    with pytest.raises(ModelFileMissing, match=r"no \.gguf"):
        locate(ModelSpec(source="package:numpy"))


def test_hub_without_a_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelFileMissing, match="hub"):
        load_model(ModelSpec(source="nobody/no-such-model"))


def test_served_names(tmp_path):
    for source, name in (
        ("/models/Qwen3-0.6B-Q8_0.gguf", "qwen3-0.6b"),
        ("/models/tiny.gguf", "tiny"),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        (str(tmp_path), tmp_path.name),
    ):
        assert served_name(ModelSpec(source=source)) == name
    assert served_name(ModelSpec(served_name="mine")) == "mine"
