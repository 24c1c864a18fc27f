"""How many patches an image gets, from its size: as transformers' processors make them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.idefics3.image_processing_pil_idefics3 import (
    Idefics3ImageProcessorPil,
    get_resize_output_image_size,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from tercet.errors import InvalidRequest, ModelFileCorrupt, ModelFileMissing, UnsupportedModel
from tercet.models.sources import load_config
from tercet.models.vision.processor import ImageProcessor
from tercet.models.vision.sizes import ImageSizes, processor_settings
from tests.unit.test_models_vision import FAMILIES, pictures, saved, spec

SIDES = st.integers(1, 6000) | st.integers(1, 80)
HERE = Path("here")


@pytest.fixture(scope="module", params=["qwen2.5-vl", "qwen3-vl", "idefics3", "smolvlm gelu"])
def model(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    saved(request.param, directory)
    return directory, load_config(spec(directory)).vision


def test_of_real_pictures(model):
    directory, config = model
    sizes, processor = ImageSizes(config, processor_settings(directory), directory), ImageProcessor(directory, config)
    for picture in pictures(4):
        assert processor.patches(picture).grid == sizes.grid(*picture.size)


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    found = {}
    for name in ("qwen2.5-vl", "idefics3"):
        directory = tmp_path_factory.mktemp("model")
        FAMILIES[name]().save_pretrained(directory)
        found[name] = load_config(spec(directory)).vision
    return found


@given(SIDES, SIDES, st.sampled_from([(64, 4096), (3136, 1003520), (10000, 20000)]))
def test_qwen_of_any_size(configs, width, height, bounds):
    settings = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": bounds[0], "longest_edge": bounds[1]}}
    sizes = ImageSizes(configs["qwen2.5-vl"], settings, HERE)
    if max(width, height) / min(width, height) > 200:
        with pytest.raises(InvalidRequest, match="200 times"):
            sizes.grid(width, height)
        return
    rows, columns = smart_resize(height, width, 8, *bounds)
    assert sizes.grid(width, height) == (1, rows // 4, columns // 4)
    old = {"patch_size": 4, "merge_size": 2, "min_pixels": bounds[0], "max_pixels": bounds[1]}
    assert ImageSizes(configs["qwen2.5-vl"], old, HERE).grid(width, height) == sizes.grid(width, height)


def blank(height, width):
    """An image that takes no memory."""
    return np.broadcast_to(np.uint8(0), (3, height, width))


def cut(settings, width, height):
    """What the processor does with the pixels, without them. -> tiles, rows, columns."""
    processor = Idefics3ImageProcessorPil(**settings)
    processor.resize = lambda image, size, resample=None: blank(size.height, size.width)
    resized = blank(*get_resize_output_image_size(blank(height, width), settings["size"]["longest_edge"]))
    whole = processor.resize_for_vision_encoder(resized, 24)
    frames, rows, columns = processor.split_images(whole, {"longest_edge": 24})
    return len(frames), rows, columns


@given(SIDES, SIDES, st.sampled_from([24, 48, 72, 96, 1456]))
def test_idefics3_of_any_size(configs, width, height, longest):
    settings = {"size": {"longest_edge": longest}, "max_image_size": {"longest_edge": 24}}
    sizes = ImageSizes(configs["idefics3"], settings, HERE)
    count, rows, columns = cut(settings, width, height)
    assert sizes.tiles(width, height) == (rows, columns)
    assert sizes.grid(width, height) == (count, 6, 6)
    unsplit = ImageSizes(configs["idefics3"], settings | {"do_image_splitting": False}, HERE)
    assert (unsplit.tiles(width, height), unsplit.grid(width, height)) == ((0, 0), (1, 6, 6))


@pytest.mark.parametrize(
    ("name", "settings", "error", "told"),
    [
        ("qwen2.5-vl", {"patch_size": 14}, ModelFileCorrupt, "patch_size of the image processor is 14"),
        ("qwen2.5-vl", {"patch_size": 4, "merge_size": 3}, ModelFileCorrupt, "merge_size"),
        ("qwen2.5-vl", {"patch_size": 4, "size": 7}, ModelFileCorrupt, "sizes cannot be read"),
        ("qwen2.5-vl", {"patch_size": 4, "do_resize": False}, UnsupportedModel, "do_resize"),
        ("idefics3", {"max_image_size": {"longest_edge": 364}}, ModelFileCorrupt, "max_image_size"),
        ("idefics3", {"max_image_size": {}}, ModelFileCorrupt, "sizes cannot be read"),
        ("idefics3", {"do_normalize": None}, UnsupportedModel, "do_normalize"),
    ],
)
def test_what_is_not_right_is_named(configs, name, settings, error, told):
    with pytest.raises(error, match=told):
        ImageSizes(configs[name], settings, HERE)


def test_settings_stand_in_either_file(tmp_path):
    with pytest.raises(ModelFileMissing, match="preprocessor_config"):
        processor_settings(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"image_processor": {"patch_size": 3}}')
    assert processor_settings(tmp_path) == {"patch_size": 3}
    Qwen2VLImageProcessorPil(patch_size=5).save_pretrained(tmp_path / "other")
    assert processor_settings(tmp_path / "other")["patch_size"] == 5
