"""Models that see, from tiny random configs: embeddings, logits and greedy tokens of ours against transformers'."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import vision_utils

from tercet.errors import ModelFileCorrupt, ModelFileMissing, UnsupportedModel
from tercet.kernels.kinds import Kernels, choose_kernels
from tercet.models.batch import ImageRows, PrefillChunk, StepBatch
from tercet.models.sources import load_config, load_model, load_vision
from tercet.models.vision import grid as geometry
from tercet.models.vision.grid import ImageSpan, rope_positions
from tercet.models.vision.processor import ImageProcessor
from tercet.spec import ModelSpec
from tests.triton_interpreter import DEVICE

BLOCK = 8
IMAGE = 120  # id of the token in whose place an embedding stands
TEXT = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
SPECIAL = {"image_token_id": IMAGE, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}
QWEN25 = {
    "depth": 3,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_heads": 3,
    "out_hidden_size": 64,
    "patch_size": 4,
}
QWEN3 = QWEN25 | {"num_position_embeddings": 36, "deepstack_visual_indexes": [0, 2], "initializer_range": 0.3}
SIGLIP = {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 24,
    "patch_size": 4,
    "initializer_range": 0.3,
}


def mrope(sections, theta=500.0):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, "mrope_section": sections}}


def idefics3(kind, **options):
    llama = TEXT | {"model_type": "llama"}
    return kind(text_config=llama, vision_config=SIGLIP | options, image_token_id=IMAGE, scale_factor=2)


FAMILIES = {
    "qwen2.5-vl": lambda: transformers.Qwen2_5_VLConfig(
        text_config=TEXT | mrope([2, 3, 3]),
        vision_config=QWEN25 | {"window_size": 24, "fullatt_block_indexes": [1], "initializer_range": 0.3},
        **SPECIAL,
    ),
    "qwen2.5-vl tied, other window": lambda: transformers.Qwen2_5_VLConfig(
        text_config=TEXT | mrope([1, 2, 5]),
        vision_config=QWEN25 | {"window_size": 16, "fullatt_block_indexes": [], "initializer_range": 0.3},
        tie_word_embeddings=True,
        **SPECIAL,
    ),
    "qwen3-vl": lambda: transformers.Qwen3VLConfig(
        text_config=TEXT | mrope([4, 2, 2]) | {"head_dim": 16}, vision_config=QWEN3, **SPECIAL
    ),
    "qwen3-vl no deepstack": lambda: transformers.Qwen3VLConfig(
        text_config=TEXT | mrope([4, 2, 2]) | {"head_dim": 16},
        vision_config=QWEN3 | {"deepstack_visual_indexes": []},
        **SPECIAL,
    ),
    "idefics3": lambda: idefics3(transformers.Idefics3Config),
    "smolvlm gelu": lambda: idefics3(transformers.SmolVLMConfig, hidden_act="gelu", image_size=32),
}
SIZES = [(40, 40), (33, 71), (97, 20), (16, 16)]  # of images, in pixels


def saved(name, directory):
    torch.manual_seed(0)
    config = FAMILIES[name]()
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    for at, parameter in model.named_parameters():  # biases and norms begin as 0 and 1, which would hide a swap
        if at.endswith("bias") or "norm" in at or "ln_q" in at:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(directory)
    if "qwen" in name:
        sizes = {"shortest_edge": 64, "longest_edge": 64 * 64}
        transformers.models.qwen2_vl.Qwen2VLImageProcessorPil(size=sizes, patch_size=4).save_pretrained(directory)
    else:
        tile = config.vision_config.image_size
        transformers.models.idefics3.Idefics3ImageProcessorPil(
            size={"longest_edge": 3 * tile}, max_image_size={"longest_edge": tile}
        ).save_pretrained(directory)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """-> transformers' model, and the directory."""
    directory = tmp_path_factory.mktemp("model")
    return saved(request.param, directory), directory


def pictures(count):
    random = np.random.default_rng(count)
    return [Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in SIZES[:count]]


def spec(directory):
    return ModelSpec(source=str(directory), dtype="float32")


