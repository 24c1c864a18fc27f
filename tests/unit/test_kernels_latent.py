"""Attention over paged latents against the reference, which expands keys and values."""

from __future__ import annotations

import pytest
import torch

from tercet.kernels import attention, latent

S, H, N, P, V, R, BLOCKS = 8, 3, 12, 4, 10, 20, 64
SCALE = 0.3


def paged(lengths):
    """-> cache [BLOCKS, 1, S, 1, R + P], block tables, and each sequence's latents [L, R + P]."""
    torch.manual_seed(sum(lengths))
    cache = torch.full((BLOCKS, 1, S, 1, R + P), float("nan"))
    free = iter(torch.randperm(BLOCKS).tolist())
    tables, contents = [], []
    for length in lengths:
        table, at = torch.tensor([next(free) for _ in range(-(-length // S))]), torch.arange(length)
        content = torch.randn(length, R + P)
        latent.write_latents(cache, table[at // S] * S + at % S, content)
        tables.append(table)
        contents.append(content)
    return cache, tables, contents  # what was never written is NaN, and must not count


def compared(query, latents, attended_over):
    """What attention by `attended_over` gives for query [T, H, N + P], and what it should."""
    key_up, value_up = torch.randn(H, N, R), torch.randn(H, V, R)
    absorbed = torch.cat((torch.einsum("thn,hnr->thr", query[..., :N], key_up), query[..., N:]), -1)
    ours = torch.einsum("thr,hvr->thv", attended_over(absorbed), value_up)
    parts = zip(query.split([1] * len(latents) if len(latents) > 1 else [len(query)]), latents, strict=True)
    expected = [latent.latent_attention_reference(q, low, key_up, value_up, SCALE) for q, low in parts]
    torch.testing.assert_close(ours, torch.cat(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("limit", [4096, 64, 1])
def test_decodes_of_any_length(limit, monkeypatch):
    monkeypatch.setattr(attention, "GATHER_TOKENS", limit)
    lengths = [1, 37, 8, 20, 9]
    cache, tables, contents = paged(lengths)
    padded = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True)

    def attended(query):
        out = query.new_full((len(query), H, R), float("nan"))
        for group in attention.plan_decodes(padded, torch.tensor(lengths), S, [None], parts=1):
            out[group.rows] = latent.decode_attention(query[group.rows], cache, group, R, SCALE)
        return out

    compared(torch.randn(5, H, N + P), contents, attended)


@pytest.mark.parametrize("most", [1 << 24, 200, 1])
@pytest.mark.parametrize(("length", "context"), [(23, 23), (7, 23), (1, 17), (1, 1)])
def test_chunks(length, context, most, monkeypatch):
    monkeypatch.setattr(latent, "MOST_SCORES", most)
    cache, [table], [content] = paged([context])
    plan = attention.plan_chunk(0, length, context, table, (), parts=1)

    def attended(query):
        return latent.chunk_attention(query, content[-length:], cache, plan, R, SCALE)

    compared(torch.randn(length, H, N + P), [content], attended)
