"""A tokenizer whose ids are UTF-8 bytes: every multi-byte character spans tokens, as in the worst of real text."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tercet.errors import InvalidRequest
from tercet.roles.gateway.ask import ServedModel

VOCAB = 260
EOS = 256
CONTEXT = 128


class ByteDetokenizer:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(bytes([token_id])) if token_id < 256 else ""

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class ByteTokenizer:
    eos_token_ids = (EOS,)
    longest_token: int | None = 1

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        return list(text.encode())

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        return self.encode(self.apply_chat_template(messages, add_generation_prompt, template_kwargs))

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        if messages[0]["role"] == "assistant":
            raise InvalidRequest("messages must begin with system or user")
        kwargs = "".join(f"<{name}={value}>" for name, value in (template_kwargs or {}).items())
        turns = kwargs + "".join(f"<{m['role'][0]}>{m['content']}" for m in messages)
        return turns + ("<a>" if add_generation_prompt else "")

    def decode(self, ids: Iterable[int]) -> str:
        detokenizer = self.detokenizer()
        return "".join(map(detokenizer.push, ids)) + detokenizer.flush()

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b"<eos>"

    def detokenizer(self, prompt_ids: Sequence[int] = ()) -> ByteDetokenizer:
        return ByteDetokenizer()


MODEL = ServedModel("fake-model", ByteTokenizer(), VOCAB, CONTEXT)
