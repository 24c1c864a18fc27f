"""A tokenizer from a GGUF file's metadata. Imports no torch.

How text is cut before BPE is only a name in the file (`tokenizer.ggml.pre`); the rules are those of the models' own
tokenizer.json. A name that is not known here is refused, since a wrong rule gives other tokens without any error.
"""

from __future__ import annotations

from collections.abc import Callable

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from transformers.tokenization_utils_base import generate_merges

from tercet.errors import ModelFileCorrupt, UnsupportedModel
from tercet.models.chat import ChatTemplate
from tercet.models.config_gguf import eos_token_ids
from tercet.models.gguf_file import GgufFile
from tercet.models.tokenizer import Tokenizer

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # llama.cpp's token types
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")  # these begin every prompt with bos
TEKKEN = "tekken"  # Mistral's from Nemo on
DIGITS_3, DIGITS_1 = r"\p{N}{1,3}", r"\p{N}"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _cl100k(digits: str) -> str:
    """Pre-tokenisation of OpenAI's cl100k; Llama 3 uses it unchanged, Qwen 2 with single digits."""
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"


def _tekken() -> str:
    """Splits words at capitals, and digits one by one."""
    begin = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{begin}{UPPER}*{LOWER}+|{begin}{UPPER}+{LOWER}*"
    return rf"{words}|{DIGITS_1}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"


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
    if name == TEKKEN:
        return _split(_tekken())
    raise UnsupportedModel(
        f"tokenizer.ggml.pre {name!r} is not supported; smollm, llama-bpe, qwen2, tekken, gpt-2 and default are"
    )


def tokenizer_from_gguf(file: GgufFile, control_tokens_in_text: bool, template: str | None = None) -> Tokenizer:
    """template: in the place of the file's own.

    Raises UnsupportedModel naming what is not supported, ModelFileCorrupt for a vocabulary that does not fit."""
    kind = str(file.require("tokenizer.ggml.model"))
    if kind not in BUILDERS:
        raise UnsupportedModel(
            f"{file.path}: tokenizer.ggml.model {kind!r} is not supported; gpt2 (byte-level BPE) and llama "
            "(sentencepiece BPE) are"
        )
    ends = eos_token_ids(file)
    backend = BUILDERS[kind](file)
    _add_special(backend, file, ends)
    return Tokenizer(backend, ends, _template(file, template), control_tokens_in_text=control_tokens_in_text)


def _byte_level(file: GgufFile) -> tokenizers.Tokenizer:
    pre = str(file.scalar("tokenizer.ggml.pre", "default"))
    try:
        cut = _pre_tokenizer(pre)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{file.path}: {error}") from error
    backend = _bpe(file, _pairs(file), ignore_merges=pre in (*LLAMA3, TEKKEN))
    backend.pre_tokenizer, backend.decoder = cut, decoders.ByteLevel()
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    return backend


def _sentencepiece(file: GgufFile) -> tokenizers.Tokenizer:
    """Mistral's before Nemo, and Llama 2's, as transformers' LlamaTokenizer has it."""
    prefixed = bool(file.scalar("tokenizer.ggml.add_space_prefix", True))
    backend = _bpe(file, _pairs_by_score(file), byte_fallback=True, fuse_unk=True)
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first" if prefixed else "never", split=False)
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


BUILDERS: dict[str, Callable[[GgufFile], tokenizers.Tokenizer]] = {"gpt2": _byte_level, "llama": _sentencepiece}


def _bpe(file: GgufFile, pairs: list[tuple[str, str]], **options: bool) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer(models.BPE(_vocabulary(file), pairs, **options))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ModelFileCorrupt(f"{file.path}: tokenizer.ggml.merges does not fit its tokens: {error}") from error


def _pairs(file: GgufFile) -> list[tuple[str, str]]:
    try:
        return [(left, right) for left, right in (merge.split(" ") for merge in file.array("tokenizer.ggml.merges"))]
    except ValueError as error:
        raise ModelFileCorrupt(f"{file.path}: tokenizer.ggml.merges has one that is no pair") from error


def _pairs_by_score(file: GgufFile) -> list[tuple[str, str]]:
    """The file has no merges: two tokens merge if together they are a token, highest score first."""
    vocabulary, scores = _vocabulary(file), file.array("tokenizer.ggml.scores")
    types = file.array("tokenizer.ggml.token_type")
    if not len(scores) == len(types) == len(file.array("tokenizer.ggml.tokens")):
        raise ModelFileCorrupt(f"{file.path}: tokenizer.ggml has tokens, scores and token_type of unequal length")
    pieces = {token: i for token, i in vocabulary.items() if types[i] in (NORMAL, USER_DEFINED)}
    merges: list[tuple[str, str]] = generate_merges(pieces, {token: scores[i] for token, i in pieces.items()})
    return merges


def _vocabulary(file: GgufFile) -> dict[str, int]:
    return {token: i for i, token in enumerate(file.array("tokenizer.ggml.tokens"))}


def _add_special(backend: tokenizers.Tokenizer, file: GgufFile, ends: tuple[int, ...]) -> None:
    """What ends an answer is a control token whatever the file calls it, as in llama.cpp."""
    tokens = file.array("tokenizer.ggml.tokens")
    types = file.metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    typed = [(t, CONTROL if i in ends else kind) for i, (t, kind) in enumerate(zip(tokens, types, strict=False))]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, kind in typed if kind == CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False) for t, kind in typed if kind == USER_DEFINED])
    before, after = _around(file, "bos"), _around(file, "eos")
    if before or after:
        named = [(tokens[i], i) for i in (*before, *after)]
        parts = [*(tokens[i] for i in before), "$A", *(tokens[i] for i in after)]
        backend.post_processor = processors.TemplateProcessing(single=parts, pair=None, special_tokens=named)


def _around(file: GgufFile, name: str) -> list[int]:
    """The token that stands at the beginning (bos) or the end (eos) of every prompt, if there is one."""
    token_id = file.token(name)
    llama2, llama3 = file.scalar("tokenizer.ggml.model") == "llama", file.scalar("tokenizer.ggml.pre") in LLAMA3
    usual = name == "bos" and (llama2 or llama3)
    return [token_id] if token_id is not None and file.scalar(f"tokenizer.ggml.add_{name}_token", usual) else []


def _template(file: GgufFile, given: str | None) -> ChatTemplate | None:
    text = file.scalar("tokenizer.chat_template") if given is None else given
    if text is None:
        return None
    if not isinstance(text, str):
        raise ModelFileCorrupt(f"{file.path}: tokenizer.chat_template is no text")
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}  # Jinja's: GGUF's
    ids = {name: file.token(stored) for name, stored in names.items()}
    tokens = file.array("tokenizer.ggml.tokens")
    return ChatTemplate(text, {name: tokens[i] for name, i in ids.items() if i is not None})
