"""Sequences in a paged KV cache whose unused places hold NaN, and attention over them in float64."""

from __future__ import annotations

import torch

from tests.triton_interpreter import DEVICE


class Paged:
    """cache [blocks, 2, S, Hkv, D], tables [B, max_blocks] int32, and what each sequence holds."""

    def __init__(self, lengths, size, kv_heads, dim, dtype, seed=0):
        torch.manual_seed(seed)
        needed = [-(-length // size) for length in lengths]
        shape = (sum(needed) + 2, 2, size, kv_heads, dim)
        self.cache = torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)
        free = iter((torch.randperm(sum(needed)) + 1).tolist())  # the first and the last block are nobody's
        self.tables = torch.full((len(lengths), max(needed, default=0) + 1), sum(needed) + 1, dtype=torch.int32)
        self.keys, self.values = [], []
        for i, length in enumerate(lengths):
            self.tables[i, : needed[i]] = torch.tensor([next(free) for _ in range(needed[i])])
            both = torch.randn(2, length, kv_heads, dim).to(DEVICE, dtype)
            for token in range(length):
                self.cache[self.tables[i, token // size], :, token % size] = both[:, token]
            self.keys.append(both[0])
            self.values.append(both[1])
        self.tables = self.tables.to(DEVICE)
        self.contexts = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)

    def forget(self, firsts):
        """Give away the whole blocks before each sequence's token `firsts[i]`, as out of its window."""
        size, nobody = self.cache.shape[2], len(self.cache) - 1
        for table, first in zip(self.tables, firsts, strict=True):
            table[: max(0, first) // size] = nobody


def attention(query, keys, values, window=None, soft_cap=None):
    """query [T, H, D] of the last T tokens, keys [L, Hkv, D] and values [L, Hkv, Dv] -> [T, H, Dv], a row at a time."""
    group = query.shape[1] // keys.shape[1]
    out = torch.empty(*query.shape[:2], values.shape[-1], dtype=torch.float64, device=query.device)
    for t in range(len(query)):
        stop = len(keys) - len(query) + t + 1
        start = 0 if window is None else max(0, stop - window)
        for h in range(query.shape[1]):
            scores = keys[start:stop, h // group].double() @ query[t, h].double() / query.shape[-1] ** 0.5
            if soft_cap:
                scores = soft_cap * (scores / soft_cap).tanh()
            out[t, h] = scores.softmax(0) @ values[start:stop, h // group].double()
    return out.to(query.dtype)
