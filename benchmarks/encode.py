"""Where images are encoded, on equal cores, in one run: `aggregated`, `e-pd` and `epd` on two cores each.

    python -m benchmarks.encode --rounds 5 --result encode.json

Starts one cluster after the other (`tercet serve`, workers pinned to cores) and measures, round by round: an open loop
with the arrivals and sizes of a trace (ServeGen's images, scaled down to this model), at several rates and images a
request; a request of 8 images with nothing else to do; an image that was seen before under a text that was not; and the
most memory that the workers took. No two images are equal but where that is measured.
"""

from __future__ import annotations

import asyncio
import base64
import csv
import gzip
import io
import json
import os
import signal
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import numpy as np
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks import progress
from benchmarks.encode_model import MERGE, PATCH, save_model
from benchmarks.topologies import serve_command

TRACE = Path("../shared/traces/servegen_mm_image_peak_1h.csv.gz")
SCALE = 8  # tokens of the trace for one here
PORT = 18400
START_S = 180.0
ENCODE, COMPUTE = {"cpu_affinity": [0]}, {"cpu_affinity": [1]}
TOPOLOGIES: dict[str, dict[str, Any]] = {  # roles on two cores; a third worker runs on either
    "aggregated": {"aggregated": {"replicas": 2, "cpu_affinity": [0, 1]}},
    "e-pd": {"encode": ENCODE, "aggregated": COMPUTE},
    "epd": {"encode": ENCODE, "prefill": COMPUTE, "decode": {}},
}
Figures = dict[str, float]


@dataclass(frozen=True)
class Asked:
    at: float  # seconds after the start
    text: str
    images: list[bytes]
    output: int


@contextmanager
def serving(topology: str, model: Path, **changes: Any) -> Iterator[str]:
    """-> the cluster's URL."""
    roles = {
        name: {"cpus": 0.1, "kv": {"blocks": 1024}, "pool": "cpu"} | its for name, its in TOPOLOGIES[topology].items()
    }
    for name, more in changes.items():
        roles[name] = roles[name] | more
    roles = {name: {k: v for k, v in its.items() if (name, k) != ("encode", "kv")} for name, its in roles.items()}
    spec = {
        "model": {"source": str(model), "max_context": 4096},
        "topology": topology,
        "pools": {"cpu": {"accelerator": "cpu"}},
        "roles": roles,
        "limits": {"max_body_bytes": 1 << 25},
    }
    file = model.parent / f"{topology}.yaml"
    file.write_text(json.dumps(spec))  # JSON is YAML
    process = subprocess.Popen(serve_command("encode", PORT, str(file), ()), stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_S
        while not _is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{topology} did not become ready")
            time.sleep(0.3)
        yield f"http://127.0.0.1:{PORT}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _is_ready() -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/ready", timeout=5):  # our own server
            return True
    except OSError:
        return False


def picture(tokens: int, rng: np.random.Generator) -> bytes:
    """Of about so many tokens, as a PNG."""
    side = max(1, round(tokens**0.5)) * PATCH * MERGE
    small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))  # a noisy one would be a large file
    file = io.BytesIO()
    small.resize((side, side)).save(file, "PNG")
    return file.getvalue()


