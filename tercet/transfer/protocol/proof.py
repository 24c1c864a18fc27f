"""HELLO and WELCOME with their proofs of the cluster's secret.

    D>P  CHALLENGE(nonce)      P>D  HELLO(..., nonce, proof)      D>P  WELCOME(..., proof)

A proof answers the other end's nonce and vouches for the whole message that carries it.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from tercet import secret
from tercet.errors import PeerMismatch
from tercet.transfer.protocol.messages import Hello, Welcome, encode

Proven = Hello | Welcome
_Proven = TypeVar("_Proven", Hello, Welcome)


def signed(message: _Proven, token: str, nonce: bytes) -> _Proven:
    """The message with its proof; `nonce` is the receiver's."""
    return dataclasses.replace(message, proof=secret.proof(token, nonce, _bare(message)))


def check(message: Proven, token: str, nonce: bytes) -> None:
    """Raises PeerMismatch unless its sender knows the token."""
    if not secret.proves(message.proof, token, nonce, _bare(message)):
        raise PeerMismatch(f"{message.worker_id} does not know this cluster's token")


def _bare(message: Proven) -> bytes:
    return encode(dataclasses.replace(message, proof=b""))
