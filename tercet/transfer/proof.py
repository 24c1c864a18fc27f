"""Both ends of a link prove that they know the cluster's secret, which itself never travels.

    D>P  CHALLENGE(nonce)      P>D  HELLO(..., nonce, proof)      D>P  WELCOME(..., proof)

A proof is a keyed digest (HMAC-SHA256) of the other end's nonce and of the message that carries it, so it is good for
that message on that connection only.
"""

from __future__ import annotations

import dataclasses
import hmac
import secrets
from typing import TypeVar

from tercet.errors import PeerMismatch
from tercet.transfer.messages import Hello, Welcome, encode

NONCE_BYTES = 16

Proven = Hello | Welcome
_Proven = TypeVar("_Proven", Hello, Welcome)


def nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


def signed(message: _Proven, secret: str, challenge: bytes) -> _Proven:
    """The message with its proof; `challenge` is the nonce of who will read it."""
    return dataclasses.replace(message, proof=_digest(message, secret, challenge))


def check(message: Proven, secret: str, challenge: bytes) -> None:
    """Raises PeerMismatch unless its sender knows the secret."""
    if not hmac.compare_digest(message.proof, _digest(message, secret, challenge)):
        raise PeerMismatch(f"{message.worker_id} does not know this cluster's token")


def _digest(message: Proven, secret: str, challenge: bytes) -> bytes:
    bare = encode(dataclasses.replace(message, proof=b""))
    return hmac.digest(secret.encode(), challenge + bare, "sha256")