def embeddings_of(reference, pixels):
    """transformers' embeddings of all images: [levels, tokens, E], from what its own processor makes of them."""
    if "image_grid_thw" not in pixels:
        return torch.stack([torch.cat(reference.model.get_image_features(**pixels).pooler_output)])
    out = reference.model.get_image_features(pixels["pixel_values"], pixels["image_grid_thw"])
    deeper = getattr(out, "deepstack_features", None) or []
    return torch.stack([torch.cat(list(level)) for level in (out.pooler_output, *deeper)])


def processed(directory, images):
    """By transformers' processor, as it is loaded by name."""
    processor = transformers.AutoImageProcessor.from_pretrained(directory, backend="pil")
    return {
        k: v
        for k, v in processor(images=[images] if not is_qwen(directory) else images, return_tensors="pt").items()
        if k in ("pixel_values", "pixel_attention_mask", "image_grid_thw")
    }


def is_qwen(directory):
    return "qwen" in json.loads((directory / "config.json").read_text())["model_type"]


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_embeddings(count, kernels, family):
    reference, directory = family
    tower = load_vision(spec(directory), choose_kernels(kernels))
    processor = ImageProcessor(directory, tower.config)
    images = pictures(count)
    with torch.no_grad():
        expected = embeddings_of(reference, processed(directory, images))
    assert expected[0].std() > 0.05
    given = [processor.patches(image) for image in images]
    together = tower.encode(given)
    torch.testing.assert_close(torch.cat(together, 1), expected, rtol=1e-4, atol=2e-4)
    for one, whole in zip(given, together, strict=True):
        assert whole.shape == (tower.config.levels, tower.config.tokens(one.grid), 64)
        torch.testing.assert_close(tower.encode([one])[0], whole, rtol=1e-4, atol=2e-4)


def prompt_of(counts, lead=5):
    """Text around and between images. -> ids, and where each image begins."""
    torch.manual_seed(1)
    ids, starts = [torch.randint(0, 119, (lead,))], []
    for i, count in enumerate(counts):
        starts.append(sum(map(len, ids)))
        ids += [torch.full((count,), IMAGE), torch.randint(0, 119, (i % 3 * 4 + 1,))]
    return torch.cat([*ids, torch.randint(0, 119, (3,))]), starts


