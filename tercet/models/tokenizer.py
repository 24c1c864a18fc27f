"""Text to token ids and back, by the gateway; chat messages to text. Imports no torch.

`tokenizer_gguf.py` and `tokenizer_hf.py` make one from files. Between encode and detokenise only ids travel.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from typing import Any

import tokenizers

from tercet.errors import InvalidRequest, UnsupportedModel
from tercet.models.chat import ChatTemplate


class Tokenizer:
    def __init__(
        self, backend: tokenizers.Tokenizer, eos_token_ids: tuple[int, ...], template: ChatTemplate | None
    ) -> None:
        """Raises UnsupportedModel if the way that `backend` joins tokens into text is not known here."""
        self.eos_token_ids = eos_token_ids
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self._backend = backend
        self._template = template
        self._special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self._added = set(backend.get_added_tokens_decoder())
        self._bytelevel, self._strips_space = _decoder_of(backend)
        self._bytes: dict[int, bytes] = {}  # token id -> what it adds to the text; filled as ids come

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """add_special: what the model wants around a plain prompt, such as a beginning-of-sequence token."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Special tokens are left out; bytes that are no UTF-8 become U+FFFD."""
        detokenizer = self.detokenizer()
        return "".join([detokenizer.push(i) for i in ids]) + detokenizer.flush()

    def detokenizer(self) -> Detokenizer:
        return Detokenizer(self, self._strips_space)

    def token_text(self, token_id: int) -> str:
        """One token alone, special or not; U+FFFD where it holds a part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to the UTF-8 of the text; an id outside the vocabulary adds nothing."""
        known = self._bytes.get(token_id)
        if known is None:
            token = self._backend.id_to_token(token_id)
            known = self._bytes[token_id] = b"" if token is None else self._to_bytes(token_id, token)
        return known

    def apply_chat_template(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt's text, to be encoded with add_special=False. Raises InvalidRequest."""
        if self._template is None:
            raise InvalidRequest("the model has no chat template; use /v1/completions with a plain prompt")
        return self._template.render(messages, add_generation_prompt)

    def _to_bytes(self, token_id: int, token: str) -> bytes:
        if token_id in self._added:
            return token.encode()
        if self._bytelevel:
            return _bytelevel(token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()


class Detokenizer:
    """One stream of tokens to text. A character that is split over tokens comes with the last of them."""

    def __init__(self, tokenizer: Tokenizer, strip_space: bool) -> None:
        """strip_space: a space at the very beginning is the tokeniser's own, not the text's."""
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_space = strip_space

    def push(self, token_id: int) -> str:
        if self._tokenizer.is_special(token_id):
            return ""
        return self._stripped(self._utf8.decode(self._tokenizer.token_bytes(token_id)))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for the beginning of a character that never came whole, or nothing."""
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        if self._strip_space and text:
            self._strip_space = False
            return text.removeprefix(" ")
        return text


def _bytelevel(token: str) -> bytes:
    """GPT-2 writes every byte as one printable character; a token with any other character stands for itself."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()


def _byte_of() -> dict[str, int]:
    """Printable Latin-1 stands for itself, the 68 other bytes for U+0100 and on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_of()  # character -> byte


def _decoder_of(backend: tokenizers.Tokenizer) -> tuple[bool, bool]:
    """-> whether tokens are bytes as GPT-2 writes them (else sentencepiece's, as Llama 2 has them), and whether the
    text's first space is the tokeniser's own."""
    decoder = json.loads(backend.to_str())["decoder"] or {"type": "none"}
    parts = [part["type"] for part in decoder.get("decoders", [decoder])]
    if parts == ["ByteLevel"]:
        return True, False
    if parts[:3] == ["Replace", "ByteFallback", "Fuse"] and parts[3:] in ([], ["Strip"]):
        return False, parts[3:] == ["Strip"]
    raise UnsupportedModel(f"the tokenizer's decoder {' + '.join(parts)} is not supported")
