"""One launch of each Triton operation, as a model would: what `tests.triton_compiler` compiles."""

from __future__ import annotations

import torch

from tercet.kernels.triton import (
    activation,
    copy,
    decode,
    digest,
    gather,
    moe,
    prefill,
    rms_norm,
    rope,
    row_linear,
    sampling,
    shared_prefix,
)

BF16 = torch.bfloat16
TOKENS, HEADS, KV_HEADS, DIM, S = 4, 16, 4, 128, 16
TABLES = torch.zeros(TOKENS, 64, dtype=torch.int32)
CONTEXTS = torch.full((TOKENS,), 100, dtype=torch.int32)


def _cache(kv_heads=KV_HEADS, dim=DIM, dtype=BF16):
    return torch.zeros(8, 2, S, kv_heads, dim, dtype=dtype)


def norm():
    x = torch.zeros(TOKENS, 1024, dtype=BF16)
    rms_norm.add_rms_norm(x, x, torch.ones(1024, dtype=BF16), 1e-5)
    rms_norm.rms_norm(torch.zeros(TOKENS, HEADS, DIM, dtype=BF16), torch.ones(HEADS, DIM), 1e-5)
    rms_norm.rms_norm(torch.zeros(1, 576), torch.ones(576), 1e-5)


def silu():
    activation.silu_and_mul(torch.zeros(TOKENS, 4096, dtype=BF16))


def rotate():
    angle = torch.zeros(TOKENS, DIM // 2)
    rope.rope_and_write(
        torch.zeros(TOKENS, HEADS + 2 * KV_HEADS, DIM, dtype=BF16),
        angle,
        angle,
        _cache(),
        torch.zeros(TOKENS, dtype=torch.int64),
        KV_HEADS,
    )


def decode_attention():
    query = torch.zeros(TOKENS, HEADS, DIM, dtype=BF16)
    common = {"most_context": 1000, "programs": 264}
    decode.decode_attention(query, _cache(), TABLES, CONTEXTS, **common)
    decode.decode_attention(query, _cache(), TABLES, CONTEXTS, window=64, soft_cap=30.0, **common)
    one = torch.zeros(1, 3, 80)
    decode.decode_attention(one, _cache(1, 80, torch.float32), TABLES[:1], CONTEXTS[:1], **common)


def prefill_attention():
    query = torch.zeros(TOKENS * 100, HEADS, DIM, dtype=BF16)
    starts = torch.arange(TOKENS + 1, dtype=torch.int32) * 100
    for most_rows in (100, 1000):  # few programs, and many
        prefill.prefill_attention(query, _cache(), TABLES, starts, CONTEXTS, most_rows=most_rows)
    prefill.prefill_attention(query, _cache(), TABLES, starts, CONTEXTS, most_rows=100, window=64, soft_cap=30.0)
    wide = torch.zeros(TOKENS * 100, 4, 256, dtype=BF16)
    prefill.prefill_attention(wide, _cache(2, 256), TABLES, starts, CONTEXTS, most_rows=100)
    narrow = torch.zeros(TOKENS * 100, 4, 64)
    prefill.prefill_attention(narrow, _cache(2, 64, torch.float32), TABLES, starts, CONTEXTS, most_rows=100)


def pack():
    blocks = torch.zeros(3, dtype=torch.int64)
    gather.scatter(_cache(), blocks, 1, gather.gather(_cache(), blocks, 1, 2))


def digests():
    units = torch.zeros(3, dtype=torch.int64)
    for words, dtype in ((32, torch.int64), (20, torch.int32), (9, torch.uint8)):
        rows = torch.zeros(2, 8, 2, S, KV_HEADS, words, dtype=dtype).view(2, 8, 2, 1, S, KV_HEADS, words)
        digest.unit_digests(rows.permute(0, 1, 3, 5, 2, 4, 6), units, units, (0, 0, 0))


def shared_prefix_attention():
    query, prefix = torch.zeros(TOKENS, HEADS, DIM, dtype=BF16), torch.full((1,), 64, dtype=torch.int32)
    common = {"most_prefix": 64, "most_context": 1000, "programs": 264}
    for options in ({}, {"window": 64, "soft_cap": 30.0}):
        shared_prefix.shared_prefix_attention(query, _cache(), TABLES[0], prefix, TABLES, CONTEXTS, **options, **common)


def draw():
    vocab, row = 128_256, torch.ones(TOKENS)
    rows = sampling.SamplingRows(row, row, row.int(), row, torch.zeros(TOKENS, 2, dtype=torch.int64))
    counts = torch.zeros(TOKENS, vocab, dtype=torch.int32)
    sampling.sample(torch.zeros(TOKENS, vocab), rows, sampling.Penalties(row, row, row, counts.bool(), counts))


def linear_of_a_row():
    x, residual = torch.zeros(1, 4096, dtype=BF16), torch.zeros(1, 512, dtype=BF16)
    norm = row_linear.Norm(torch.ones(4096, dtype=BF16), 1e-5)
    weight, bias = torch.zeros(512, 4096, dtype=BF16), torch.zeros(512, dtype=BF16)
    row_linear.row_linear(x, weight, bias, norm=norm)
    row_linear.row_linear(x, weight, None, norm=norm, gated=True)
    row_linear.row_linear(
        torch.zeros(1, 14336, dtype=BF16), torch.zeros(512, 14336, dtype=BF16), None, residual=residual
    )
    row_linear.row_linear(torch.zeros(2, 576), torch.zeros(30, 576), None)
    row_linear.row_linear(torch.zeros(1, 1), torch.zeros(1, 1), None)


def runs():
    for word in (8, 4, 2, 1):
        copy.copy_runs(0, 1 << 40, [(0, 0, word)], torch.device("cpu"))


def experts():
    for dtype, tokens in ((BF16, TOKENS), (BF16, 4096), (torch.float32, TOKENS)):  # tiles of few rows, and of many
        gate_up, down = torch.zeros(8, 2 * 768, 2048, dtype=dtype), torch.zeros(8, 2048, 768, dtype=dtype)
        mixture, numbers = moe.TritonExperts(gate_up, down), torch.zeros(tokens, 2, dtype=torch.int64)
        mixture.forward(torch.zeros(tokens, 2048, dtype=dtype), numbers, torch.zeros(tokens, 2))
    odd = moe.TritonExperts(torch.zeros(3, 2 * 5, 7), torch.zeros(3, 7, 5))
    odd.forward(torch.zeros(1, 7), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1))
