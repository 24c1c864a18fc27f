"""A tokenizer from a Hugging Face directory: its vocabulary and its chat template. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import models
from transformers import PreTrainedTokenizerFast

from tercet.errors import ModelFileCorrupt, UnsupportedModel
from tercet.models.chat import ChatTemplate
from tercet.models.tokenizer import Tokenizer
from tercet.models.vocabulary_hf import end_of, read_vocabulary


def tokenizer_from_hf(
    directory: Path, eos_token_ids: tuple[int, ...], control_tokens_in_text: bool, template: str | None = None
) -> Tokenizer:
    """eos_token_ids: those of the model's configs; the tokenizer's own is added. template: in the place of the
    directory's own. Raises ModelFileMissing, ModelFileCorrupt, UnsupportedModel."""
    found = read_vocabulary(directory)
    ends = tuple(dict.fromkeys((*eos_token_ids, *end_of(found))))
    is_bpe = isinstance(found.backend_tokenizer.model, models.BPE)
    clean = found.clean_up_tokenization if found.clean_up_tokenization_spaces and not is_bpe else None
    chat = _template(directory, found) if template is None else ChatTemplate(template, found.special_tokens_map)
    return Tokenizer(found.backend_tokenizer, ends, chat, clean, control_tokens_in_text)


def _template(directory: Path, found: PreTrainedTokenizerFast) -> ChatTemplate | None:
    """The one that transformers takes: of several the one named default."""
    if not found.chat_template:
        return None
    try:
        text: Any = found.get_chat_template()
    except ValueError as error:  # several and no default
        raise UnsupportedModel(f"{directory}: {error}") from error
    if not isinstance(text, str):
        raise ModelFileCorrupt(f"{directory}: chat_template is {text!r:.60}, no text")
    return ChatTemplate(text, found.special_tokens_map)
