"""Incremental detokenising. The pieces joined equal transformers' decode of all the ids.

ByteStream    byte-level BPE: every token is bytes; a character is returned with its last byte
WindowStream  any other decoder: decodes a short window of tokens and returns what the last one added
CleanStream   wraps a stream whose tokenizer asks for transformers' clean_up_tokenization

All continue a prompt, so a leading space of the answer is kept: a decoder strips it only at the start of a text.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from typing import Protocol

import tokenizers

from tercet.models.bytelevel import token_bytes

ANCHOR = "a"  # a plain token that stands for all earlier text when a window is decoded
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # a SentencePiece byte-fallback token


class Detokenizer(Protocol):
    def push(self, token_id: int, /) -> str:
        """The text that is complete with this token; empty if it needs later tokens."""

    def flush(self) -> str:
        """The text still held back at the end of the stream."""


class TokenTexts:
    """Single tokens as text, by the tokenizer's own decoder."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._decoder = backend.decoder
        kinds = _kinds(backend.decoder)
        self.are_bytes = kinds == ["ByteLevel"]
        self._has_bytes = "ByteFallback" in kinds
        special = [i for i, token in backend.get_added_tokens_decoder().items() if token.special]
        self.special = {i for i in special if not backend.decode([i], skip_special_tokens=True)}
        self._bytes: dict[int, bytes] = {}  # token id -> what it adds to the text; filled as ids come

    def ordinary(self, token_id: int) -> str | None:
        """The token's string in the vocabulary; None for a special or unknown id, which adds no text."""
        token: str | None = None if token_id in self.special else self._backend.id_to_token(token_id)
        return token

    def is_byte(self, token: str) -> bool:
        return self._has_bytes and BYTE.fullmatch(token) is not None

    def decode(self, tokens: Sequence[str]) -> str:
        text: str = " ".join(tokens) if self._decoder is None else self._decoder.decode(list(tokens))
        return text

    def bytes_of(self, token_id: int) -> bytes:
        """What the token adds to the UTF-8 of a text, special or not; nothing for an id outside the vocabulary."""
        known = self._bytes.get(token_id)
        if known is None:
            token = self._backend.id_to_token(token_id)
            known = self._bytes[token_id] = b"" if token is None else self._to_bytes(token_id, token)
        return known

    def _to_bytes(self, token_id: int, token: str) -> bytes:
        if token_id in self.special:
            return token.encode()
        if self.are_bytes:
            return token_bytes(token)
        if self.is_byte(token):
            return bytes([int(token[3:5], 16)])
        return self.decode([ANCHOR, token]).removeprefix(self.decode([ANCHOR])).encode()


class ByteStream:
    def __init__(self, texts: TokenTexts, prompt_ids: Sequence[int]) -> None:
        self._texts = texts
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for token_id in prompt_ids[-4:]:  # a prompt of ids may end inside a character
            self.push(token_id)

    def push(self, token_id: int) -> str:
        return "" if token_id in self._texts.special else self._utf8.decode(self._texts.bytes_of(token_id))

    def flush(self) -> str:
        """U+FFFD for the beginning of a character that never came whole, or nothing."""
        return self._utf8.decode(b"", final=True)


class WindowStream:
    """Byte-fallback tokens are held until a token of another kind comes, since one invalid byte changes how the whole
    run decodes. A last character that may be incomplete is held too."""

    REACH = 4  # UTF-8 takes at most 4 bytes, and a token is a byte or more

    def __init__(self, texts: TokenTexts, prompt_ids: Sequence[int]) -> None:
        self._texts = texts
        self._window = self._tail(prompt_ids)  # the token before, then those whose text has not been returned
        self._given = texts.decode(self._window)

    def push(self, token_id: int) -> str:
        token = self._texts.ordinary(token_id)
        if token is None:
            return ""
        self._window.append(token)
        return "" if self._texts.is_byte(token) else self._give()  # a run of bytes is decoded once, at its end

    def flush(self) -> str:
        return self._give(last=True)

    def _give(self, last: bool = False) -> str:
        text = self._texts.decode(self._window)
        held = text.endswith("\ufffd") and not last
        new = _behind(text[: -1 if held else None], self._given)
        self._window = [ANCHOR, *self._window[-self.REACH if held else -1 :]] if self._window else []
        self._given = self._texts.decode(self._window)[: -1 if held else None]
        return new

    def _tail(self, prompt_ids: Sequence[int]) -> list[str]:
        """The prompt's last token, with the bytes that follow it."""
        tail: list[str] = []
        for token_id in reversed(prompt_ids):
            token = self._texts.ordinary(token_id)
            if token is not None:
                tail.append(token)
                if not self._texts.is_byte(token):
                    break
        return [ANCHOR, *reversed(tail)] if tail else []


class CleanStream:
    """transformers' clean-up removes the space before punctuation and contractions; text is held until later text
    cannot change it."""

    APART = re.compile(r"(?<! ') (?=[^.?!,'n])")  # a space that no replacement removes or spans

    def __init__(self, stream: Detokenizer, clean: Callable[[str], str]) -> None:
        self._stream, self._clean = stream, clean
        self._held = ""

    def push(self, token_id: int) -> str:
        start = max(len(self._held) - 1, 0)  # no match before it: the text would have been cut there
        self._held += self._stream.push(token_id)
        cut = max((match.start() for match in self.APART.finditer(self._held, start)), default=0)
        whole, self._held = self._held[:cut], self._held[cut:]
        return self._clean(whole)

    def flush(self) -> str:
        whole, self._held = self._held + self._stream.flush(), ""
        return self._clean(whole)


def _behind(text: str, given: str) -> str:
    """The text after its common prefix with `given`."""
    same = (i for i, (new, old) in enumerate(zip(text, given, strict=False)) if new != old)
    return text[next(same, len(given)) :]


def _kinds(decoder: tokenizers.decoders.Decoder | None) -> list[str]:
    """The decoder's steps by name."""
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    return [step["type"] for step in state.get("decoders", [state])]
