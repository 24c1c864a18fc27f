"""Prompts to token ids: too long ones are refused before they are tokenised, long ones are tokenised off the loop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

from tercet.core import PromptImage
from tercet.errors import ContextTooLong, InvalidRequest
from tercet.roles.gateway.ask import Chat, Prompt, ServedModel
from tercet.roles.gateway.images import ImagePart, sizes_of
from tercet.roles.gateway.offloop import INLINE, LONG, OffLoop

PIECE = 64 * 1024  # characters that are counted at once: memory for tokens is bounded by it
SHORT = 16 * 1024  # characters: such a text is always tokenised, so that the error can tell its tokens
IDS_PER_CHAR = 8  # token ids that are checked while one character is tokenised
SLACK = 16  # extra tokens that splitting a text in two may produce


class Encoded(NamedTuple):
    ids: tuple[int, ...]
    images: tuple[PromptImage, ...] = ()


class Tokenising:
    """Event loop only."""

    def __init__(self, model: ServedModel, max_chars_per_token: int, offloop: OffLoop) -> None:
        self._model = model
        self._offloop = offloop
        longest = model.tokenizer.longest_token
        self._max_chars = model.max_context * min(max_chars_per_token, longest or max_chars_per_token)

    async def encoded(self, prompts: Iterable[Prompt], client: str, add_special: bool = True) -> list[Encoded]:
        """Each prompt. Raises InvalidRequest, ContextTooLong."""
        prompts = tuple(prompts)
        sizes = [self._size(prompt) for prompt in prompts]
        # Many short prompts are as much work as a long one; token ids are only looked at.
        at_least = INLINE + 1 if sum(sizes) > INLINE else 0
        found = []
        for prompt, size in zip(prompts, sizes, strict=True):
            work = partial(self._encode, prompt, size, add_special)
            decodes = LONG + 1 if isinstance(prompt, Chat) and prompt.images else 0  # a small file may be a large image
            found.append(await self._offloop.run(client, max(size, at_least, decodes), work))
        return found

    async def text(self, prompt: Prompt, ids: tuple[int, ...], client: str) -> str:
        """The prompt as an answer repeats it."""
        if isinstance(prompt, str):
            return prompt
        return await self._offloop.run(client, INLINE + 1, partial(self._model.tokenizer.decode, ids))

    def check_ids(self, name: str, ids: tuple[int, ...], ours: bool = False) -> None:
        """Raises InvalidRequest for an id that the model has no embedding of; `ours`: the tokenizer has made it, which
        may know more tokens than the model."""
        last = self._model.vocab_size - 1
        if ids and not 0 <= min(ids) <= max(ids) <= last:
            wrong = next(i for i in ids if not 0 <= i <= last)
            text = f" of the text {self._model.tokenizer.token_text(wrong)[:40]!r}" if ours else ""
            raise InvalidRequest(f"{name}: token id {wrong}{text} is outside the vocabulary (0 to {last})")

    def _size(self, prompt: Prompt) -> int:
        """Characters. Raises InvalidRequest, or ContextTooLong if the length alone exceeds the context."""
        if isinstance(prompt, tuple):
            if len(prompt) >= self._model.max_context:
                raise self.too_long(f"{len(prompt)} tokens,")
            return len(prompt) // IDS_PER_CHAR
        size = sum(map(len, _texts(prompt)))
        if size > max(self._max_chars, SHORT):
            raise self.too_long(f"{size} characters, at most {self._max_chars} can fit (limits.max_chars_per_token);")
        return size

    def _encode(self, prompt: Prompt, size: int, add_special: bool) -> Encoded:
        images: tuple[PromptImage, ...] = ()
        if isinstance(prompt, Chat) and prompt.images:
            ids, images = self._seen(prompt.images, self._encode_text(prompt, size, add_special))
        else:
            ids = prompt if isinstance(prompt, tuple) else tuple(self._encode_text(prompt, size, add_special))
        if not ids:
            raise InvalidRequest("prompt must not be empty")
        self.check_ids("prompt", ids, ours=not isinstance(prompt, tuple))
        return Encoded(ids, images)

    def _seen(self, parts: Sequence[ImagePart], ids: Sequence[int]) -> Encoded:
        """The prompt with all tokens of its images."""
        assert self._model.images is not None
        contents = [part.take() for part in parts]
        sizes = sizes_of(parts, contents)
        return Encoded(*self._model.images.expanded(ids, list(zip(contents, sizes, strict=True))))

    def _encode_text(self, prompt: str | Chat, size: int, add_special: bool) -> list[int]:
        tokenizer = self._model.tokenizer
        if size > PIECE:
            self._count(_texts(prompt))
        if isinstance(prompt, Chat):
            return tokenizer.encode_chat(list(prompt.messages), prompt.add_generation_prompt, prompt.template_kwargs)
        return tokenizer.encode(prompt, add_special)

    def _count(self, texts: Iterable[str]) -> None:
        """Refuse a text that is far too long while only a piece of it is in memory as tokens."""
        count = pieces = 0
        for piece in _pieces(texts):
            count, pieces = count + len(self._model.tokenizer.encode(piece, False)), pieces + 1
            if count - SLACK * pieces > self._model.max_context:
                raise self.too_long(f"more than {self._model.max_context} tokens,")

    def too_long(self, size: str) -> ContextTooLong:
        model = self._model
        return ContextTooLong(
            f"prompt has {size} the context of {model.name} holds {model.max_context} tokens, the answer included"
        )


def _texts(prompt: str | Chat) -> Iterable[str]:
    """The texts that a client has written."""
    return prompt.texts if isinstance(prompt, Chat) else (prompt,)


def _pieces(texts: Iterable[str]) -> Iterable[str]:
    for text in texts:
        for start in range(0, len(text), PIECE):
            yield text[start : start + PIECE]
