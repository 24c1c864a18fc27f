"""How many characters one token can stand for: a bound by which a prompt can be refused without tokenising it."""

from __future__ import annotations

import json
from typing import Any

import tokenizers
from tokenizers import models

from tercet.models.bytelevel import CHARACTER_OF

COMPOSED = 4  # NFC and NFKC compose at most so many characters into one
KEEPING = {"Prepend", "Lowercase", "ByteLevel", "NFD", "NFKD"}  # normalizers that never shorten a text
COMPOSING = {"NFC", "NFKC"}
WRITTEN = {9, 10, 13, *range(0x20, 0xC0), *range(0xC2, 0xF1)}  # bytes of text; many vocabularies have no control bytes
CUTTING = {"ByteLevel", "Digits", "Metaspace", "Punctuation", "UnicodeScripts"}  # pre-tokenizers that drop nothing


def longest_token(backend: tokenizers.Tokenizer) -> int | None:
    """A text of n characters makes at least n / longest_token tokens, apart from control characters
    that are missing from the vocabulary. None: no such bound, as text may be dropped or any length be one token."""
    normalizers = _steps(backend.normalizer, "normalizers")
    added = backend.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip for token in added) or not _spells_everything(backend):
        return None
    cuts = _steps(backend.pre_tokenizer, "pretokenizers")
    if not (all(map(_keeps_text, normalizers)) and all(map(_cuts_only, cuts))):
        return None
    factor = COMPOSED if any(step["type"] in COMPOSING for step in normalizers) else 1
    return max(map(len, backend.get_vocab(with_added_tokens=True)), default=1) * factor


def _spells_everything(backend: tokenizers.Tokenizer) -> bool:
    """Whether every character is encoded as at least one token."""
    model = backend.model
    if not isinstance(model, models.BPE):  # others encode a whole unknown word as one token
        return False
    if model.byte_fallback:
        return all(backend.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256))
    if any(step["type"] == "ByteLevel" for step in _steps(backend.pre_tokenizer, "pretokenizers")):
        return all(model.token_to_id(CHARACTER_OF[byte]) is not None for byte in WRITTEN)
    return model.unk_token is not None and not model.fuse_unk


def _keeps_text(step: dict[str, Any]) -> bool:
    if step["type"] == "Replace":
        return len(step["pattern"].get("String", "")) == len(step["content"]) == 1
    return step["type"] in KEEPING | COMPOSING


def _cuts_only(step: dict[str, Any]) -> bool:
    if step["type"] == "Split":
        return bool(step["behavior"] != "Removed")
    return step["type"] in CUTTING


def _steps(part: Any, name: str) -> list[dict[str, Any]]:
    """A normalizer's or pre-tokenizer's steps as its file writes them."""
    if part is None:
        return []
    state = json.loads(part.__getstate__())
    steps: list[dict[str, Any]] = state.get(name, [state])
    return steps
