"""A tokenizer from a Hugging Face directory, read by transformers. Imports no torch.

Classes, defaults, special tokens and templates are transformers' own. Only `_class_of` is ours: AutoTokenizer takes
the same class, but importing it imports torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from tercet.errors import ModelFileCorrupt, ModelFileMissing, UnsupportedModel
from tercet.models.chat import ChatTemplate
from tercet.models.config_hf import read_json
from tercet.models.tokenizer import Tokenizer

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "tiktoken.model")
SETTINGS = "tokenizer_config.json"


def tokenizer_from_hf(directory: Path, eos_token_ids: tuple[int, ...], control_tokens_in_text: bool) -> Tokenizer:
    """eos_token_ids: those of the model's configs; the tokenizer's own is added. Raises ModelFileMissing,
    ModelFileCorrupt, UnsupportedModel."""
    found = _read(directory)
    ends = tuple(dict.fromkeys((*eos_token_ids, *_end_of(found))))
    is_bpe = isinstance(found.backend_tokenizer.model, models.BPE)
    clean = found.clean_up_tokenization if found.clean_up_tokenization_spaces and not is_bpe else None
    return Tokenizer(found.backend_tokenizer, ends, _template(directory, found), clean, control_tokens_in_text)


def end_token_ids(directory: Path) -> tuple[int, ...]:
    """The end that the tokenizer names, if there is one; a directory may hold weights alone."""
    return _end_of(_read(directory)) if _has_vocabulary(directory) else ()


def _has_vocabulary(directory: Path) -> bool:
    return any((directory / name).is_file() for name in VOCABULARIES)


def _read(directory: Path) -> PreTrainedTokenizerFast:
    if not _has_vocabulary(directory):
        raise ModelFileMissing(f"{directory}: has no tokenizer; {', '.join(VOCABULARIES)} are looked for")
    kind = _class_of(directory)
    try:
        found: PreTrainedTokenizerFast = kind.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # it lets out whatever goes wrong, and tokenizers raises nothing narrower
        files = ", ".join(name for name in (*VOCABULARIES, SETTINGS) if (directory / name).is_file())
        raise ModelFileCorrupt(f"{directory}: the tokenizer ({files}) cannot be read: {error}") from error
    return found


def _class_of(directory: Path) -> type[PreTrainedTokenizerFast]:
    """What AutoTokenizer makes of config.json and tokenizer_config.json for the families that are run."""
    settings = read_json(directory / SETTINGS) if (directory / SETTINGS).exists() else {}
    config = read_json(directory / "config.json")
    remote = settings.get("auto_map")
    if isinstance(remote, list) or (isinstance(remote, dict) and remote.get("AutoTokenizer")):
        raise UnsupportedModel(f"{directory / SETTINGS}: auto_map asks for code of the model's own, which is not run")
    kind, declared = config.get("model_type"), settings.get("tokenizer_class") or config.get("tokenizer_class")
    if kind == "qwen2" or (kind == "qwen3" and declared is None):
        return transformers.Qwen2Tokenizer
    name = str(declared).removesuffix("Fast")
    if declared is None or kind == "mistral" or (name == "LlamaTokenizer" and _is_byte_level(directory)):
        return PreTrainedTokenizerFast
    return _named(directory, name) if name.endswith("Tokenizer") else PreTrainedTokenizerFast


def _named(directory: Path, name: str) -> type[PreTrainedTokenizerFast]:
    found: type[PreTrainedTokenizerFast] | None = getattr(transformers, name, None)
    if found is None or found.__name__ == "PythonBackend":
        return PreTrainedTokenizerFast
    if not issubclass(found, PreTrainedTokenizerFast):
        raise UnsupportedModel(f"{directory / SETTINGS}: tokenizer_class {name} is not one of the tokenizers library")
    return found


def _is_byte_level(directory: Path) -> bool:
    path = directory / "tokenizer.json"
    return path.is_file() and b'"ByteLevel"' in path.read_bytes()


def _end_of(found: PreTrainedTokenizerFast) -> tuple[int, ...]:
    return () if found.eos_token_id is None else (found.eos_token_id,)


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
