"""Who asks: whether it is let in, whose turn it is, and whose the images are that were kept."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from tercet.metrics import ANONYMOUS
from tercet.roles.gateway.keys import Key, KeyRing


@dataclass(frozen=True)
class Caller:
    client: str  # in whose queue its requests wait
    key: Key | None = None  # None: none is asked for

    @property
    def label(self) -> str:
        """Its name in metrics."""
        return ANONYMOUS if self.key is None else self.key.name


class Door:
    """Of both ports."""

    def __init__(self, api_keys: str | None) -> None:
        """api_keys: `gateway.api_keys`. Raises SpecError."""
        self._keys = None if api_keys is None else KeyRing(api_keys)

    def caller(self, authorization: bytes, address: str, *, from_page: bool = False) -> Caller:
        """from_page: as `KeyRing.owner`. Raises Unauthenticated."""
        if self._keys is None:
            return anybody(authorization, address)
        key = self._keys.owner(authorization, from_page=from_page)
        return Caller(f"name-{key.name}", key)


def anybody(authorization: bytes, address: str) -> Caller:
    """Where no key is asked for: by a digest of what is given as one, which is not checked, so that who gives many
    counts as many; else by address."""
    if authorization:
        return Caller(f"key-{hashlib.sha256(authorization).hexdigest()[:32]}")
    return Caller(f"address-{address}")
