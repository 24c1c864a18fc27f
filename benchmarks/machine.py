"""What this machine can do, what a token costs at least, and the facts that stand beside every figure."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from tercet.models.config import ModelConfig

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
READ_BYTES = 5 << 28  # 1.25 GiB, far more than any cache holds
GEMM_SIZE = 2048
RATES = {"read": "GB/s", "gemm": "GFLOPS"}

Figures = dict[str, float]
DECODE, PREFILL = "decode", "prefill"


class Machine:
    """What it can do: read memory, and multiply square matrices, a bᵀ, as a linear layer does."""

    def __init__(self, shrink: int) -> None:
        numbers = torch.ones(READ_BYTES // 4 // shrink)
        matrix, vector = torch.ones(READ_BYTES // 8192 // shrink, 4096).bfloat16(), torch.ones(4096).bfloat16()
        wide = torch.rand(GEMM_SIZE // shrink, GEMM_SIZE // shrink)
        narrow, flops = wide.bfloat16(), 2 * len(wide) ** 3
        self._works: dict[str, tuple[float, Callable[[], object]]] = {  # name -> (bytes or FLOPs, what takes them)
            "read_float32_sum": (numbers.nbytes, numbers.sum),
            "read_bfloat16_matvec": (matrix.nbytes, partial(torch.mv, matrix, vector)),
            "gemm_float32": (flops, partial(torch.mm, wide, wide.t())),
            "gemm_bfloat16": (flops, partial(torch.mm, narrow, narrow.t())),
        }

    def measure(self) -> Figures:
        """Bytes or FLOPs per second."""
        rates = {}
        for name, (amount, work) in self._works.items():
            start = time.perf_counter()
            work()
            rates[name] = amount / (time.perf_counter() - start)
        return rates


@dataclass(frozen=True)
class Cost:
    """What a token must read and compute at least. Norms and the KV that decode reads are left out: below 2 %."""

    decode_bytes: float  # weights
    prefill_flops: float  # mean over the tokens of a prompt

    @classmethod
    def of(cls, config: ModelConfig, itemsize: float, prompt: int) -> Cost:
        heads = config.num_heads * config.head_dim
        attention = config.hidden_size * (2 * heads + 2 * config.num_kv_heads * config.head_dim)
        body = config.num_layers * (attention + 3 * config.hidden_size * config.intermediate_size)
        head = config.vocab_size * config.hidden_size
        scores = config.num_layers * heads * (prompt + 1)  # q kᵀ and p v, causal
        return cls(itemsize * (body + head), 2 * (body + scores + head / prompt))

    def limits(self, rates: Figures) -> Figures:
        """Tokens per second on a machine of these rates: its fastest way to read and its fastest to multiply."""
        read, gemm = (max(rate for name, rate in rates.items() if name.startswith(kind)) for kind in RATES)
        return {DECODE: read / self.decode_bytes, PREFILL: gemm / self.prefill_flops}


def facts() -> dict[str, Any]:
    """Of machine and software. The commit is marked `-dirty` if the tree has changes."""
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    cpu = {key.strip(): value.strip() for key, _, value in lines}
    return {
        "cpu": cpu.get("model name", "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in FLAGS if flag in cpu.get("flags", "").split()],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
    }


def _commit() -> str:
    """Unknown where there is no git, or no repository around these files."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    if shutil.which("git") is None:
        return "unknown"
    done = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


class Others:
    """How much CPU went to processes that are neither this one nor below it, since this was made."""

    def __init__(self) -> None:
        self._start, self._busy, self._own = time.perf_counter(), _busy_ticks(), _own_ticks()

    def cores(self) -> float:
        """Cores that they kept busy, mean. Processes that begin and end in between count too."""
        ticks = (_busy_ticks() - self._busy) - (_own_ticks() - self._own)
        return ticks / os.sysconf("SC_CLK_TCK") / (time.perf_counter() - self._start)


def _busy_ticks() -> int:
    """Of all cores: user, nice, system, irq, softirq."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return user + nice + system + irq + softirq


def _own_ticks() -> int:
    """Of this process and all below it, with those that have ended and were waited for."""
    ticks, parents = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended while we looked
            fields = path.read_text().rsplit(")", 1)[1].split()
            pid = int(path.parent.name)
            parents[pid], ticks[pid] = int(fields[1]), sum(map(int, fields[11:15]))

    def is_ours(pid: int) -> bool:
        while pid not in (os.getpid(), 0):
            pid = parents.get(pid, 0)
        return pid != 0

    return sum(count for pid, count in ticks.items() if is_ours(pid))
