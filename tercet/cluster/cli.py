"""The `tercet` command. Torch and Ray are imported by the commands that need them, so that the others start fast.

Exit codes: 0 done (`serve`: it was ready, and was asked to end); 1 failed; 2 the spec or the command line is wrong;
130 interrupted (`serve`: before it was ready).
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from tercet import logs
from tercet.cluster import bounded, output, run_file
from tercet.cluster.changing_cli import register as register_changing
from tercet.cluster.experts_cli import app as experts_app
from tercet.cluster.keys_cli import app as keys_app
from tercet.cluster.options import (
    Address,
    ApiKey,
    AsJson,
    Authorities,
    ClusterName,
    Settings,
    SpecPath,
    Url,
    refuse_unwritable,
    where,
)
from tercet.cluster.spec_file import load_spec
from tercet.cluster.watching_cli import register as register_watching
from tercet.errors import SpecError, TercetError
from tercet.spec import ClusterSpec

if TYPE_CHECKING:
    from tercet.roles.gateway.gateway import GatewayInfo

app = typer.Typer(
    help="Serve language models through separate prefill and decode workers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(experts_app, name="experts")
app.add_typer(keys_app, name="keys")
register_watching(app)
register_changing(app)


def main() -> None:
    """Entry point. A TercetError is a line on stderr, never a traceback."""
    output.open_closed()
    code: str | int | None = 0
    try:
        app()
    except SystemExit as end:
        code = end.code
    except TercetError as error:
        for line in str(error).splitlines():  # a spec may have several faults
            output.report(line, logging.ERROR)
        code = 2 if isinstance(error, SpecError) else 1
    except KeyboardInterrupt:
        code = 130
    if bounded.left_behind():  # a thread is stuck in foreign code, whose exit handlers would wait for it
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)
    sys.exit(code)


@app.callback(invoke_without_command=True)
def _options(
    show: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    if show:
        typer.echo(f"tercet {version('tercet')}")
        raise typer.Exit


@app.command()
def validate(spec: SpecPath, settings: Settings = None, as_json: AsJson = False) -> None:
    """Check a spec; start nothing."""
    checked = load_spec(spec, settings or ())
    if checked.ray.address == "local":
        _refuse_missing_transport(checked)
    roles = ", ".join(f"{role.replicas} {name}" for name, role in checked.roles.items())
    unread = ""
    if any(role.parallelism.ranks > 1 for role in checked.roles.values()):
        from tercet.cluster import preflight

        if not preflight.check_degrees_if_here(checked):
            unread = "; the model is not here, so whether the degrees divide it was not checked"
    if as_json:
        counts = {name: role.replicas for name, role in checked.roles.items()}
        facts = {"valid": True, "cluster": checked.name, "topology": checked.topology, "roles": counts}
        typer.echo(json.dumps(facts | {"degrees_unchecked": bool(unread)}))
        return
    typer.echo(f"{spec} is valid: cluster {checked.name}, topology {checked.topology}, {roles}{unread}")


@app.command("spec")
def show_spec(spec: SpecPath, settings: Settings = None) -> None:
    """Print a spec with every key that it could have, what each means, and its value here."""
    from tercet.cluster.spec_text import spec_text

    typer.echo(spec_text(load_spec(spec, settings or ())), nl=False)


@app.command()
def plan(spec: SpecPath, settings: Settings = None, address: Address = None, as_json: AsJson = False) -> None:
    """Show what would be placed where; start nothing. Without --address, on a Ray of this machine alone."""
    from tercet.cluster.tables import plan_facts, plan_table
    from tercet.placement import roles

    checked = load_spec(spec, settings or ())
    if address is None:
        _refuse_missing_transport(checked)
        nodes = [roles.local_node(checked)]
    else:
        from tercet.cluster import remote

        nodes = remote.nodes(address)
    placed = roles.plan(checked, nodes)
    if address is None:
        from tercet.cluster import preflight

        preflight.check_model(checked, output.report if as_json else typer.echo)
        preflight.refuse_what_does_not_fit(checked)
    if as_json:
        typer.echo(json.dumps(plan_facts(checked, placed)))
        return
    Console().print(plan_table(checked, placed))
    asked, cores = nodes[0].resources.get("CPU", 0), os.cpu_count() or 1
    if address is None and asked > cores:
        typer.echo(f"The workers ask for {asked:g} CPUs and this machine has {cores}: they will share cores.")


@app.command()
def serve(
    spec: SpecPath,
    settings: Settings = None,
    ready_file: Annotated[Path | None, typer.Option(help="Write the URL here once the cluster is ready.")] = None,
) -> None:
    """Start a cluster and serve until Ctrl-C or `tercet down`."""

    checked = load_spec(spec, settings or ())
    output.use(checked.logging)
    refuse_unwritable("--ready-file", ready_file)

    def ready(info: GatewayInfo) -> None:
        _announce(info)
        if ready_file is not None:
            with run_file.reaching(ready_file):
                ready_file.write_text(f"{info.http_url}\n")

    _serve(checked, ready, None)


@app.command()
def doctor(
    spec: Annotated[Path | None, typer.Argument(metavar="[SPEC]", help="Also what this spec names.")] = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Say what this machine can use: transports, with their speed, accelerators, kernels; and of SPEC its files, its
    ports, and who would listen where."""
    from tercet.cluster import doctor as checks
    from tercet.cluster.tables import doctor_table

    checked = None if spec is None else load_spec(spec, settings or ())
    with output.Waiting("looking at this machine"), output.foreign_silenced():
        found = [*([] if checked is None else checks.of_spec(checked)), *checks.findings()]
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in found]))
    else:
        Console().print(doctor_table(found))


