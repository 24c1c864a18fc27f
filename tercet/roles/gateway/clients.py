"""Who asks: whose requests wait for each other before they wait for anybody else's."""

from __future__ import annotations

import hashlib


def client_of(authorization: bytes, address: str) -> str:
    """By the API key, of which only a digest is kept, else by address. Nobody checks the key here: it tells clients
    apart, and a client with many keys counts as many."""
    if authorization:
        return f"key-{hashlib.sha256(authorization).hexdigest()[:16]}"
    return f"address-{address}"
