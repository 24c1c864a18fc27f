"""Converts a client's chat messages to the input of a chat template. Shared by HTTP and gRPC.

What a template may read is checked and passed on; everything else in a message is ordinary history and ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from tercet.errors import InvalidRequest
from tercet.roles.gateway.bounds import ID_CHARS, JSON_NODES, MOST_PARTS, NAME_CHARS, bound, bound_depth
from tercet.roles.gateway.images import MOST_IMAGES, PARTS, ImagePart, image_part
from tercet.roles.gateway.json_body import json_object

ROLES = ("assistant", "developer", "system", "tool", "user")
OLD_ROLES = {"function": "tool"}  # what `tool` was once called
SILENT_ROLES = ("assistant", "tool")  # may have no content: a call of a tool, an empty result
TEXT_OF = {  # type of a part -> where its text stands
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
}
THOUGHTS = ("reasoning", "redacted_thinking", "thinking")  # parts of an assistant's turn that are no text of it
NAMES = {"name": NAME_CHARS, "tool_call_id": ID_CHARS}  # -> most characters


def messages_of(messages: Sequence[Any]) -> tuple[tuple[dict[str, Any], ...], tuple[ImagePart, ...]]:
    """-> messages for the template, and the images in their order. Raises InvalidRequest naming what is wrong."""
    if not messages:
        raise InvalidRequest("messages must not be empty")
    bound("messages", messages)
    parts = sum(len(m["content"]) for m in messages if isinstance(m, dict) and isinstance(m.get("content"), list))
    if parts > MOST_PARTS:
        raise InvalidRequest(f"messages take at most {MOST_PARTS} content parts in all, got {parts}")
    images: list[ImagePart] = []
    kept = tuple(_message(f"messages[{i}]", message, images) for i, message in enumerate(messages))
    if len(images) > MOST_IMAGES:
        where = images[MOST_IMAGES].where
        raise InvalidRequest(f"{where}: messages take at most {MOST_IMAGES} images in all, got {len(images)}")
    _read_arguments([call["function"] for message in kept for call in message.get("tool_calls", ())])
    return kept, tuple(images)


def text_of(text: str, where: str) -> str:
    """Raises InvalidRequest for half a surrogate pair, which JSON can spell."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{where} is not valid Unicode (lone surrogate at {error.start})") from error
    return text


def _message(where: str, message: Any, images: list[ImagePart]) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InvalidRequest(f"{where} must be an object, got {type(message).__name__}")
    role = message.get("role")
    role = OLD_ROLES.get(role, role) if isinstance(role, str) else role
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidRequest(f"{where}.role must be one of {', '.join(ROLES)}, got {shown(role)}")
    content = _content(role, message.get("content"), f"{where}.content", images)
    kept: dict[str, Any] = {"role": role, "content": content}
    for name, most in NAMES.items():
        if message.get(name) is not None:
            kept[name] = _name(message[name], f"{where}.{name}", most)
    reasoning = message.get("reasoning_content")
    if role == "assistant" and isinstance(reasoning, str) and reasoning:
        kept["reasoning_content"] = text_of(reasoning, f"{where}.reasoning_content")
    if role == "assistant" and message.get("tool_calls"):
        kept["tool_calls"] = _tool_calls(message["tool_calls"], f"{where}.tool_calls")
    elif role == "assistant" and message.get("function_call"):  # what a tool call was once
        kept["tool_calls"] = [_tool_call({"function": message["function_call"]}, f"{where}.function_call")]
    return kept


def _content(role: str, content: Any, where: str, images: list[ImagePart]) -> str | list[dict[str, str]]:
    """A text, or a list of text parts, which are joined by newlines as in vLLM; with images among them, the parts."""
    if isinstance(content, str):
        return text_of(content, where)
    if content is None and role in SILENT_ROLES:
        return ""
    if not isinstance(content, list):
        raise InvalidRequest(f"{where} must be a text or a list of text parts, got {shown(content)}")
    bound("messages[].content", content, where)
    before = len(images)
    parts = list(_parts(role, content, where, images))
    return parts if len(images) > before else "\n".join(part["text"] for part in parts)


def _parts(role: str, content: Iterable[Any], where: str, images: list[ImagePart]) -> Iterable[dict[str, str]]:
    for i, part in enumerate(content):
        if isinstance(part, dict) and part.get("type") in PARTS:
            images.append(image_part(part, f"{where}[{i}]"))
            yield {"type": "image"}
            continue
        kind = "text" if isinstance(part, str) else part.get("type") if isinstance(part, dict) else None
        if role == "assistant" and kind in THOUGHTS:
            continue
        name = TEXT_OF.get(kind) if isinstance(kind, str) else None
        text = part if isinstance(part, str) else part.get(name) if name else None
        if not isinstance(text, str):
            raise InvalidRequest(f"{where}[{i}] must be a text or an image part, got {shown(kind or part)}")
        yield {"type": "text", "text": text_of(text, f"{where}[{i}]")}


def _name(name: Any, where: str, most: int = NAME_CHARS) -> str:
    if not isinstance(name, str) or len(name) > most:
        raise InvalidRequest(f"{where} must be a text of at most {most} characters, got {shown(name)}")
    return text_of(name, where)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise InvalidRequest(f"{where} must be a list, got {shown(calls)}")
    bound("messages[].tool_calls", calls, where)
    bound_depth(calls, where)
    return [_tool_call(call, f"{where}[{i}]") for i, call in enumerate(calls)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    custom = isinstance(call, dict) and call.get("type") == "custom"
    function = call.get("custom" if custom else "function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise InvalidRequest(f"{where} must be an object with a function, got {shown(call)}")
    arguments = function.get("input" if custom else "arguments") or {}
    kept = {"name": _name(function.get("name") or "", f"{where}.function.name"), "arguments": arguments}
    text_of(json.dumps(kept["arguments"], ensure_ascii=False), f"{where}.function.arguments")
    identity = {"id": _name(call["id"], f"{where}.id", ID_CHARS)} if isinstance(call.get("id"), str) else {}
    return {"type": "function", "function": kept, **identity}


def _read_arguments(functions: Sequence[dict[str, Any]]) -> None:
    """Templates read the arguments as values, where OpenAI has them as JSON in a text."""
    texts = [f for f in functions if isinstance(f["arguments"], str)]
    nodes = sum(f["arguments"].count("{") + f["arguments"].count("[") for f in texts)
    if nodes > JSON_NODES:
        raise InvalidRequest(f"messages hold {nodes} lists and objects in tool calls; at most {JSON_NODES} are read")
    for function in texts:
        # Arguments that are not JSON stay the text that the model wrote.
        with suppress(InvalidRequest):
            value = json_object(function["arguments"].encode())
            bound_depth(value, "arguments")
            function["arguments"] = value


def shown(value: Any) -> str:
    """A client's value for an error message: short, whatever it is."""
    if isinstance(value, str):
        return repr(value[:60])
    if isinstance(value, list | dict):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{value!r:.60}"
