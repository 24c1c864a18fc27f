"""What a benchmark sends: random token ids of given lengths, or the lengths and arrival times of a trace."""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 512  # tokens that a hash id of a Mooncake trace stands for
_COLUMNS = (  # (arrival, input tokens, output tokens) as traces call them; no arrivals in the last one
    ("timestamp", "input_length", "output_length"),  # Mooncake, milliseconds
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),  # Azure, dates
    (None, "num_prefill_tokens", "num_decode_tokens"),
)


@dataclass(frozen=True)
class Request:
    prompt: tuple[int, ...]  # token ids
    output_len: int
    at: float  # seconds after the start


def random_requests(
    count: int, lens: tuple[int, int], spread: float, prefix_len: int, vocab: int, seed: int
) -> list[Request]:
    """lens: (input, output); each is drawn from len * (1 - spread) to len * (1 + spread). All at 0 s.

    The first `prefix_len` tokens of every prompt are the same, as if they shared a system prompt.
    """
    rng = np.random.default_rng(seed)
    prefix = _tokens(rng, prefix_len, vocab)
    requests = []
    for _ in range(count):
        drawn = [max(1, int(rng.integers(math.floor(n * (1 - spread)), math.ceil(n * (1 + spread)) + 1))) for n in lens]
        requests.append(Request(prefix + _tokens(rng, drawn[0], vocab), drawn[1], 0.0))
    return requests


def trace_requests(path: Path, count: int, max_input: int, vocab: int, seed: int) -> list[Request]:
    """The first `count` rows of a .jsonl or .csv file, .gz or not; prompts are cut to `max_input` tokens.

    Rows with equal Mooncake `hash_ids` get equal blocks, so that a prefix cache finds what it would find in life.
    """
    requests: list[Request] = []
    for row in _rows(path):
        if len(requests) == count:
            break
        arrival, input_name, output_name = next(names for names in _COLUMNS if names[1] in row)
        length = min(max_input, int(row[input_name]))
        prompt = _prompt(row.get("hash_ids"), length, vocab, seed + len(requests))
        at = 0.0 if arrival is None else _seconds(row[arrival])
        requests.append(Request(prompt, max(1, int(row[output_name])), at))
    start = min((r.at for r in requests), default=0.0)
    return [replace(r, at=r.at - start) for r in requests]


def paced(requests: list[Request], rate: float, burstiness: float, seed: int) -> list[Request]:
    """Arrivals at `rate` per second with gamma distributed gaps, as `vllm bench serve`: burstiness 1 is Poisson,
    below it burstier, above it more even; an infinite rate leaves them as they are."""
    if math.isinf(rate):
        return requests
    gaps = np.random.default_rng(seed).gamma(burstiness, 1 / (rate * burstiness), len(requests))
    return [replace(r, at=float(at)) for r, at in zip(requests, np.cumsum(gaps), strict=True)]


def _tokens(rng: np.random.Generator, count: int, vocab: int) -> tuple[int, ...]:
    """Ids from the upper nine tenths of the range: the lowest ones are often special tokens."""
    return tuple(rng.integers(vocab // 10, vocab, count).tolist())


def _prompt(hash_ids: list[int] | None, length: int, vocab: int, seed: int) -> tuple[int, ...]:
    if hash_ids is None:
        return _tokens(np.random.default_rng(seed), length, vocab)
    blocks = (_tokens(np.random.default_rng(h), BLOCK, vocab) for h in hash_ids)
    return tuple(token for block in blocks for token in block)[:length]


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        if ".jsonl" in path.suffixes:
            yield from map(json.loads, file)
        else:
            yield from csv.DictReader(file)


def _seconds(arrival: str | float) -> float:
    return datetime.fromisoformat(arrival).timestamp() if isinstance(arrival, str) else arrival / 1e3
