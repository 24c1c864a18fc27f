"""Whether the Triton kernels compute the right values on a device: each against its reference, before they are used.
Imports no Triton until it is asked."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from tercet.kernels.activation import silu_and_mul_reference
from tercet.kernels.attention import attention_reference
from tercet.kernels.digest import unit_digests_reference
from tercet.kernels.norm import rms_norm_reference
from tercet.kernels.rope import apply_rope_reference

TOLERANCE = 2e-2  # of values around 1: bfloat16 rounds results to 2^-8
DTYPES = (torch.float32, torch.bfloat16)
HEADS, KV_HEADS, DIM, SIZE = 4, 2, 32, 16  # of the trials' attention, over blocks of SIZE tokens
TOKENS = 300  # of a prompt: some tiles that every row sees, and some that few do


@functools.cache
def missing(device: torch.device) -> str | None:
    """Why the Triton kernels cannot be used on this device; None if they can. Compiles them."""
    try:
        for name, computed, expected in _trials(device):
            off = (computed.cpu().float() - expected.float()).abs()
            if not bool((off <= TOLERANCE * (1 + expected.float().abs())).all()):  # NaN is not
                return f"{name} gives wrong values on this device (off by {off.max():.2g})"
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    except Exception as error:  # noqa: BLE001  # Triton's compiler, the C compiler it calls, the driver: any may fail
        return f"they cannot be run here: {type(error).__name__}: {str(error).strip()[:300]}"
    return None


def _trials(device: torch.device) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, what the kernel gives, what it should."""
    from tercet.kernels.triton.activation import silu_and_mul
    from tercet.kernels.triton.rms_norm import add_rms_norm, rms_norm

    generator = torch.Generator().manual_seed(0)
    yield from _row_linears(generator, device)
    for dtype in DTYPES:
        x, other = (torch.randn(3, 70, generator=generator).to(dtype) for _ in range(2))
        weight = torch.randn(70, generator=generator).to(dtype)
        x_there, weight_there = x.to(device), weight.to(device)
        both = x + other
        normed, total = add_rms_norm(x_there, other.to(device), weight_there, 1e-5)
        yield f"add_rms_norm ({dtype})", normed, rms_norm_reference(both.float(), weight.float(), 1e-5)
        yield f"the sum of add_rms_norm ({dtype})", total, both
        alone = rms_norm(x_there, weight_there, 1e-5)
        yield f"rms_norm ({dtype})", alone, rms_norm_reference(x.float(), weight.float(), 1e-5)
        yield f"silu_and_mul ({dtype})", silu_and_mul(x_there), silu_and_mul_reference(x)
        qkv = torch.randn(TOKENS, HEADS + 2 * KV_HEADS, DIM, generator=generator).to(dtype)
        yield from _attention(qkv, device)
    yield from _draws(torch.randn(4, 300, generator=generator) * 3, device)
    yield from _digests(torch.randint(1 << 62, (2, 3, 1, 2, 2, 16, 32), generator=generator), device)
    yield from _copies(torch.randint(256, (200,), generator=generator, dtype=torch.uint8), device)


def _row_linears(generator: torch.Generator, device: torch.device) -> Iterator[tuple[str, Tensor, Tensor]]:
    from tercet.kernels.triton.row_linear import INPUTS, Norm, row_linear

    for dtype in DTYPES:
        inputs = INPUTS + 70  # more than a program takes at a time
        x, norm, residual = (
            torch.randn(shape, generator=generator).to(dtype) for shape in ((1, inputs), (inputs,), (1, 9))
        )
        weight = (torch.randn(18, inputs, generator=generator) / inputs**0.5).to(dtype)
        bias = torch.randn(18, generator=generator).to(dtype)
        x_there, weight_there, given = x.to(device), weight.to(device), Norm(norm.to(device), 1e-5)
        product = functional.linear(rms_norm_reference(x.float(), norm.float(), 1e-5), weight.float(), bias.float())
        gated = silu_and_mul_reference(product)
        yield (
            f"row_linear, gated ({dtype})",
            row_linear(x_there, weight_there, bias.to(device), norm=given, gated=True),
            gated,
        )
        added = row_linear(x_there, weight_there[:9], None, residual=residual.to(device))
        yield f"row_linear, added ({dtype})", added, functional.linear(x.float(), weight[:9].float()) + residual.float()


