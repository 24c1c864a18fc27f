"""A vision-language model for measuring, with random weights: its text model has SmolLM2-135M's shape; its tower is of
Qwen2.5-VL's kind and as heavy beside the text as that of Qwen2.5-VL-7B, where the four patches of a token cost 0.4 of
what the token costs the text."""

from __future__ import annotations

from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers

PATCH, MERGE = 14, 2  # pixels of a patch's side; patches of a token's side
SPECIAL = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<end>")
TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def save_model(directory: Path) -> None:
    torch.manual_seed(0)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    text = {
        "vocab_size": 8192,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
    }
    vision = {
        "depth": 8,
        "hidden_size": 320,
        "intermediate_size": 864,
        "num_heads": 5,
        "out_hidden_size": 576,
        "patch_size": PATCH,
        "window_size": 112,
        "fullatt_block_indexes": [3, 7],
    }
    ids = {name: 256 + i for i, name in enumerate(names)}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    transformers.AutoModelForImageTextToText.from_config(config).bfloat16().save_pretrained(directory)
    transformers.models.qwen2_vl.Qwen2VLImageProcessorPil(
        size={"shortest_edge": 28 * 28, "longest_edge": 1 << 20}, patch_size=PATCH
    ).save_pretrained(directory)
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(letters, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=SPECIAL[-1], chat_template=TEMPLATE
    ).save_pretrained(directory)
