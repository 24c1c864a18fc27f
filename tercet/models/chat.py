"""Chat templates: Jinja text of the model, rendered by transformers in its sandbox. Imports no torch."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from jinja2 import TemplateSyntaxError, pass_eval_context
from jinja2.filters import make_attrgetter
from jinja2.nodes import EvalContext
from transformers.utils.chat_template_utils import (
    _alias_reasoning_fields,
    _compile_jinja_template,
    _get_template_literal_text,
    render_jinja_template,
)

from tercet.errors import InvalidRequest, TercetError, UnsupportedModel
from tercet.models.given import given, joined

MAX_CHARS = 16 * 1024 * 1024  # limit of a rendered prompt, so that a template that loops cannot exhaust memory
PROBE = "tercet-probe"  # a text that no template writes by itself
OURS = {"messages", *inspect.signature(render_jinja_template).parameters} - {"kwargs"}  # not a client's to set


class ChatTemplate:
    """One template and what it wants of a message's content: a text, a list of parts, or either."""

    def __init__(self, text: str, special_tokens: Mapping[str, str]) -> None:
        """special_tokens: bos_token, eos_token, … -> their text, as the template names them. Raises UnsupportedModel
        for a text that is no template."""
        self.text = text
        self._special_tokens = dict(special_tokens)
        try:
            self._compiled = _compile_jinja_template(text)
        except TemplateSyntaxError as error:
            raise UnsupportedModel(f"the model's chat template, line {error.lineno}: {error.message}") from error
        environment = self._compiled.environment
        environment.concat = _bounded
        environment.filters["join"] = _join
        self._compiled.root_render_func.__globals__["str_join"] = _concatenated  # what `~` is compiled to
        self._reads_parts = self._shows([{"type": "text", "text": PROBE}])
        self._reads_text = self._shows(PROBE) or not self._reads_parts

    def render(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        kwargs: Mapping[str, Any] | None = None,
        blanks: bool = False,
    ) -> str:
        """What transformers' apply_chat_template makes of the messages, with a content that the template can read.

        kwargs: values that the client gives the template, such as enable_thinking. blanks: in the place of all that
        the client says (given.py). Raises InvalidRequest with what the template, or Python in it, found wrong.
        """
        kwargs = dict(kwargs or {})
        if taken := sorted(OURS & kwargs.keys()):
            raise InvalidRequest(f"chat_template_kwargs: {taken[0]} cannot be set this way")
        if not messages:
            raise InvalidRequest("messages must not be empty")
        try:
            messages = [self._readable(message) for message in messages]
            return (self._blanked if blanks else self._rendered)(messages, add_generation_prompt, kwargs)
        except TercetError:
            raise
        except Exception as error:  # a template is a program: Jinja passes on whatever exception its Python raises
            raise InvalidRequest(f"the model's chat template refused the messages: {error}") from error

    @cached_property
    def written(self) -> str:
        """What it may write by itself: its literals, and what it makes of the usual roles, of which some templates make
        tokens."""
        turns = [self._probed(PROBE, role) for role in ("system", "user", "assistant")]
        return "\0".join([_get_template_literal_text(self.text), *turns])

    def _rendered(self, messages: list[dict[str, Any]], add_generation_prompt: bool, kwargs: Mapping[str, Any]) -> str:
        given = {**self._special_tokens, **kwargs}
        rendered: Any = render_jinja_template(
            [messages], chat_template=self.text, add_generation_prompt=add_generation_prompt, **given
        )
        return str(rendered[0][0])  # of the first conversation; its type is declared wrong

    def _blanked(self, messages: list[dict[str, Any]], add_generation_prompt: bool, kwargs: Mapping[str, Any]) -> str:
        """As render_jinja_template does it, which itself makes plain texts of whatever it is given."""
        told = {name: given(value) for name, value in kwargs.items()}
        chat = given(_alias_reasoning_fields(messages))
        shown: str = self._compiled.render(
            messages=chat,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **{**self._special_tokens, **told},
        )
        return shown

    def _shows(self, content: Any) -> bool:
        """Whether a content of this form gets into the prompt."""
        shown = self._probed(content, "user")
        printed = any(f"{quote}{PROBE}{quote}" in shown for quote in "'\"")  # a list as Python or JSON shows it
        return PROBE in shown and not (printed and isinstance(content, list))

    def _probed(self, content: Any, role: str) -> str:
        """One turn; nothing where the template refuses it."""
        try:
            return self._rendered([{"role": role, "content": content}], True, {})
        except Exception:  # noqa: BLE001  # as in `render`
            return ""

    def _readable(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Drops null fields, as transformers does. Converts content between a string and a list of text parts
        (joined by newlines) if the template reads only the other form, as vLLM does."""
        readable = {name: value for name, value in message.items() if value is not None}
        content = readable.get("content")
        if isinstance(content, str) and not self._reads_text:
            readable["content"] = [{"type": "text", "text": content}]
        elif isinstance(content, list) and not self._reads_parts:
            if any("text" not in part for part in content):
                raise InvalidRequest("messages: the model's chat template shows no images")
            readable["content"] = "\n".join(part["text"] for part in content)
        return readable


def _bounded(parts: Iterable[str]) -> str:
    """Replaces Jinja's own concatenation, to limit the length of the prompt."""
    pieces, length = [], 0
    for part in parts:
        pieces.append(part)
        length += len(part)
        if length > MAX_CHARS:
            raise InvalidRequest(f"the chat template made more than {MAX_CHARS} characters of the messages")
    return joined(pieces)


def _concatenated(parts: Iterable[Any]) -> str:
    return joined(map(str, parts))


@pass_eval_context
def _join(context: EvalContext, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    """Jinja's filter of that name; in its place, since it makes plain texts of what is given."""
    if attribute is not None:
        value = map(make_attrgetter(context.environment, attribute), value)
    return joined(map(str, value), str(d))
