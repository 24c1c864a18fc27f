"""A request's record as text: which workers it got and why, and what each stage took. The router's policy is asked
whether it makes the same choice again."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.bar import Bar
from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from tercet.roles.router.record import again, decision_of

WIDE = 72  # columns, from which the list has all of its own
MOST_PAIRS = 8  # shown of a decision; all are in --json
MARKS = {"finished": "✓", "running": "▸", "waiting": "…", "failed": "✕", "cancelled": "-"}
STYLES = {"finished": "green", "failed": "red", "waiting": "yellow", "cancelled": "yellow"}

Told = Mapping[str, Any]


def list_table(requests: Sequence[Told], width: int) -> Table:
    """The last requests, as the gateway lists them, by as much of their ids as `tercet explain` takes."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption="" if requests else "no request has come yet")
    wide = width >= WIDE
    for column in ("request", "state", *(["came"] if wide else [])):
        table.add_column(column, no_wrap=True)
    for column in (*(["prompt", "output"] if wide else []), "TTFT", "total"):
        table.add_column(column, justify="right", no_wrap=True)
    for told in requests:
        came = time.strftime("%H:%M:%S", time.localtime(told["at"]))
        more = [came, str(told["prompt_tokens"]), str(told["output_tokens"])] if wide else []
        times = [seconds(told["timings"].get("ttft_s") or None), seconds(told["elapsed_s"])]
        table.add_row(Text(short(told["id"])), state_of(told), *more, *times)
    return table


def short(request_id: str) -> str:
    own = re.sub(r"^(chatcmpl|cmpl)-", "", request_id)
    return own[:8] if len(own) > 12 else own


def state_of(told: Told) -> Text:
    state = told["state"]
    return Text(f"{MARKS[state]} {told['code'] or state}", STYLES.get(state, ""))


def recomputed(request: Told) -> list[bool]:
    """Of each choice of workers in the record, whether the policy makes it again from what stands there."""
    found = []
    for choice in request["told"]:
        for note in choice["notes"]:
            if note["kind"] == "choice":
                decision = decision_of(note)
                found.append(again(decision) == decision)
    return found


def told(request: Told, same: Sequence[bool]) -> Iterator[RenderableType]:
    yield _facts(request)
    if request["stages"]:
        yield _timeline(request)
    for choice in request["told"]:
        if request["choices"] > 1:
            yield Text(f"\nchoice {choice['index']}", "bold")
        for note in choice["notes"]:
            yield from _choice(note) if note["kind"] == "choice" else _end(note)
        if choice["notes_left_out"]:
            yield Text(f"{choice['notes_left_out']} further notes were not kept", "dim")
    if all(same):
        yield Text("\nRecomputed from this record, the policy makes the same choices.", "dim")
    else:
        yield Text("\nThe policy of this version chooses otherwise: is the gateway of another one?", "yellow")


def _facts(request: Told) -> Table:
    t, cached = request["timings"], request["cached_tokens"]
    table = Table.grid(padding=(0, 2))
    moved = f"{t['kv_bytes']:,} bytes by {t['transport']}" if t.get("kv_bytes") else "none"
    rows = {
        "request": request["id"],
        "state": f"{request['state']} {request['code']} {request['message']}".strip(),
        "came": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(request["at"])),
        "client": request["client"],
        "model": request["model"],
        "prompt": f"{request['prompt_tokens']:,} tokens" + ("" if cached is None else f", {cached:,} of them cached"),
        "output": f"{request['output_tokens']:,} tokens in {seconds(request['elapsed_s'])}",
        "TTFT, TPOT": f"{seconds(t.get('ttft_s') or None)}, {seconds(t.get('tpot_s') or None)}",
        "KV moved": moved,
        "workers": ", ".join(f"{role}: {worker}" for role, worker in t.get("workers", {}).items()),
        "attempts": str(t.get("attempts") or ""),
    }
    for name, value in rows.items():
        if value:
            table.add_row(Text(name, "dim"), Text(value))
    return table


def _timeline(request: Told) -> Table:
    table = Table(title="stages", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage", no_wrap=True)
    table.add_column("by", overflow="fold")
    table.add_column("when", min_width=10, ratio=1)
    table.add_column("time", justify="right", no_wrap=True)
    whole = max(request["elapsed_s"], 1e-6)
    for bar in request["stages"]:
        when = Bar(whole, bar["at_s"], min(whole, bar["at_s"] + bar["seconds"]))
        table.add_row(bar["stage"].replace("_", " "), Text(bar["worker"]), when, seconds(bar["seconds"]))
    return table


def _choice(note: Told) -> Iterator[RenderableType]:
    when = f"\nat {seconds(note['at_s'])}: "
    if not note["prefill"]:
        yield Text(when + "nobody had room, so it waited in line", "yellow")
    else:
        both = note["prefill"] == note["decode"]
        pair = note["prefill"] if both else f"{note['prefill']} → {note['decode']}"
        images = "".join(f", {len(numbers)} images to {worker}" for worker, numbers in note["encode"])
        yield Text(f"{when}attempt {note['attempt']}: {pair}{images}", "bold")
    if note["pairs"]:
        yield _scores(note)
    for worker, _, role, *_, why_not, _ in note["workers"]:
        if why_not:
            yield Text(f"  {worker} ({role}): {why_not}", "dim")
    if note["left_out"]:
        yield Text(f"  {note['left_out']} more workers were not kept", "dim")


def _scores(note: Told) -> Table:
    """The first column that differs decides."""
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        caption="The first column that differs decides, the lowest wins. Load: tokens of prompts, and requests.",
    )
    table.add_column("pair", no_wrap=True)
    for column in ("KV", "fails", "strikes", "cut off", "prefill", "decode"):
        table.add_column(column, justify="right")
    for prefill, decode, (not_kept, failures, strikes, faulty, first, last) in note["pairs"][:MOST_PAIRS]:
        chosen = (prefill, decode) == (note["prefill"], note["decode"])
        pair = prefill if prefill == decode else f"{prefill} → {decode}"
        loads = [f"{tokens:,} +{requests}" for tokens, requests, _ in (first, last)]
        rules = ["no" if not_kept else "yes", str(failures), str(strikes), "yes" if faulty else "no"]
        table.add_row(Text(f"✓ {pair}" if chosen else f"  {pair}"), *rules, *loads, style="bold" if chosen else "")
    if len(note["pairs"]) > MOST_PAIRS:
        table.add_row(f"  and {len(note['pairs']) - MOST_PAIRS} more", *[""] * 6)
    return table


def _end(note: Told) -> Iterator[RenderableType]:
    by = f" by {note['worker']}" if note["worker"] else ""
    yield Text(f"\nat {seconds(note['at_s'])}: attempt {note['how']}{by}: {note['code']} {note['message']}", "red")


def seconds(value: float | None) -> str:
    """With a unit that fits; empty for None."""
    if value is None:
        return ""
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.1f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} µs"
