"""Paged attention against the reference, over scattered blocks, ragged lengths, windows and grouped heads."""

from __future__ import annotations

import pytest
import torch

from tercet.kernels import attention

S, HKV, D, BLOCKS = 8, 2, 16, 64


def paged(lengths, seed=0):
    """-> cache [BLOCKS, 2, S, HKV, D], block tables, and each sequence's keys_values [L, 2 HKV, D]."""
    torch.manual_seed(seed)
    cache = torch.full((BLOCKS, 2, S, HKV, D), float("nan"))
    free = iter(torch.randperm(BLOCKS).tolist())
    tables, contents = [], []
    for length in lengths:
        table = torch.tensor([next(free) for _ in range(-(-length // S))])
        at = torch.arange(length)
        content = torch.randn(length, 2 * HKV, D)
        attention.write_kv(cache, attention.page_rows(table[at // S] * S + at % S, S), content)
        tables.append(table)
        contents.append(content)
    return cache, tables, contents  # what was never written is NaN, and must not count


@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("limit", [4096, 64])
def test_decodes_of_any_length(window, groups, limit, monkeypatch):
    monkeypatch.setattr(attention, "GATHER_TOKENS", limit)
    lengths = [1, 37, 8, 20, 9]
    cache, tables, contents = paged(lengths)
    padded = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True)
    query = torch.randn(len(lengths), HKV * groups, D)
    out = torch.empty_like(query)
    for group in attention.plan_decodes(padded, torch.tensor(lengths), S, [None, window]):
        out[group.rows] = attention.decode_attention(query[group.rows], cache, group, window)
    for i, content in enumerate(contents):
        expected = attention.attention_reference(query[i : i + 1], *content.chunk(2, 1), window)
        torch.testing.assert_close(out[i : i + 1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize(("length", "context"), [(23, 23), (7, 23), (1, 17)])
def test_chunks(length, context, window):
    cache, [table], [content] = paged([context])
    query = torch.randn(length, HKV * 3, D)
    plan = attention.plan_chunk(0, length, context, table, [window])
    out = attention.chunk_attention(query, content[-length:], cache, plan, window)
    expected = attention.attention_reference(query, *content.chunk(2, 1), window)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_no_decodes_make_no_group():
    none = torch.zeros(0, 0, dtype=torch.int64)
    assert attention.plan_decodes(none, none.flatten(), S, [None]) == []
