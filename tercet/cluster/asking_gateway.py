"""What the gateway tells of itself (roles/gateway/dashboard.py), over HTTP. All raise TercetError."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from tercet.client import Client


def state(gateway: Client, since: float = 0.0) -> dict[str, Any]:
    """Workers, links, and the points of the last ten minutes that are newer than a Unix time."""
    return gateway.get(f"/dashboard/state?since={since}")


def requests(gateway: Client, limit: int = 512) -> list[dict[str, Any]]:
    """The last ones that were let in, newest first."""
    return list(gateway.get(f"/dashboard/requests?limit={limit}")["requests"])


def request(gateway: Client, request_id: str) -> dict[str, Any]:
    """One of them, with each choice of workers and what it was made from. Raises UnknownRequest."""
    return gateway.get(f"/dashboard/requests/{quote(request_id, safe='')}")
