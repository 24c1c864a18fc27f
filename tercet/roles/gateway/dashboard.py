"""The page at /dashboard, and what it asks for.

GET /dashboard                       the page; its files below /dashboard/static/
GET /dashboard/state?since=UNIX_TIME workers, pairs, target, and points of the last ten minutes, newer than that
GET /dashboard/requests?limit=N      the last requests, 50 unless it is given, newest first
GET /dashboard/requests/{id}         one, with each choice of workers and what it was made from

Who asks in a loop must not hold up the requests, so what is long is written once for all (shared.py): half a second old
at most. What changes no more, as ended requests and points, is kept as text.
"""

from __future__ import annotations

import json
import math
import mimetypes
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib import resources
from typing import Any

from aiohttp import web

from tercet.errors import InvalidRequest, UnknownUrl
from tercet.roles.gateway.http_server import CALLER
from tercet.roles.gateway.offloop import OffLoop
from tercet.roles.gateway.records import Records
from tercet.roles.gateway.series import Series
from tercet.roles.gateway.shared import Shared
from tercet.spec import ClusterSpec

PAGE = "index.html"
HEADERS = {  # everything comes from here, and nothing may frame it
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
LISTED = 50  # requests, unless more are asked for
FRESH = {"Cache-Control": "no-store"}
MEMBER = ("role", "state", "epoch", "reason", "pid", "node", "ranks", "load")  # of what the controller tells of one

Status = Callable[[], Mapping[str, Any]]


class Dashboard:
    def __init__(self, spec: ClusterSpec, model: str, status: Status, records: Records, offloop: OffLoop) -> None:
        """status: as `Gateway.status` gives it."""
        self._spec = spec
        self._model = model
        self._status = status
        self._records = records
        self._offloop = offloop
        self.series = Series(records)
        self._listing = Shared(offloop, records.lines)
        self._overview = Shared(offloop, self._take_overview)
        self._target: Mapping[str, int] = {}
        self._members: Mapping[str, Mapping[str, Any]] = {}
        self._files = _files()

    def told(self, target: Mapping[str, int], members: Mapping[str, Mapping[str, Any]]) -> None:
        """What the controller knows (`cluster.members.overview`)."""
        self._target = target
        self._members = {name: {key: told[key] for key in MEMBER if key in told} for name, told in members.items()}

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/dashboard", self._page),
            web.get("/dashboard/", self._slash),
            web.get("/dashboard/static/{name:.+}", self._file),
            web.get("/dashboard/state", self._state),
            web.get("/dashboard/requests", self._requests),
            web.get("/dashboard/requests/{id}", self._request),
        ]

    def _take_overview(self) -> Callable[[], tuple[str, list[tuple[float, str]]]]:
        """The state as JSON and the points of the same moment, which it lacks."""
        state, points = self._state_now(), self.series.points()
        return lambda: (json.dumps(state), points)

    def _state_now(self) -> dict[str, Any]:
        status = self._status()
        return {
            "now": time.time(),
            "cluster": self._spec.name,
            "topology": self._spec.topology,
            "model": self._model,
            "ready": status["ready"],
            "reason": status["reason"],
            "inflight": status["inflight"],
            "target": dict(self._target),
            "workers": [self._worker(name, status["workers"]) for name in self._names(status["workers"])],
            "pairs": self._pairs(status["workers"]),
        }

    def _names(self, workers: Mapping[str, Any]) -> list[str]:
        return sorted({*workers, *self._members}, key=lambda name: (len(name), name))

    def _worker(self, name: str, workers: Mapping[str, Any]) -> dict[str, Any]:
        """The gateway's view and the controller's come separately, so one may be ahead of the other."""
        there: dict[str, Any] = dict(workers.get(name, {}))
        told = self._members.get(name, {})
        state = "live" if there.get("load") is not None else "unreachable"
        both: dict[str, Any] = {
            "state": state,
            "reason": "",
            "node": "",
            "pid": 0,
            "epoch": 0,
            "load": None,
            "ranks": [],
        }
        both |= {key: there[key] for key in there.keys() & {"role", "epoch", "pid", "node", "load"}}
        both |= {key: value for key, value in told.items() if key != "load" or both["load"] is None}
        if both["state"] == "live" and state == "unreachable":
            both["state"] = state  # its process lives, but no stream of the gateway to it does
        role = self._spec.roles.get(both["role"])
        return both | {"id": name, "pool": "" if role is None else role.pool, "load": _load(both["load"])}

    def _pairs(self, workers: Mapping[str, Any]) -> list[dict[str, Any]]:
        rates, total = self.series.kv_rates(), self.series.kv_bytes
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for name, worker in workers.items():
            for pair in (worker["load"] or {}).get("pairs", ()):
                told = {key: pair[key] for key in ("transport", "bandwidth", "latency_s", "fault")}
                link = name, pair["worker_id"]
                found[link] = told | {"bytes_per_s": rates.get(link, 0.0), "bytes": total.get(link, 0)}
        return [{"from": link[0], "to": link[1], **told} for link, told in sorted(found.items())]

    # ---- answers

    async def _page(self, request: web.Request) -> web.Response:
        return self._answer(PAGE)

    async def _slash(self, request: web.Request) -> web.Response:
        return web.Response(status=308, headers={"Location": "../dashboard"})

    async def _file(self, request: web.Request) -> web.Response:
        return self._answer(request.match_info["name"])

    def _answer(self, name: str) -> web.Response:
        if name not in self._files:
            raise UnknownUrl(f"the dashboard has no file {name[:80]!r}")
        kind, _ = mimetypes.guess_type(name)
        kind, charset = kind or "text/plain", "utf-8"
        return web.Response(body=self._files[name], content_type=kind, charset=charset, headers=HEADERS)

    async def _state(self, request: web.Request) -> web.Response:
        """since: Unix time of the last point that is known already."""
        since = _number(request, "since", 0.0)
        state, points = await self._overview.get()
        newer = ", ".join(text for at, text in points if at > since)
        return _json(f'{state[:-1]}, "points": [{newer}]}}')

    async def _requests(self, request: web.Request) -> web.Response:
        limit = max(0, int(_number(request, "limit", LISTED)))
        lines = await self._listing.get()
        return _json(f'{{"requests": [{", ".join(lines[:limit])}]}}')

    async def _request(self, request: web.Request) -> web.Response:
        whole = self._records.find(request.match_info["id"]).whole()
        return _json(await self._offloop.render(request[CALLER].client, lambda: json.dumps(whole())))


