"""A body's bytes to a JSON object, whatever they are, in bounded time: tenths of a second for the worst 4 MB."""

from __future__ import annotations

import re
from typing import Any

from pydantic_core import from_json

from tercet.errors import InvalidRequest
from tercet.roles.gateway.bounds import JSON_NODES

_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


def json_object(body: bytes) -> dict[str, Any]:
    """Of equal keys the last one counts. Raises InvalidRequest."""
    _bound_nodes(body)
    try:
        body.decode("utf-8")  # from_json does not say where
        # Every text of a cache of strings would be kept; it serves only bodies with many equal ones.
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
    """A parsed list or map costs far more than its two bytes, so they are counted first; most bodies at a glance."""
    if body.count(b"{") + body.count(b"[") <= JSON_NODES:
        return
    bare = _STRING.sub(b"", body)
    nodes = bare.count(b"{") + bare.count(b"[")
    if nodes > JSON_NODES:
        raise InvalidRequest(f"the body holds {nodes} JSON lists and objects; at most {JSON_NODES} are read")
