"""Text to token ids and back, by the gateway; chat messages to ids. Imports no torch.

`tokenizer_gguf.py` and `tokenizer_hf.py` make one from files. Between encode and detokenise only ids travel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from tercet.errors import InvalidRequest
from tercet.models.chat import ChatTemplate
from tercet.models.control import ControlTokens
from tercet.models.detokenizer import ByteStream, CleanStream, Detokenizer, TokenTexts, WindowStream
from tercet.models.encoding import encoded
from tercet.models.given import said
from tercet.models.longest_token import longest_token


class Tokenizer:
    """Safe to use from several threads at once."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        eos_token_ids: tuple[int, ...],
        template: ChatTemplate | None,
        clean: Callable[[str], str] | None = None,
        control_tokens_in_text: bool = False,
    ) -> None:
        """clean: transformers' clean_up_tokenization, if the tokenizer asks for it. control_tokens_in_text: those in a
        message's text are parsed too (a user can then open a system turn), as in vLLM."""
        backend.no_truncation()  # settings of the model's training, not of a prompt
        backend.no_padding()
        self.eos_token_ids = eos_token_ids
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.longest_token = longest_token(backend)
        self._backend = backend
        self._template = template
        self._clean = clean
        self._texts = TokenTexts(backend)
        ids = () if control_tokens_in_text else self._control_ids()
        self._control = ControlTokens(backend, ids) if ids else None

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """add_special: what the model wants around a plain prompt, such as a beginning-of-sequence token. Control
        tokens in the text are parsed. Raises InvalidRequest."""
        ids: list[int] = encoded(self._backend, text, add_special).ids
        return ids

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The prompt's ids. Control tokens are the template's alone, whatever the messages say. Raises
        InvalidRequest."""
        template = self._chat_template
        text = template.render(messages, add_generation_prompt, template_kwargs)
        if self._control is None:
            return self.encode(text, add_special=False)
        shown = template.render(messages, add_generation_prompt, template_kwargs, blanks=True)
        return self._control.encode(text, shown, said((messages, template_kwargs or {})))

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt as text, as transformers renders it. Raises InvalidRequest."""
        return self._chat_template.render(messages, add_generation_prompt, template_kwargs)

    def decode(self, ids: Iterable[int]) -> str:
        """Special tokens are left out; bytes that are no UTF-8 become U+FFFD."""
        detokenizer = self.detokenizer()
        return "".join([detokenizer.push(i) for i in ids]) + detokenizer.flush()

    def detokenizer(self, prompt_ids: Sequence[int] = ()) -> Detokenizer:
        """A stream of text that continues the prompt."""
        stream = (ByteStream if self._texts.are_bytes else WindowStream)(self._texts, prompt_ids)
        return stream if self._clean is None else CleanStream(stream, self._clean)

    def is_control(self, token_id: int) -> bool:
        """Whether a message's text cannot have it, unless the spec says that control tokens in one are parsed."""
        return token_id in self._control_ids()

    def token_text(self, token_id: int) -> str:
        """One token alone, special or not; U+FFFD where it holds a part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to the UTF-8 of the text; an id outside the vocabulary adds nothing."""
        return self._texts.bytes_of(token_id)

    @property
    def _chat_template(self) -> ChatTemplate:
        if self._template is None:
            raise InvalidRequest("the model has no chat template; use /v1/completions with a plain prompt")
        return self._template

    def _control_ids(self) -> list[int]:
        """Special tokens, whatever ends an answer, and added tokens that the template writes; none if the model wants
        even those parsed as text."""
        if self._backend.encode_special_tokens:
            return []
        written = "" if self._template is None else self._template.written
        added = self._backend.get_added_tokens_decoder().items()
        return [i for i, t in added if t.special or i in self.eos_token_ids or t.content in written]