def workload(count: int, images: int, rate: float, seed: int) -> list[Asked]:
    """From the trace's rows: gaps scaled to `rate` images a second, the images of as many requests joined in one."""
    rng = np.random.default_rng(seed)
    with gzip.open(TRACE, "rt") as file:
        rows = list(islice(csv.DictReader(file), seed * count, (seed + 1) * count))
    start, span = float(rows[0]["t_s"]), float(rows[-1]["t_s"]) - float(rows[0]["t_s"])
    asked = []
    for row in rows:
        sizes = [int(each) // SCALE for each in (row["image_tokens"] or "400").split("|")]
        shown = [picture(min(256, max(4, sizes[i % len(sizes)])), rng) for i in range(images)]
        at = (float(row["t_s"]) - start) / max(span, 1e-9) * (count - 1) * images / rate
        text = "".join(map(chr, rng.integers(97, 123, min(256, max(8, int(row["text_tokens"]) // SCALE)))))
        asked.append(Asked(at, text, shown, min(32, max(2, int(row["output_tokens"]) // SCALE))))
    return asked


async def send(session: aiohttp.ClientSession, asked: Asked) -> Figures:
    content = [{"type": "image_url", "image_url": {"url": _uri(image)}} for image in asked.images]
    body = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": asked.text}, *content]}],
        "max_tokens": asked.output,
        "temperature": 0,
        "ignore_eos": True,
    }
    async with session.post("/v1/chat/completions", json=body) as response:
        answer = await response.json()
        if response.status != 200:
            raise SystemExit(f"HTTP {response.status}: {answer}")
    return {name: 1e3 * value for name, value in answer["timings"].items() if name.endswith("_s")}


def _uri(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


async def run(url: str, asked: Sequence[Asked]) -> list[Figures]:
    """Each at its time. Milliseconds."""
    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(600)) as session:

        async def at_its_time(one: Asked) -> Figures:
            await asyncio.sleep(one.at)
            return await send(session, one)

        return list(await asyncio.gather(*map(at_its_time, asked)))


def median(found: Sequence[Figures], key: str) -> float:
    return statistics.median(each[key] for each in found)


def peaks() -> Figures:
    """MiB that a worker's process of each role has taken at most since the last call, or since it began."""
    command = [serve_command("encode", PORT, "", ())[0], "status", "--json", "--name", "bench-encode"]
    status = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    found: Figures = {}
    for worker in status["workers"].values():
        process = Path(f"/proc/{worker['pid']}")
        lines = (process / "status").read_text().splitlines()
        high = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        found[worker["role"]] = max(found.get(worker["role"], 0.0), high / 1024)
        (process / "clear_refs").write_text("5")  # forget the highest so far: proc_pid_clear_refs(5)
    return found


def _peak_of(url: str, images: int, rounds: int) -> Figures:
    """Of requests with so many images, one at a time."""
    alone(url, images, rounds, 10 + images)
    return peaks()


def loops(url: str, rates: Sequence[float], counts: Sequence[int], rounds: int, requests: int) -> dict[str, Figures]:
    """Medians over the rounds of each round's medians, and the spread of the first one's."""
    cells: dict[str, list[Figures]] = {}
    for number in progress.rounds(range(rounds), "open loops"):
        for images in counts:
            for at, rate in enumerate(rates):  # other requests for each, or the caches would answer
                asked = workload(requests, images, rate, number * len(rates) + at)
                found = asyncio.run(run(url, asked))
                cells.setdefault(f"{images} x {rate:g}/s", []).append(
                    {key: median(found, key) for key in ("ttft_s", "tpot_s", "encode_s", "embed_transfer_s")}
                    | {"p90_ttft_s": float(np.percentile([each["ttft_s"] for each in found], 90))}
                )
    return {cell: {key: median(each, key) for key in each[0]} for cell, each in cells.items()}


def alone(url: str, images: int, rounds: int, seed: int, *, seen: bool = False) -> float:
    """Median ms to the first token of a request that has the cluster to itself. seen: the same images each time."""
    found = []
    for number in progress.rounds(range(rounds + 1), "closed loops"):
        rng = np.random.default_rng(seed if seen else seed + 1000 * number)
        shown = [picture(64, rng) for _ in range(images)]
        text = f"{number} of {seed} " * 2
        [one] = asyncio.run(run(url, [Asked(0.0, text, shown, 2)]))
        found.append(one)
    return median(found[1:], "ttft_s")  # the first one warms


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    requests: Annotated[int, typer.Option(min=2, help="of each round and cell")] = 6,
    rate: Annotated[list[float], typer.Option(help="images a second")] = [4.0, 12.0],  # noqa: B006  # typer's way
    images: Annotated[list[int], typer.Option(help="a request")] = [1, 4, 16],  # noqa: B006
    result: Annotated[Path | None, typer.Option(help="where the JSON goes")] = None,
) -> None:
    everything: dict[str, Any] = {"cores": os.cpu_count(), "requests": requests, "rounds": rounds}
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        save_model(model)
        for topology in TOPOLOGIES:
            with serving(topology, model) as url:
                told = everything[topology] = {"start_mib": peaks()}
                told["loops"] = loops(url, rate, images, rounds, requests)
                told["alone_8_ms"] = alone(url, 8, rounds, 1)
                told["seen_4_ms"] = alone(url, 4, rounds, 2, seen=True)
                peaks()
                told["peak_mib"] = {count: _peak_of(url, count, rounds) for count in (1, 16, 48)}
        free = {"cpu_affinity": None}  # two encode workers and another one have two cores
        variants = {
            "one encode worker": {"encode": free, "aggregated": free},
            "two encode workers": {"encode": free | {"replicas": 2}, "aggregated": free},
            "no cache": {"encode": {"images": {"cache_bytes": 0}}},
        }
        for name, changes in variants.items():
            with serving("e-pd", model, **changes) as url:
                told = everything[name] = {"alone_8_ms": alone(url, 8, rounds, 1)}
                told["seen_4_ms"] = alone(url, 4, rounds, 2, seen=True)
    show(everything)
    if result is not None:
        result.write_text(json.dumps(everything, indent=1) + "\n")


def show(everything: dict[str, Any]) -> None:
    table = Table("images x rate", *TOPOLOGIES, title="TTFT, p90 of it, TPOT: ms")
    for cell in everything["aggregated"]["loops"]:
        told = [everything[name]["loops"][cell] for name in TOPOLOGIES]
        table.add_row(cell, *(f"{t['ttft_s']:,.0f}, {t['p90_ttft_s']:,.0f}, {t['tpot_s']:,.1f}" for t in told))
    Console().print(table)
    rest = {
        name: {key: value for key, value in told.items() if key != "loops"}
        for name, told in everything.items()
        if isinstance(told, dict)
    }
    Console().print(rest)


if __name__ == "__main__":
    typer.run(main)
