"""The vocabulary of a Hugging Face directory, read by transformers' own classes. Imports no torch and no chat template:
workers need none.

Classes, defaults and special tokens are transformers' own. Only `_class_of` is ours: AutoTokenizer takes the same
class, but importing it imports torch.
"""

from __future__ import annotations

from pathlib import Path

import transformers
from transformers import PreTrainedTokenizerFast

from tercet.errors import ModelFileCorrupt, ModelFileMissing, UnsupportedModel
from tercet.models.config_hf import read_json

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "tiktoken.model")
SETTINGS = "tokenizer_config.json"


def end_token_ids(directory: Path) -> tuple[int, ...]:
    """The end that the tokenizer names, if there is one; a directory may hold weights alone."""
    return end_of(read_vocabulary(directory)) if _has_vocabulary(directory) else ()


def _has_vocabulary(directory: Path) -> bool:
    return any((directory / name).is_file() for name in VOCABULARIES)


def read_vocabulary(directory: Path) -> PreTrainedTokenizerFast:
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


def end_of(found: PreTrainedTokenizerFast) -> tuple[int, ...]:
    return () if found.eos_token_id is None else (found.eos_token_id,)
