"""Parses a body as a JSON object in bounded time: tenths of a second for the worst 4 MB."""

from __future__ import annotations

import re
from typing import Any

from pydantic_core import from_json

from tercet.errors import InvalidRequest
from tercet.roles.gateway.bounds import JSON_NODES

_OTHERS = bytes(set(range(256)) - set(b'"{[:'))  # bytes that are neither quotes nor counted
_STRING = re.compile(rb'"[^"]*"')


def json_object(body: bytes) -> dict[str, Any]:
    """Of equal keys the last one counts. Raises InvalidRequest."""
    _bound_nodes(body)
    try:
        body.decode("utf-8")  # from_json does not say where
        # The cache would keep strings of past bodies alive; it only helps bodies with many equal ones.
        value = from_json(body, cache_strings=False)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not valid UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        surrogate = " (\\u escapes must not leave a lone surrogate)" if "hex escape" in str(error) else ""
        raise InvalidRequest(f"the body is not valid JSON: {error}{surrogate}") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, got {type(value).__name__}")
    return value


def _bound_nodes(body: bytes) -> None:
    """A parsed list, map or key costs far more than its bytes, so they are counted first."""
    if _too_many(body) and _too_many(_outside(body)):
        raise InvalidRequest(f"the body holds more than {JSON_NODES} JSON lists and objects, or as many keys")


def _too_many(text: bytes) -> bool:
    return max(text.count(b"{") + text.count(b"["), text.count(b":")) > JSON_NODES


def _outside(body: bytes) -> bytes:
    """The brackets and colons that stand in no string, or at least too many of them."""
    bare = body.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _OTHERS)
    bare = bare.replace(b'""', b"")  # empty strings; two that touch become one, which changes nothing outside
    # Now something stands between any two strings.
    return bare.replace(b'"', b"[:") if bare.count(b'"') > 6 * JSON_NODES else _STRING.sub(b"", bare)
