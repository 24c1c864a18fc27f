"""`tercet top`: the cluster on one screen, drawn anew each second, also while it is gone and when it is back."""

from __future__ import annotations

import contextlib
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.bar import Bar
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tercet.client import Client
from tercet.cluster import asking_gateway
from tercet.cluster.explaining import list_table, seconds
from tercet.errors import SpecError, TercetError

EVERY_S = 1.0
LISTED = 10  # requests
WIDE = 90  # columns, from which links stand beside workers
END_KEYS = ("q", "Q")
LIVE, GOOD, BAD = "live", "green", "red"

State = Mapping[str, Any]


def look(gateway: Client) -> dict[str, Any]:
    """Raises TercetError."""
    return asking_gateway.state(gateway, time.time() - 3) | {"requests": asking_gateway.requests(gateway, LISTED)}


def watch(ask: Callable[[], State]) -> None:
    """Until q or Ctrl-C. ask: raises TercetError while there is nobody to ask. Raises SpecError without a terminal."""
    console, state = Console(), None
    if not console.is_terminal:
        raise SpecError("top: this is no terminal; use --once or --json")
    with contextlib.suppress(KeyboardInterrupt), _keys() as pressed, Live(console=console, screen=True) as live:
        while True:
            fault: TercetError | None = None
            try:
                state = ask()
            except TercetError as error:
                fault = error
            live.update(screen(state, console.width, fault), refresh=True)
            if pressed(EVERY_S) in END_KEYS:
                return


def screen(state: State | None, width: int, fault: TercetError | None) -> Group:
    """state: as `look` gives it, or the last one that was told; fault: why there is no newer one."""
    parts: list[RenderableType] = []
    if fault is not None:
        parts.append(Text(f"{fault.code()}: {fault}; asked again each second, q ends", f"bold {BAD}"))
    if state is None:
        return Group(*parts)
    workers, links = _workers(state, width), _links(state)
    if links.row_count and width >= WIDE:
        beside = Table.grid(padding=(0, 3))
        beside.add_row(workers, links)
        parts += [_head(state), beside]
    else:
        parts += [_head(state), workers, *([links] if links.row_count else [])]
    return Group(*parts, list_table(state["requests"], width))


def _head(state: State) -> Text:
    point = state["points"][-1] if state["points"] else {}
    ready = ("ready", GOOD) if state["ready"] else (f"not ready: {state['reason']}", BAD)
    told = [
        f"{state['inflight']} in flight",
        f"{point.get('waiting', 0)} waiting",
        f"{point.get('tokens_out', 0):.0f} tokens/s out",
        f"{point.get('tokens_in', 0):.0f} in",
        f"TTFT p50 {seconds(point.get('ttft_p50')) or '-'}, p99 {seconds(point.get('ttft_p99')) or '-'}",
        f"TPOT p50 {seconds(point.get('tpot_p50')) or '-'}, p99 {seconds(point.get('tpot_p99')) or '-'}",
    ]
    return Text.assemble((state["cluster"], "bold"), " ", ready, f" · {state['model']}\n", " · ".join(told))


def _workers(state: State, width: int) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("worker", "role", "state", "run", "wait"):
        table.add_column(column, no_wrap=True, justify="right" if column in {"run", "wait"} else "left")
    table.add_column("KV in use", min_width=6, width=14 if width >= WIDE else 8)
    for worker in state["workers"]:
        load = worker["load"] or {}
        good = worker["state"] == LIVE
        shown = Text(worker["state"] if good else f"✕ {worker['state']}", GOOD if good else BAD)
        use = load.get("kv_use")
        bar: RenderableType = "" if use is None else Bar(1.0, 0.0, use)
        counts = [str(load[key]) if load else "" for key in ("running", "waiting")]
        table.add_row(worker["id"], worker.get("role", ""), shown, *counts, bar)
    return table


def _links(state: State) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("link", overflow="fold")
    table.add_column("by", no_wrap=True)
    table.add_column("MB/s", justify="right", no_wrap=True)
    table.add_column("in all", justify="right", no_wrap=True)
    for pair in state["pairs"]:
        rate, total = f"{pair['bytes_per_s'] / 1e6:.2f}", f"{pair['bytes'] / 1e6:,.1f} MB"
        by = Text("✕ cut off", BAD) if pair["fault"] else Text(pair["transport"])
        table.add_row(f"{pair['from']} → {pair['to']}", by, rate, total)
    return table


def _no_key(timeout_s: float) -> str:
    time.sleep(timeout_s)
    return ""


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """A function that waits so many seconds for a key, without Enter; Ctrl-C stays what it is."""
    if not sys.stdin.isatty():
        yield _no_key
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield lambda timeout_s: sys.stdin.read(1) if select.select([sys.stdin], [], [], timeout_s)[0] else ""
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
