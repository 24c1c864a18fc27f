"""The committed tower (examples/shapes/model): ours equals transformers' modules on its weights; what is around it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Idefics3Config

from examples.shapes.pictures import HELD_OUT, seen
from examples.shapes.questions import QUESTIONS, answer, asked
from examples.train_shapes import TEMPLATE, Tower, pixels_of, save
from tercet.kernels.kinds import choose_kernels
from tercet.models.sources import load_config, load_tokenizer, load_vision
from tercet.models.vision.processor import ImageProcessor
from tercet.spec import ModelSpec

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples/shapes/model"


def spec(directory=MODEL, **more):
    return ModelSpec(**{"vision": str(directory), "dtype": "float32"} | more)


def reference(directory):
    """transformers' modules with the directory's weights."""
    tower = Tower(Idefics3Config(**json.loads((directory / "config.json").read_text())))
    weights = load_file(directory / "model.safetensors")
    tower.load_state_dict({name.removeprefix("model."): weight.float() for name, weight in weights.items()})
    return tower.eval()


def pictures(count):
    return [seen(HELD_OUT + i)[1] for i in range(count)]


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_embeddings_are_those_of_transformers(kernels):
    tower = load_vision(spec(), choose_kernels(kernels))
    processor = ImageProcessor(MODEL, tower.config)
    ours = tower.encode([processor.patches(image) for image in pictures(5)])
    modules = reference(MODEL)
    with torch.no_grad():
        expected = modules.connector(modules.vision_model(pixels_of(pictures(5))).last_hidden_state)
    assert expected.std() > 0.1
    torch.testing.assert_close(torch.cat(ours), expected, rtol=1e-3, atol=1e-3)


def test_pictures_of_any_size_become_what_the_training_saw():
    processor = ImageProcessor(MODEL, load_config(spec()).vision)
    for image in (*pictures(2), pictures(1)[0].resize((64, 64))):
        patches = processor.patches(image).values.view(4, 4, 2, 2, 3, 8, 8)
        pixels = patches.permute(4, 0, 2, 5, 1, 3, 6).reshape(1, 3, 64, 64)
        torch.testing.assert_close(pixels, pixels_of([image]), rtol=0, atol=1e-5)


def test_the_weights_are_small():
    assert (MODEL / "model.safetensors").stat().st_size <= 8 << 20


def test_a_text_has_the_prompt_that_the_model_knows():
    ours, own = load_tokenizer(spec()), load_tokenizer(ModelSpec())
    turns = [("system", "Be brief."), ("user", "Hello\n"), ("assistant", "Yes?"), ("user", "<empty_output>")]
    for messages in (turns, turns[1:]):
        chat = [{"role": role, "content": content} for role, content in messages]
        assert ours.encode_chat(chat) == own.encode_chat(chat)
    assert load_config(spec()).vision.image_token not in ours.encode_chat(chat)


def test_images_stand_before_the_text_of_their_message():
    parts = [{"type": "text", "text": "What is"}, {"type": "image"}, {"type": "text", "text": " it?"}]
    shown = load_tokenizer(spec()).apply_chat_template([{"role": "user", "content": parts}])
    assert shown.endswith("<|im_start|>user\n<empty_output>What is it?<|im_end|>\n<|im_start|>assistant\n")


def test_what_is_committed_is_what_the_example_writes(tmp_path):
    config = json.loads((MODEL / "config.json").read_text())
    save(reference(MODEL), config, "<empty_output>", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in MODEL.iterdir()}
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (MODEL / path.name).read_bytes(), path.name
    assert (MODEL / "chat_template.jinja").read_text() == TEMPLATE.replace("IMAGE", "<empty_output>")


def test_every_question_has_an_answer_about_every_scene():
    scenes = [seen(seed)[0] for seed in range(300)]
    for kind, words in QUESTIONS.items():
        answers = {answer(kind, scene) for scene in scenes}
        assert len(answers) > 6, kind
        assert all(each.endswith(".") for each in answers)
        assert not any("{" in asked(kind, at, scene) for at in range(len(words)) for scene in scenes)


@pytest.mark.slow  # it trains
def test_the_training_makes_a_tower_that_loads(tmp_path):
    """In its shortest form."""
    command = [sys.executable, "-m", "examples.train_shapes", "--note-steps", "1", "--tower-steps", "2"]
    done = subprocess.run([*command, "--out", tmp_path], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "written rightly, of 500 other pictures: number " in done.stdout
    assert load_vision(spec(tmp_path), choose_kernels("torch")).config == load_config(spec()).vision
