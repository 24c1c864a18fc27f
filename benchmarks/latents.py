"""Steps of a small random DeepSeek-V3, whose attention is over latents, beside transformers, which expands them to keys
and values of all heads in every step.

    python -m benchmarks.latents --threads 1

Each figure is the median of several calls. All must give what transformers gives, or there are no figures.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config

from tercet.kernels.kinds import Kernels
from tercet.models.batch import PrefillChunk, StepBatch
from tercet.models.sources import load_model
from tercet.models.transformer import Transformer
from tercet.spec import ModelSpec

BLOCK = 16
TOLERANCE = 1e-3  # of logits around 1
SHAPE: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "eos_token_id": None,
    "q_lora_rank": 192,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}


class Ours:
    """A batch of sequences of `context` tokens, then one token more of each."""

    def __init__(self, model: Transformer, ids: Tensor) -> None:
        """ids [sequences, context + 1]."""
        self._model, self._ids, self._count = model, ids, len(ids)
        self._per = -(-ids.shape[1] // BLOCK)
        self._tables = torch.arange(self._count * self._per).view(self._count, self._per)
        self._cache = torch.zeros(model.kv_layout(self._count * self._per, BLOCK).shape)

    def prefill(self, sequence: int = 0) -> Tensor:
        """-> logits of the last token."""
        length, table = self._ids.shape[1] - 1, self._tables[sequence]
        at, none = torch.arange(length), torch.zeros(0, 0, dtype=torch.int64)
        slots = table[at // BLOCK] * BLOCK + at % BLOCK
        chunk = PrefillChunk(0, length, length, table[: -(-length // BLOCK)])
        ids = self._ids[sequence, :length]
        return self._model.forward(StepBatch(ids, at, slots, 0, none, none.flatten(), (chunk,), at[-1:]), self._cache)

    def decode(self) -> Tensor:
        at = torch.full((self._count,), self._ids.shape[1] - 1)
        slots = self._tables[:, at[0] // BLOCK] * BLOCK + at % BLOCK
        rows = torch.arange(self._count)
        batch = StepBatch(self._ids[:, -1], at, slots, self._count, self._tables, at + 1, (), rows)
        return self._model.forward(batch, self._cache)


class Theirs:
    def __init__(self, model: Any, ids: Tensor) -> None:
        self._model, self._ids = model, ids
        self._past = model(ids[:, :-1], use_cache=True).past_key_values

    def prefill(self) -> Tensor:
        logits: Tensor = self._model(self._ids[:1, :-1], logits_to_keep=1).logits[0]
        return logits

    def decode(self) -> Tensor:
        logits: Tensor = self._model(self._ids[:, -1:], past_key_values=self._past, use_cache=True).logits[:, 0]
        self._past.crop(-1)
        return logits


@torch.inference_mode()
def measure(shape: dict[str, Any], sequences: int, context: int, threads: int, calls: int) -> dict[str, list[float]]:
    """-> who computes -> ms of a decode step of all sequences, ms of a prefill of one."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    reference = AutoModelForCausalLM.from_config(DeepseekV3Config(**shape, max_position_embeddings=2 * context)).eval()
    theirs = Theirs(reference, ids := torch.randint(shape["vocab_size"], (sequences, context + 1)))
    found = {"transformers": [_median(theirs.decode, calls), _median(theirs.prefill, calls)]}
    with tempfile.TemporaryDirectory() as directory:
        reference.save_pretrained(Path(directory))
        for kernels in (Kernels("torch"), Kernels("native")):
            kernels.set_threads(threads)
            ours = Ours(load_model(ModelSpec(source=directory, dtype="float32"), kernels).model, ids)
            for sequence in range(1, sequences):
                ours.prefill(sequence)
            _check(ours.prefill(), theirs.prefill())
            _check(ours.decode(), theirs.decode())
            found[kernels.kind] = [_median(ours.decode, calls), _median(ours.prefill, calls)]
    return found


def _check(ours: Tensor, theirs: Tensor) -> None:
    if not torch.allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE):
        raise SystemExit(f"they give something else: off by {(ours - theirs).abs().max():.2g}")


def _median(step: Callable[[], Tensor], calls: int) -> float:
    """Milliseconds."""
    step()
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def main(
    sequences: Annotated[int, typer.Option(help="of a decode step")] = 8,
    context: Annotated[int, typer.Option(help="tokens of each")] = 512,
    threads: Annotated[int, typer.Option()] = 1,
    calls: Annotated[int, typer.Option(help="of which each figure is the median")] = 9,
) -> None:
    """Time steps over latents."""
    table = Table("", f"decode of {sequences} at {context}, ms", f"prefill of {context}, ms")
    for name, (decode, prefill) in measure(SHAPE, sequences, context, threads, calls).items():
        table.add_row(name, f"{decode:.1f}", f"{prefill:.0f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
