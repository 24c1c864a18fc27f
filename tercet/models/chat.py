"""Chat templates: Jinja text of the model, rendered in a sandbox as transformers renders it. Imports no torch."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tercet.errors import InvalidRequest, UnsupportedModel

MAX_CHARS = 16 * 1024 * 1024  # of a rendered prompt: a template that loops does not fill the memory


class ChatTemplate:
    """Raises UnsupportedModel for a text that is no template."""

    def __init__(self, text: str, special_tokens: Mapping[str, str]) -> None:
        """special_tokens: bos_token, eos_token, … -> their text, as the template names them."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _now
        try:
            self._template = environment.from_string(text)
        except TemplateSyntaxError as error:
            raise UnsupportedModel(f"the model's chat template, line {error.lineno}: {error.message}") from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """Raises InvalidRequest with what the template, or Python in it, found wrong with the messages."""
        given = {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}
        parts, length = [], 0
        try:
            for part in self._template.generate(**self._special_tokens, **given):
                parts.append(part)
                length += len(part)
                if length > MAX_CHARS:
                    raise InvalidRequest(f"the chat template made more than {MAX_CHARS} characters of the messages")
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise InvalidRequest(f"the model's chat template refused the messages: {error}") from error
        return "".join(parts)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().astimezone().strftime(form)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    """Without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
