"""How two processes of a cluster prove to each other that they know its secret, which itself never crosses a wire.

Each sends a nonce, and answers the other's with a keyed digest (HMAC-SHA256) of it and of what else it vouches for.
So a proof is good for one connection and one direction, and who listens has nothing to replay.
"""

from __future__ import annotations

import hmac
import secrets

NONCE_BYTES = 16


def nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


def proof(secret: str, *parts: bytes) -> bytes:
    """Of knowing `secret`, and of nothing but these parts, in this order."""
    lengths = b"".join(len(part).to_bytes(8, "big") for part in parts)
    return hmac.digest(secret.encode(), lengths + b"".join(parts), "sha256")


def proves(given: bytes, secret: str, *parts: bytes) -> bool:
    return hmac.compare_digest(given, proof(secret, *parts))
