"""Token ids to text, one stream at a time. Joined, the pieces are what transformers' decode makes of all the ids.

ByteStream    byte-level BPE: every token is bytes, a character comes with the last of its own
WindowStream  any other decoder: what a token adds behind the one before it
CleanStream   around a stream whose tokenizer asks for transformers' clean_up_tokenization

All follow a prompt: a space that begins an answer is the text's own, not the tokenizer's.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from typing import Protocol

import tokenizers

from tercet.models.bytelevel import token_bytes

ANCHOR = "a"  # a token of plain text, in the place of all that came before
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # how sentencepiece writes a byte that is no token


class Detokenizer(Protocol):
    def push(self, token_id: int, /) -> str:
        """What the token adds to the text; later tokens may have to come before it shows."""

    def flush(self) -> str:
        """What is left at the end."""


class TokenTexts:
    """What single tokens are as text, by the tokenizer's own decoder."""

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
        """The token as the vocabulary writes it; None for one that is left out of a text."""
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
    """Tokens that stand for a byte are held until another one comes: one wrong byte spoils all of a run. So is a last
    character that may not be whole."""

    REACH = 4  # tokens, each a byte or more, that hold all of a character

    def __init__(self, texts: TokenTexts, prompt_ids: Sequence[int]) -> None:
        self._texts = texts
        self._window = self._tail(prompt_ids)  # the token before, then those whose text has not been given out
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
    """transformers' cleaning takes the space from before punctuation and short forms; text is held until none of
    those can reach into it any more."""

    APART = re.compile(r"(?<! ') (?=[^.?!,'n])")  # a space that no replacement takes and none reaches over

    def __init__(self, stream: Detokenizer, clean: Callable[[str], str]) -> None:
        self._stream, self._clean = stream, clean
        self._held = ""

    def push(self, token_id: int) -> str:
        start = max(len(self._held) - 1, 0)  # before it none is apart: it would have been cut there
        self._held += self._stream.push(token_id)
        cut = max((match.start() for match in self.APART.finditer(self._held, start)), default=0)
        whole, self._held = self._held[:cut], self._held[cut:]
        return self._clean(whole)

    def flush(self) -> str:
        whole, self._held = self._held + self._stream.flush(), ""
        return self._clean(whole)


def _behind(text: str, given: str) -> str:
    """What follows `given`, as far as the text still begins with it."""
    same = (i for i, (new, old) in enumerate(zip(text, given, strict=False)) if new != old)
    return text[next(same, len(given)) :]


def _kinds(decoder: tokenizers.decoders.Decoder | None) -> list[str]:
    """The decoder's steps by name."""
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    return [step["type"] for step in state.get("decoders", [state])]
