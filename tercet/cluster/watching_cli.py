"""`tercet explain` and `tercet top`: what the gateway's record and series say, in the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tercet.client import Client
from tercet.cluster import asking_gateway, run_file
from tercet.cluster.options import ApiKey, AsJson, Authorities, ClusterName, Url

RequestId = Annotated[
    str,
    typer.Argument(metavar="[REQUEST]", help="The X-Request-Id of its answer, or how that begins; none: list them."),
]


def gateway_of(name: str | None, url: str | None, api_key: str | None, ca: Path | None) -> Client:
    """Raises ClusterError if no cluster is served here."""
    return Client(url or run_file.find_reachable(name).http_url, timeout_s=10.0, api_key=api_key, ca=ca)


def explain(
    request: RequestId = "",
    name: ClusterName = None,
    url: Url = None,
    api_key: ApiKey = None,
    ca: Authorities = None,
    as_json: AsJson = False,
) -> None:
    """Say which workers a request got and why, and what each stage took; without REQUEST list the last ones."""
    from tercet.cluster import explaining

    gateway = gateway_of(name, url, api_key, ca)
    if not request:
        listed = asking_gateway.requests(gateway)
        typer.echo(json.dumps(listed)) if as_json else Console().print(explaining.list_table(listed, Console().width))
        return
    found = asking_gateway.request(gateway, request)
    same = explaining.recomputed(found)
    if as_json:
        typer.echo(json.dumps(found | {"recomputed": same}))
        return
    for part in explaining.told(found, same):
        Console().print(part)


def top(
    name: ClusterName = None,
    url: Url = None,
    api_key: ApiKey = None,
    ca: Authorities = None,
    once: Annotated[bool, typer.Option("--once", help="Show it once, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it once, as JSON.")] = False,
) -> None:
    """Watch a running cluster: workers, links, latencies and the last requests. q ends it."""
    from tercet.cluster import watching

    def gateway() -> Client:
        return gateway_of(name, url, api_key, ca)

    if as_json:
        asked = gateway()
        typer.echo(json.dumps(asking_gateway.state(asked) | {"requests": asking_gateway.requests(asked)}))
    elif once:
        console = Console()
        console.print(watching.screen(watching.look(gateway()), console.width, None))
    else:
        asking_gateway.state(gateway())  # a name or an address that is wrong ends it now
        watching.watch(lambda: watching.look(gateway()))


def register(app: typer.Typer) -> None:
    app.command()(explain)
    app.command()(top)