class Decoder:
    """Our model over a paged cache: what the engine will do, by hand."""

    def __init__(self, loaded, positions, ids, embeddings):
        self.model, self.config = loaded.model, loaded.config
        self.table = torch.randperm(64)
        self.cache = torch.zeros(self.config.num_layers, 64, 2, BLOCK, self.config.num_kv_heads, self.config.head_dim)
        self.positions, self.ids, self.embeddings = positions, ids, embeddings
        self.layers_seen = []

    def chunk(self, start, length):
        """-> logits of each row."""
        at = torch.arange(start, start + length)
        ids = self.ids[at]
        rows = (ids == IMAGE).nonzero().flatten()
        first = int((self.ids[:start] == IMAGE).sum())
        images = ImageRows(rows, self.embeddings[:, first : first + len(rows)]) if len(rows) else None
        none = torch.zeros(0, 0, dtype=torch.int64)
        chunk = PrefillChunk(0, length, start + length, self.table[: -(-(start + length) // BLOCK)])
        slots, bounds = self.table[at // BLOCK] * BLOCK + at % BLOCK, torch.tensor([0, length, start + length])
        batch = StepBatch(
            ids, self.positions[..., at], slots, 0, none, none.flatten(), (chunk,), torch.arange(length), bounds, images
        )
        return self.model.forward(batch, self.cache, self.layers_seen.append)

    def decode(self, token, at, position):
        one = torch.tensor([at])
        slots = self.table[one // BLOCK] * BLOCK + one % BLOCK
        table, none = self.table[: at // BLOCK + 1].unsqueeze(0), torch.zeros(0, dtype=torch.int64)
        batch = StepBatch(
            torch.tensor([token]), torch.tensor([position]), slots, 1, table, one + 1, (), none.new_zeros(1)
        )
        return self.model.forward(batch, self.cache)[0]


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("count", [1, 3])
def test_logits_and_greedy_tokens(count, kernels, family):
    """An interleaved prompt, whole and in chunks that end within an image; then eight tokens, one by one."""
    reference, directory = family
    chosen = choose_kernels(kernels)
    tower = load_vision(spec(directory), chosen)
    processor, loaded = ImageProcessor(directory, tower.config), load_model(spec(directory), chosen)
    images = pictures(count)
    patches = [processor.patches(image) for image in images]
    encoded = tower.encode(patches)
    ids, starts = prompt_of([each.shape[1] for each in encoded])

    inputs = processed(directory, images)
    if is_qwen(directory):
        inputs["mm_token_type_ids"] = (ids == IMAGE).int().unsqueeze(0)
    with torch.no_grad():
        expected = reference(input_ids=ids.unsqueeze(0), **inputs).logits[0]
        greedy = reference.generate(
            input_ids=ids.unsqueeze(0),
            attention_mask=torch.ones(1, len(ids)).long(),
            max_new_tokens=8,
            do_sample=False,
            **inputs,
        )[0, len(ids) :]
    spans = [ImageSpan(start, each.grid) for start, each in zip(starts, patches, strict=True)]
    positions = torch.arange(len(ids))
    if loaded.config.rope.sections:
        positions = torch.from_numpy(rope_positions(len(ids), spans, tower.config.merge))
    for length in (len(ids), 7):
        decoder = Decoder(loaded, positions, ids, torch.cat(encoded, 1))
        logits = [decoder.chunk(at, min(length, len(ids) - at)) for at in range(0, len(ids), length)]
        torch.testing.assert_close(torch.cat(logits), expected, rtol=1e-3, atol=1e-3)
        assert decoder.layers_seen == [*range(loaded.config.num_layers)] * len(logits)
    token, made, shift = int(logits[-1][-1].argmax()), [], int(positions.max()) + 1 - len(ids)
    for at in range(len(ids), len(ids) + 8):
        made.append(token)
        token = int(decoder.decode(token, at, at + shift).argmax())
    assert made == greedy.tolist()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="it runs in Triton's interpreter")
def test_triton_layers_as_torchs(tmp_path):
    """An image of 9 tokens with DeepStack and M-RoPE, in chunks that end within it, then a decode."""
    pytest.importorskip("triton")
    saved("qwen3-vl", tmp_path)
    torch.manual_seed(2)
    ids = torch.cat([torch.arange(3), torch.full((9,), IMAGE), torch.arange(2)])
    positions, seen = torch.from_numpy(rope_positions(14, [ImageSpan(3, (1, 6, 6))], 2)), torch.randn(3, 9, 64)
    logits = []
    for kernels in (Kernels("torch"), Kernels("triton")):
        torch.manual_seed(3)
        decoder = Decoder(load_model(spec(tmp_path), kernels), positions, ids, seen)
        logits.append(torch.cat([decoder.chunk(0, 8), decoder.chunk(8, 6), decoder.decode(5, 14, 8).unsqueeze(0)]))
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


def test_weights_are_counted(family):
    reference, directory = family
    model = reference.model
    towers = [model.visual] if is_qwen(directory) else [model.vision_model, model.connector]
    whole = sum(parameter.numel() for tower in towers for parameter in tower.parameters())
    assert load_config(spec(directory)).vision.weights == whole


GRIDS = [(1, 2, 2), (1, 4, 6), (1, 14, 10), (2, 6, 8), (1, 2, 34), (3, 4, 4)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("merge", [1, 2])
def test_geometry_as_transformers_has_it(grid, merge):
    thw = torch.tensor([grid])
    expected = vision_utils.get_vision_position_ids(thw, merge)
    assert torch.equal(torch.from_numpy(geometry.coordinates(grid, merge)), expected.t())
    for side in (2, 5, 48):
        taps, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            thw, side, align_corners=True, spatial_merge_size=merge
        )
        table = torch.randn(side * side)
        ours_taps, ours_weights = map(torch.from_numpy, geometry.interpolated_positions(grid, merge, side))
        torch.testing.assert_close((table[ours_taps] * ours_weights).sum(1), (table[taps] * weights).sum(1))


@pytest.mark.parametrize("grid", [(1, 2, 2), (1, 4, 6), (1, 14, 10), (1, 6, 34)])
@pytest.mark.parametrize("side", [2, 4, 8])
def test_windows_as_transformers_has_them(grid, side):
    """The same patches together, whatever their order."""
    index, ends = vision_utils.get_vision_window_index(torch.tensor([grid]), 2, side * 4, 4)
    patches = (index.unsqueeze(1) * 4 + torch.arange(4)).flatten()
    expected = {frozenset(patches[a:b].tolist()) for a, b in itertools.pairwise(ends)}
    groups = geometry.groups(geometry.window_of(grid, 2, side))
    assert {frozenset(one.tolist()) for group in groups for one in group} == expected


@pytest.mark.parametrize("side", [3, 6, 7, 14, 26, 27, 32])
def test_nearest_positions_of_a_whole_tile(side):
    """Of as many patches as there are learned positions, as transformers' arithmetic rounds them."""
    from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionConfig, Idefics3VisionEmbeddings

    embed = Idefics3VisionEmbeddings(Idefics3VisionConfig(hidden_size=1, image_size=side, patch_size=1))
    embed.position_embedding.weight.data = torch.arange(side**2).float().unsqueeze(1)
    embed.patch_embedding.weight.data.zero_(), embed.patch_embedding.bias.data.zero_()
    with torch.no_grad():
        expected = embed(torch.zeros(1, 3, side, side), torch.ones(1, side, side, dtype=torch.bool)).flatten()
    assert geometry.nearest_positions((1, side, side), 1, side).tolist() == expected.long().tolist()


def edited(directory, tmp_path, **fields):
    config = json.loads((directory / "config.json").read_text())
    for name, value in fields.items():
        place = config
        *path, last = name.split("__")
        for key in path:
            place = place[key]
        place[last] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "fields", "error", "told"),
    [
        ("qwen2.5-vl", {"architectures": ["Other"]}, UnsupportedModel, "Other"),
        ("qwen2.5-vl", {"vision_config__hidden_act": "relu"}, UnsupportedModel, "relu"),
        ("qwen2.5-vl", {"vision_config__patch_size": [4, 4]}, ModelFileCorrupt, "patch_size"),
        ("qwen2.5-vl", {"vision_config__num_heads": 5}, ModelFileCorrupt, "5 heads"),
        ("qwen2.5-vl", {"vision_config__out_hidden_size": 32}, ModelFileCorrupt, "out_hidden_size"),
        ("qwen2.5-vl", {"text_config__rope_parameters__mrope_section": [9, 9, 9]}, ModelFileCorrupt, "mrope_section"),
        ("qwen2.5-vl", {"vision_config": 3}, ModelFileCorrupt, "vision_config"),
        ("qwen3-vl", {"vision_config__num_position_embeddings": 37}, ModelFileCorrupt, "no square"),
        ("idefics3", {"vision_config__image_size": 26}, ModelFileCorrupt, "image_size 26"),
        ("idefics3", {"text_config__model_type": "gemma3_text"}, UnsupportedModel, "gemma3_text"),
    ],
)
def test_refused_by_name(name, fields, error, told, tmp_path):
    saved(name, tmp_path / "model")
    with pytest.raises(error, match=told):
        load_config(spec(edited(tmp_path / "model", tmp_path, **fields)))


def test_what_a_directory_lacks(tmp_path):
    saved("idefics3", tmp_path)
    vision = load_config(spec(tmp_path)).vision
    for name in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(ModelFileMissing, match="preprocessor_config"):
        ImageProcessor(tmp_path, vision)
    edited(tmp_path, tmp_path, vision_config__num_hidden_layers=4)
    with pytest.raises(ModelFileCorrupt, match=r"encoder\.layers\.3"):
        load_vision(spec(tmp_path), Kernels())
    edited(tmp_path, tmp_path, vision_config__num_hidden_layers=2)
    with pytest.raises(UnsupportedModel, match=r"encoder\.layers\.2"):
        load_vision(spec(tmp_path), Kernels())


def test_a_model_without_a_tower(tmp_path):
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="takes no images"):
        load_vision(spec(tmp_path), Kernels())


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_other_modes_become_what_transformers_makes_of_them(mode, tmp_path):
    """Transparency lies on white."""
    saved("qwen2.5-vl", tmp_path)
    processor = ImageProcessor(tmp_path, load_config(spec(tmp_path)).vision)
    picture = pictures(1)[0].convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    other = picture.convert(mode)
    expected = processed(tmp_path, [other])["pixel_values"]
    assert torch.equal(processor.patches(other).values, expected.float())
