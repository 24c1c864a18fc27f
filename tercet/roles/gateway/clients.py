"""Identifies the client of a request: whose turn it is, and whose the images are that were kept."""

from __future__ import annotations

import hashlib


def client_of(authorization: bytes, address: str) -> str:
    """By a digest of the API key, else by address. The key is not checked here, so a client with many keys counts as
    many clients."""
    if authorization:
        return f"key-{hashlib.sha256(authorization).hexdigest()[:32]}"
    return f"address-{address}"