def _json(text: str) -> web.Response:
    return web.Response(text=text, content_type="application/json", headers=FRESH)


def _number(request: web.Request, name: str, default: float) -> float:
    """Of the URL's query. Raises InvalidRequest."""
    given = request.query.get(name, str(default))
    with suppress(ValueError):
        if math.isfinite(number := float(given)):
            return number
    raise InvalidRequest(f"{name} must be a number, got {given[:40]!r}")


def _load(load: Any) -> dict[str, Any] | None:
    """Of a worker's load, what is shown."""
    if load is None:
        return None
    told = load if isinstance(load, dict) else asdict(load)
    total, free = told["blocks_total"], told["blocks_free"]
    counts = {key: told[key] for key in ("running", "waiting", "blocks_total", "blocks_free", "preemptions")}
    images = {key: told[key] for key in ("encoder_waiting", "ranks_lost", "transfer_corrupt")}
    return counts | images | {"kv_use": 1 - free / total if total else None}


def _files() -> dict[str, bytes]:
    """Name -> contents, of the page's files and of what it was built with."""
    page = resources.files("tercet.roles.gateway") / "page"
    vendor = page / "vendor"
    found = {file.name: file.read_bytes() for file in page.iterdir() if file.is_file()}
    return found | {f"vendor/{file.name}": file.read_bytes() for file in vendor.iterdir() if file.is_file()}
