"""What `make demo` does once the cluster is ready: one question over HTTP, its answer as it comes, one table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from tercet.client import Client
from tercet.cluster.tables import timings_table
from tercet.errors import WorkerLost

if TYPE_CHECKING:
    from tercet.roles.gateway.gateway import GatewayInfo

QUESTION = "What is the capital of France?"
MAX_TOKENS = 64


def ask(info: GatewayInfo) -> None:
    """Raises TercetError if the answer does not come whole."""
    console = Console()
    console.print(f"\n> {QUESTION}", style="bold", highlight=False)
    with Client(info.http_url).stream(QUESTION, temperature=0, max_tokens=MAX_TOKENS) as answer:
        for piece in answer:
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    console.print("\n")
    if answer.result is None:
        raise WorkerLost("the answer came without its timings")
    console.print(timings_table(answer.result.timings))
