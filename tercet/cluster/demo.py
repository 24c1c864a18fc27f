"""What `make demo` does once the cluster is ready: one question over HTTP, its answer as it comes, one table; and
`make demo-vision` the same for each of some pictures. If the model has experts, a table says who computed which."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from tercet.client import Client, Messages, image_part
from tercet.cluster.tables import experts_table, timings_table
from tercet.errors import WorkerLost

if TYPE_CHECKING:
    from tercet.roles.gateway.gateway import GatewayInfo

QUESTION = "What is the capital of France?"
ABOUT_IMAGE = "What is in the picture?"
MAX_TOKENS = 64
TOLD_S = 2.0  # ranks tell each second what they have computed, and the controller asks for it


def show(info: GatewayInfo, cluster: str, images: Sequence[Path] = ()) -> None:
    """Raises TercetError."""
    ask(info, images)
    show_experts(cluster)


def ask(info: GatewayInfo, images: Sequence[Path] = ()) -> None:
    """Without images QUESTION, else of each ABOUT_IMAGE. Raises TercetError if an answer does not come whole."""
    if not images:
        _ask(info, QUESTION, QUESTION)
    for image in images:
        content = [image_part(image), {"type": "text", "text": ABOUT_IMAGE}]
        _ask(info, f"{image} {ABOUT_IMAGE}", [{"role": "user", "content": content}])


def _ask(info: GatewayInfo, shown: str, messages: Messages) -> None:
    console = Console()
    console.print(f"\n> {shown}", style="bold", highlight=False, markup=False, soft_wrap=True)
    with Client(info.http_url).stream(messages, temperature=0, max_tokens=MAX_TOKENS) as answer:
        for piece in answer:
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    console.print("\n")
    if answer.result is None:
        raise WorkerLost("the answer came without its timings")
    console.print(timings_table(answer.result.timings))


def show_experts(cluster: str) -> None:
    """Nothing if the model has none. Raises ClusterError."""
    from tercet.cluster import remote  # it imports Ray

    if experts_table(remote.ask(cluster, "health")).row_count:
        time.sleep(TOLD_S)
        Console().print(experts_table(remote.ask(cluster, "health")))
