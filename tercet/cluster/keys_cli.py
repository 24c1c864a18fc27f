"""`tercet keys`: the file of API keys that `gateway.api_keys` names. A running gateway reads it again by itself."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from pathlib import Path
from typing import Annotated

import typer
import yaml
from pydantic import ValidationError
from rich.console import Console

from tercet.cluster import output
from tercet.cluster.options import AsJson
from tercet.cluster.run_file import reaching
from tercet.cluster.tables import keys_table
from tercet.errors import SpecError
from tercet.roles.gateway.keys import MOST_BYTES, Key, by_digest, digest, read_keys

KEY_BYTES = 32
PREFIX = "tercet-"  # so that one that has leaked is recognised

app = typer.Typer(help="API keys of a gateway, in a file that has digests of them only.", no_args_is_help=True)

KeyPath = Annotated[Path, typer.Argument(metavar="FILE", help="The file that gateway.api_keys names.")]
KeyName = Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is: in metrics and logs.")]


@app.command()
def add(
    file: KeyPath,
    name: KeyName,
    requests_per_minute: Annotated[int | None, typer.Option(help="That it may make; default: any number.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Of prompts and answers together.")] = None,
    concurrent: Annotated[int | None, typer.Option(help="Requests that it may have at once.")] = None,
) -> None:
    """Draw a key, print it, this once, and add its digest to the file, which is made if it is not there."""
    drawn = PREFIX + secrets.token_urlsafe(KEY_BYTES)
    limits = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "concurrent": concurrent,
    }
    try:
        key = Key(name=name, sha256=digest(drawn.encode()), **limits)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise SpecError(f"{first['loc'][0]}: {first['msg']}") from error
    known = read_keys(file) if file.exists() else []
    if any(each.name == name for each in known):
        raise SpecError(f"{file}: {name} has a key already; remove it first: `tercet keys remove {file} {name}`")
    _write(file, [*known, key])
    typer.echo(drawn)
    output.report(f"{name} may call with it; it is not kept anywhere")


@app.command("list")
def show(file: KeyPath, as_json: AsJson = False) -> None:
    """Whose keys are in the file, and what each may use."""
    keys = read_keys(file)
    if as_json:
        typer.echo(json.dumps([key.model_dump() for key in keys]))
    else:
        Console().print(keys_table(keys))


@app.command()
def remove(file: KeyPath, name: KeyName) -> None:
    """Take a key out of the file. Requests that run go on."""
    keys = read_keys(file)
    left = [key for key in keys if key.name != name]
    if len(left) == len(keys):
        raise SpecError(f"{file}: there is no key of {name}")
    _write(file, left)
    output.report(f"the key of {name} is removed")


def _write(path: Path, keys: list[Key]) -> None:
    """At once, so that a gateway never reads half of it. Raises SpecError, ClusterError."""
    by_digest(keys, str(path))
    text = yaml.safe_dump({"keys": [key.model_dump(exclude_none=True) for key in keys]}, sort_keys=False)
    if len(text) > MOST_BYTES:
        raise SpecError(f"{path}: with this it would have more than {MOST_BYTES} bytes, which no gateway reads")
    with reaching(path):
        fd, part = tempfile.mkstemp(dir=path.resolve().parent, prefix=f".{path.name}-")  # readable by its user alone
        with open(fd, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(fd)
        os.replace(part, path.resolve())
