"""A vision tower in a directory of its own, before a text model that comes from elsewhere and knows nothing of it: a
GGUF, say. It is Idefics3's, without the marks around images, which the other vocabulary has no tokens for; and the
directory has the chat template, which writes the image token. Imports no torch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tercet.errors import ModelFileCorrupt, ModelFileMissing, UnsupportedModel
from tercet.models.config import ModelConfig
from tercet.models.config_fields import check
from tercet.models.config_hf import read_json
from tercet.models.vision.config_hf import vision_config
from tercet.models.vision.sizes import ImageSizes, processor_settings

TYPES = ("idefics3", "smolvlm")  # model_type; the others turn the text model's positions
TEMPLATE, WEIGHTS = "chat_template.jinja", "model.safetensors"


def with_tower(config: ModelConfig, directory: Path) -> ModelConfig:
    """The text model's config with that of the tower before it. Raises ModelFileMissing, ModelFileCorrupt,
    UnsupportedModel for one that does not fit."""
    path = directory / "config.json"
    if config.vision is not None:
        raise UnsupportedModel(f"{path}: the model has a vision tower of its own; leave model.vision out")
    fields = read_json(path)
    check(path, fields)
    if (kind := fields.get("model_type")) not in TYPES:
        raise UnsupportedModel(f"{path}: a tower of {kind!r} cannot stand apart; those of {', '.join(TYPES)} can")
    try:
        check(path, text := fields["text_config"])
        if (width := text["hidden_size"]) != config.hidden_size:
            raise UnsupportedModel(
                f"{path}: the tower is for a text model with hidden_size {width}, this one's is {config.hidden_size}"
            )
        vision = replace(vision_config(path, fields, config.hidden_size), framed=False)
    except KeyError as error:
        raise ModelFileCorrupt(f"{path}: has no field {error}") from error
    if not 0 <= vision.image_token < config.vocab_size:
        raise ModelFileCorrupt(
            f"{path}: image_token_id {vision.image_token} is outside the text model's vocabulary of {config.vocab_size}"
        )
    ImageSizes(vision, processor_settings(directory), directory)
    for name in (TEMPLATE, WEIGHTS):
        if not (directory / name).is_file():
            raise ModelFileMissing(f"{directory}: has no {name}")
    return replace(config, vision=vision)


def chat_template(directory: Path) -> str:
    """Raises ModelFileMissing, ModelFileCorrupt."""
    try:
        return (directory / TEMPLATE).read_text(encoding="utf-8")
    except OSError as error:
        raise ModelFileMissing(f"{directory / TEMPLATE}: cannot read it: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ModelFileCorrupt(f"{directory / TEMPLATE}: is no UTF-8: {error}") from error
