"""A tokenizer from a GGUF file's metadata. Imports no torch.

How text is cut before BPE is only a name in the file (`tokenizer.ggml.pre`); the rules are those of the models' own
tokenizer.json. A name that is not known here is refused, since a wrong rule gives other tokens without any error.
"""

from __future__ import annotations

from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from tercet.errors import ModelFileCorrupt, UnsupportedModel
from tercet.models.chat import ChatTemplate
from tercet.models.config_gguf import eos_token_ids
from tercet.models.gguf_file import GgufFile
from tercet.models.tokenizer import Tokenizer

CONTROL, USER_DEFINED = 3, 4  # llama.cpp's token types
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")  # these begin every prompt with bos, and take whole words first
DIGITS_3, DIGITS_1 = r"\p{N}{1,3}", r"\p{N}"


def _cl100k(digits: str) -> str:
    """The cut of OpenAI's cl100k, which Llama 3 uses as it is and Qwen 2 with digits one by one."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _split(regex: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(regex), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    if name in ("gpt-2", "default"):  # default: written by old converters, for GPT-2's own
        return _gpt2()
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])
    if name in LLAMA3:
        return _split(_cl100k(DIGITS_3))
    if name == "qwen2":
        return _split(_cl100k(DIGITS_1))
    raise UnsupportedModel(
        f"tokenizer.ggml.pre {name!r} is not supported; smollm, llama-bpe, qwen2, gpt-2 and default are"
    )


def tokenizer_from_gguf(file: GgufFile) -> Tokenizer:
    """Raises UnsupportedModel naming what is not supported, ModelFileCorrupt for a vocabulary that does not fit."""
    kind = file.require("tokenizer.ggml.model")
    if kind != "gpt2":
        raise UnsupportedModel(f"{file.path}: tokenizer.ggml.model {kind!r} is not supported; gpt2 (BPE) is")
    tokens = file.require("tokenizer.ggml.tokens")
    pre = str(file.metadata.get("tokenizer.ggml.pre", "default"))
    try:
        backend = _bpe(tokens, file.require("tokenizer.ggml.merges"), ignore_merges=pre in LLAMA3)
    except Exception as error:  # tokenizers raises nothing narrower
        raise ModelFileCorrupt(f"{file.path}: tokenizer.ggml.merges does not fit its tokens: {error}") from error
    try:
        backend.pre_tokenizer = _pre_tokenizer(pre)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{file.path}: {error}") from error
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    _add_special(backend, file, tokens, pre)
    return Tokenizer(backend, eos_token_ids(file), _template(file, tokens))


def _bpe(tokens: list[str], merges: list[str], ignore_merges: bool) -> tokenizers.Tokenizer:
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=ignore_merges))


def _add_special(backend: tokenizers.Tokenizer, file: GgufFile, tokens: list[str], pre: str) -> None:
    types = file.metadata.get("tokenizer.ggml.token_type", [])
    typed = list(zip(tokens, types, strict=False))
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, kind in typed if kind == CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False) for t, kind in typed if kind == USER_DEFINED])
    bos = file.metadata.get("tokenizer.ggml.bos_token_id")
    if bos is not None and file.metadata.get("tokenizer.ggml.add_bos_token", pre in LLAMA3):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", pair=None, special_tokens=[(tokens[bos], bos)]
        )


def _template(file: GgufFile, tokens: list[str]) -> ChatTemplate | None:
    text = file.metadata.get("tokenizer.chat_template")
    if text is None:
        return None
    named: dict[str, Any] = {}
    for name in ("bos", "eos", "unknown", "padding"):
        i = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if i is not None:
            named[{"unknown": "unk", "padding": "pad"}.get(name, name) + "_token"] = tokens[i]
    return ChatTemplate(text, named)