@app.command()
def demo(
    spec: SpecPath,
    settings: Settings = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="Ask what is in this picture instead; again for more.")
    ] = None,
) -> None:
    """Start a cluster, ask it one question, show the answer and who computed it, and stop it."""
    from tercet.cluster.demo import show

    checked = load_spec(spec, settings or ())
    if checked.gateway.api_keys or checked.gateway.tls:
        raise SpecError("gateway: the demo has no key and trusts no certificate; use `tercet serve` and `tercet chat`")
    _serve(checked, _announce, partial(show, cluster=checked.name, images=image or ()))


@app.command()
def status(
    name: ClusterName = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Show a running cluster's members and their loads."""
    from tercet.cluster.tables import experts_table, losses, pairs_table, placement_table, status_table

    name, address = where(name, address)
    from tercet.cluster import remote

    found = remote.status(name, address)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        Console().print(status_table(found))
        for line in losses(found):
            typer.echo(line)
        for table in (pairs_table(found), experts_table(found), placement_table(found)):
            if table.row_count:
                Console().print(table)


@app.command()
def chat(
    question: Annotated[str, typer.Argument(help="Ask this alone, and end.")] = "",
    image: Annotated[
        list[Path] | None, typer.Option(help="Show this file with the first question; again for more.")
    ] = None,
    name: ClusterName = None,
    url: Url = None,
    api_key: ApiKey = None,
    ca: Authorities = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="Tokens of one answer at most.")] = 512,
) -> None:
    """Talk to a running cluster."""
    from tercet.client import Client, chat_loop

    client = Client(url or run_file.find_reachable(name).http_url, api_key=api_key, ca=ca)
    if not chat_loop(client, None, question, image or (), temperature=temperature, max_tokens=max_tokens):
        raise typer.Exit(1)


def _serve(
    spec: ClusterSpec, ready: Callable[[GatewayInfo], None], visit: Callable[[GatewayInfo], None] | None
) -> None:
    from tercet.cluster.signals import Signals

    logs.configure(spec.logging, role="controller")
    signals = Signals(output.report)
    signals.install()  # before Ray is imported, which takes its time
    from tercet.cluster.serve import serve as serve_cluster

    with output.Waiting(f"starting cluster {spec.name}") as bars:

        def is_ready(info: GatewayInfo) -> None:
            bars.stop()
            ready(info)

        serve_cluster(spec, signals, output.report, bars.loading, is_ready, visit)


def _refuse_missing_transport(spec: ClusterSpec) -> None:
    from tercet.cluster.preflight import refuse_missing_transport

    refuse_missing_transport(spec)


def _announce(info: GatewayInfo) -> None:
    output.say(f"ready: {info.http_url} (OpenAI), {info.grpc_address} (gRPC)")
