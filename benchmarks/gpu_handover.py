"""KV handed over between two worker processes on one device, over each transport that is usable there, against the rate
of a copy within the device's memory.

The prefill worker has computed the prompts before and holds their KV in its prefix cache; the decode worker keeps none.
So a request is: one row computed, the prompt's KV handed over, one token decoded. What a long prompt's request takes
longer than one of a single block is the hand-over of the rest: staging, digests and landing included.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu_sizes import BLOCK, Sizes
from benchmarks.gpu_timing import Least, NotRun, Row, Timer
from benchmarks.gpu_workers import cluster
from tercet.core import Done, GenerateRequest, Role, SamplingParams
from tercet.roles.router.router import Router
from tercet.spec import ClusterSpec
from tercet.transfer.transports.contract import Transport
from tercet.transfer.transports.table import ALL

WAIT_S = 120.0  # for one answer; the first compiles kernels
TWO = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)  # the second is decoded from what was handed over
VOCAB = 300


def save_model(directory: Path, sizes: Sizes) -> str:
    """KV as large as that of `sizes`' model, and little else."""
    config, context = sizes.config, max(sizes.handovers) + BLOCK
    small = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_kv_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(small).save_pretrained(directory)
    return str(directory)


def spec_of(sizes: Sizes, source: str, device: Literal["cpu", "gpu"], transport: str) -> ClusterSpec:
    context = max(sizes.handovers) + BLOCK
    role = {"pool": device, "gpus": int(device == "gpu"), "scheduler": {"token_budget": 2048}}
    blocks = context // BLOCK

    def kv(contexts: int, *, prefix: bool) -> dict[str, object]:
        return {"kv": {"blocks": blocks * contexts + BLOCK, "prefix_cache": prefix}}

    return ClusterSpec.model_validate(
        {
            "model": {"source": source, "dtype": str(sizes.dtype).removeprefix("torch."), "max_context": context},
            "pools": {"cpu": {}, "gpu": {"accelerator": "gpu", "gpus": 2}},
            "roles": {
                Role.PREFILL: role | kv(len(sizes.handovers) + 1, prefix=True),
                Role.DECODE: role | kv(2, prefix=False),
            },
            "transfer": {"transport": transport},
        }
    )


def kv_bytes(sizes: Sizes, tokens: int) -> int:
    config = sizes.config
    return 2 * config.num_layers * tokens * config.num_kv_heads * config.head_dim * sizes.dtype.itemsize


async def asked(router: Router, prompt: list[int]) -> tuple[float, Done]:
    """Seconds of a request, and how it ended."""
    start = time.perf_counter()
    request = GenerateRequest(f"r{start}", tuple(prompt), TWO, time.monotonic() + WAIT_S)
    events = [event async for event in router.generate(request)]
    done = events[-1]
    assert isinstance(done, Done)
    return time.perf_counter() - start, done


async def median_of(router: Router, prompt: list[int], rounds: int, expected: int) -> float:
    """Each request must hand over `expected` bytes, which says that the decode worker had none of them."""
    times = []
    for _ in range(rounds + 1):  # the first computes the prompt
        seconds, done = await asked(router, prompt)
        assert done.times.kv_bytes == expected, f"{done.times.kv_bytes} bytes were handed over, not {expected}"
        times.append(seconds)
    return statistics.median(times[1:])


async def measured(sizes: Sizes, spec: ClusterSpec) -> dict[int, float]:
    """Seconds that the hand-over takes of so many tokens, less those of one block."""
    rng = random.Random(0)
    async with cluster(spec) as router:
        times = {}
        for tokens in (BLOCK, *sizes.handovers):
            prompt = [rng.randrange(VOCAB) for _ in range(tokens)]
            times[tokens] = await median_of(router, prompt, sizes.rounds, kv_bytes(sizes, tokens))
    least = times.pop(BLOCK)
    return {tokens: seconds - least for tokens, seconds in times.items()}


@dataclass(frozen=True)
class HandoverCase:
    """The longest prompt of a transport makes the row; the others stand beside it."""

    transport: type[Transport]
    name: str
    sizes: Sizes
    device: Literal["cpu", "gpu"]

    def run(self, timer: Timer, rates: dict[str, float]) -> Row:
        if (why := self.transport.missing()) is not None:
            raise NotRun(why)
        del timer  # a request is timed by the host's clock
        torch.manual_seed(3)
        with tempfile.TemporaryDirectory() as directory:
            source = save_model(Path(directory), self.sizes)
            spec = spec_of(self.sizes, source, self.device, self.transport.name)
            *shorter, longest = asyncio.run(measured(self.sizes, spec)).items()
        tokens, seconds = longest
        if seconds <= 0:
            raise NotRun("the longest took no longer than one block: it is lost in the noise here")
        least = Least(2 * kv_bytes(self.sizes, tokens - BLOCK))  # read once, written once
        fraction = least.bytes / rates["copy"] / seconds
        beside: dict[str, float | str] = {f"{tokens} tokens": seconds for tokens, seconds in shorter}
        return Row(self.name, seconds, least, fraction, "copy", beside)


def cases(sizes: Sizes, device: Literal["cpu", "gpu"]) -> Iterator[HandoverCase]:
    for transport in ALL:
        name = f"hand-over of {max(sizes.handovers)} tokens, {transport.name}"
        yield HandoverCase(transport, name, sizes, device)
