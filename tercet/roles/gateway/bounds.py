"""Limits on the lists and maps of one request, by name; checked before any work per item.

Shared by HTTP and gRPC. Every list or map that is read from a request has a limit here.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from tercet.errors import InvalidRequest

BOUNDS = {  # name of the list or map, "[]" for each item of one -> most items
    "messages": 4096,
    "messages[].content": 1024,  # parts
    "messages[].tool_calls": 128,
    "prompt": 1024,  # prompts
    "prompt[]": 1 << 20,  # token ids
    "stop": 16,
    "stop_token_ids": 1024,
    "logit_bias": 1024,
    "tools": 128,
    "functions": 128,
    "metadata": 64,
    "modalities": 16,
    "stream_options": 16,
    "response_format": 16,
    "chat_template_kwargs": 64,
}
MOST_CHOICES = 2048  # prompts times n
MOST_PARTS = 16384  # of all messages
STOP_CHARS, STOPS_CHARS = 256, 1024  # of one stop string, of all: they bound the work for each token
NAME_CHARS = 256  # of a name: model, tool, author
ID_CHARS = 16384  # of a tool call's id: some clients keep more in it than an id
KWARGS_CHARS = 65536  # of chat_template_kwargs, as JSON
DEPTH = 32  # lists and maps within each other, of what is given to a chat template
JSON_NODES = 65536  # lists and maps of a body, and likewise keys; each costs 50 to 500 times its bytes


def bound(name: str, items: Sized, where: str = "") -> None:
    """Raises InvalidRequest if `items` are more than BOUNDS allows; `where` is how the client would write the name."""
    if len(items) > BOUNDS[name]:
        raise InvalidRequest(f"{where or name} takes at most {BOUNDS[name]} items, got {len(items)}")


def bound_fields(fields: dict[str, Any]) -> None:
    """Every list and map of a body's top level that has a bound."""
    for name, value in fields.items():
        if name in BOUNDS and isinstance(value, list | dict):
            bound(name if name != "prompt" or _is_many(value) else "prompt[]", value, name)


def bound_depth(value: Any, where: str) -> None:
    """Raises InvalidRequest for a value that is nested too deep."""
    level = [value]
    for _ in range(DEPTH):
        level = [child for item in level for child in _children(item)]
        if not level:
            return
    raise InvalidRequest(f"{where} is nested deeper than {DEPTH} levels")


def _children(value: Any) -> list[Any]:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [item for item in items if isinstance(item, list | dict)]


def _is_many(prompt: Any) -> bool:
    """Whether it is a list of prompts, not one prompt's token ids."""
    return bool(prompt) and isinstance(prompt, list) and isinstance(prompt[0], str | list)