def _attention(qkv: Tensor, device: torch.device) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of 300 tokens in 19 blocks: as one chunk, and the last tokens of its beginnings as decodes."""
    from tercet.kernels.triton.decode import decode_attention
    from tercet.kernels.triton.prefill import prefill_attention
    from tercet.kernels.triton.rope import rope_and_write

    rotary, dtype = HEADS + KV_HEADS, qkv.dtype
    angles, positions = (
        torch.outer(torch.arange(float(TOKENS)), torch.arange(1, DIM // 2 + 1) / 16),
        torch.arange(TOKENS),
    )
    table = torch.randperm(-(-TOKENS // SIZE), generator=torch.Generator().manual_seed(1))
    slots = (table[positions // SIZE] * SIZE + positions % SIZE).to(device)
    cache = torch.zeros(len(table), 2, SIZE, KV_HEADS, DIM, dtype=dtype, device=device)
    turned = qkv.to(device, copy=True)
    rope_and_write(turned, angles.cos().to(device), angles.sin().to(device), cache, slots, KV_HEADS)
    rotated = apply_rope_reference(qkv[:, :rotary].float(), angles.cos(), angles.sin()).to(dtype)
    query, keys, values = rotated[:, :HEADS], rotated[:, HEADS:], qkv[:, rotary:]
    yield f"rope_and_write ({dtype}), queries", turned[:, :HEADS], query
    yield f"rope_and_write ({dtype}), keys", cache[:, 0].flatten(0, 1)[slots], keys
    yield f"rope_and_write ({dtype}), values", cache[:, 1].flatten(0, 1)[slots], values

    def ints(*numbers: int) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    tables, contexts = table.int().to(device).expand(3, -1).contiguous(), [1, 17, TOKENS]
    last = turned[[context - 1 for context in contexts], :HEADS]
    for window in (None, 9):
        prefilled = prefill_attention(
            turned[:, :HEADS], cache, tables[:1], ints(0, TOKENS), ints(TOKENS), most_rows=TOKENS, window=window
        )
        whole = attention_reference(query, keys, values, window)
        yield f"prefill_attention ({dtype}, window {window})", prefilled, whole
        decoded = decode_attention(last, cache, tables, ints(*contexts), most_context=TOKENS, programs=3, window=window)
        yield f"decode_attention ({dtype}, window {window})", decoded, whole[[context - 1 for context in contexts]]


def _draws(logits: Tensor, device: torch.device) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Rows that can be drawn in one way only: greedy, by a small top-p, by top-k 1, by min-p 1."""
    from tercet.kernels.triton.sampling import SamplingRows, race_words, sample

    rows = SamplingRows(
        torch.tensor([0.0, 1.0, 1.0, 1.0], device=device),
        torch.tensor([0.0, 0.0, 0.0, 1.0], device=device),
        torch.tensor([0, 0, 1, 0], dtype=torch.int32, device=device),
        torch.tensor([1.0, 1e-6, 1.0, 1.0], device=device),
        torch.tensor([race_words(7, position) for position in range(4)], device=device),
    )
    yield "sample", sample(logits.to(device), rows), logits.argmax(-1)


def _copies(source: Tensor, device: torch.device) -> Iterator[tuple[str, Tensor, Tensor]]:
    from tercet.kernels.triton.copy import copy_runs

    there, target, expected = source.to(device), torch.zeros(200, dtype=torch.uint8, device=device), source.clone()
    expected[40:103], expected[143:] = 0, 0
    copy_runs(target.data_ptr(), there.data_ptr(), [(103, 103, 40), (0, 0, 40)], device)
    yield "copy_runs", target, expected


def _digests(rows: Tensor, device: torch.device) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of blocks 2 and 0; equal means equal in every bit."""
    from tercet.kernels.triton.digest import unit_digests

    blocks, subs, first = torch.tensor([2, 0]), torch.tensor([0, 0]), (1, 2, 3)
    found = unit_digests(rows.to(device), blocks.to(device), subs.to(device), first)
    expected = unit_digests_reference(rows, blocks, subs, first)
    yield "unit_digests", (found.cpu() == expected).float(), torch.ones(expected.shape)
