"""A tokenizer from a Hugging Face directory: tokenizer.json, tokenizer_config.json, chat_template.jinja. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers

from tercet.errors import ModelFileCorrupt, ModelFileMissing, UnsupportedModel
from tercet.models.chat import ChatTemplate
from tercet.models.config_hf import read_json
from tercet.models.tokenizer import Tokenizer

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def tokenizer_from_hf(directory: Path, eos_token_ids: tuple[int, ...]) -> Tokenizer:
    """Raises ModelFileMissing, ModelFileCorrupt, UnsupportedModel."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ModelFileMissing(f"{path}: there is no such file; only tokenizers of that form are read")
    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text("utf-8"))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ModelFileCorrupt(f"{path}: is no tokenizer: {error}") from error
    settings = directory / "tokenizer_config.json"
    config = read_json(settings) if settings.exists() else {}
    text = _template_text(directory, config)
    template = None if text is None else ChatTemplate(text, _special_tokens(config))
    return Tokenizer(backend, eos_token_ids, template)


def _template_text(directory: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, or what tokenizer_config.json says; of several templates the one named default."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text("utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    if found is not None and not isinstance(found, str):
        raise UnsupportedModel(f"{directory / 'tokenizer_config.json'}: chat_template is no text")
    return found


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Each is a text, or an object with its text as `content`."""
    tokens = {name: config[name] for name in SPECIAL if config.get(name) is not None}
    return {name: token["content"] if isinstance(token, dict) else token for name, token in tokens.items()}
