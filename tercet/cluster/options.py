"""Options that several commands have, and what they mean."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from tercet.cluster import run_file
from tercet.errors import SpecError

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="A cluster spec, such as configs/local.yaml.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override one key of the spec; repeatable.")
]
ClusterName = Annotated[str | None, typer.Option(help="The cluster's name; may be left out if there is only one.")]
Address = Annotated[str | None, typer.Option(help="host:port of the Ray it runs in; default: this machine's clusters.")]
Url = Annotated[str | None, typer.Option(help="Base URL of the endpoint; default: the cluster served here.")]
ApiKey = Annotated[
    str | None,
    typer.Option(envvar="TERCET_API_KEY", help="For a gateway that asks for one."),
]
Authorities = Annotated[
    Path | None,
    typer.Option("--ca", envvar="TERCET_CA", help="Whose certificates are trusted (PEM); default: the system's."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def where(name: str | None, address: str | None) -> tuple[str | None, str]:
    """A cluster's name and its Ray's address. Call it before Ray is imported, which reads its environment then.
    Raises ClusterError."""
    if address is not None:
        return name, address
    here = run_file.find_reachable(name)
    os.environ.update(here.ray_environment)
    return here.name, here.ray_address


def refuse_unwritable(option: str, path: Path | None) -> None:
    """Creates nothing: that a file exists may have a meaning. Raises SpecError."""
    if path is None:
        return
    there = not path.is_dir() and os.access(path, os.W_OK)
    if not (there if path.exists() else path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise SpecError(f"{option} {path}: cannot be written")
