"""Tercet: a disaggregated inference cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tercet.client import Client

__all__ = ["Client"]


def __getattr__(name: str) -> type[Client]:
    """`tercet.Client` on first use, so that `import tercet.core` stays light."""
    if name != "Client":
        raise AttributeError(f"module 'tercet' has no attribute {name!r}")
    from tercet.client import Client

    return Client
