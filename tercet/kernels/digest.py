"""Digests of KV in a device's memory, one for each (layer, unit, head): what its reader compares to find corruption.

    key(i) = seed + i * GAMMA          seed = mix(layer << 48 ^ head << 32 ^ unit)
    digest = mix(seed ^ sum over i of mix(word(i) ^ key(i)))          all of 64 bits, wrapping

word(i): the i-th integer of the unit's rows, in the order parts, tokens, row. `mix` is MurmurHash3's last step, a
bijection. So a change of one word always changes the digest; of several, or of their places, all but once in 2^64 times
by chance. It is a sum, so words can be added up in any order: a core needs the same time as a memory to give them.
Against forgery it does nothing, as transfer/memory/digest.py says of the host's.

rows  [layers, blocks, units of a block, heads, parts, tokens, words]: any strides, but words next to each other
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15
MIX = (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53)
SHIFT = 33

UnitDigests = Callable[[Tensor, Tensor, Tensor, tuple[int, int, int]], Tensor]
"""(rows, blocks, subs, first) -> int64 [layers, units, heads], on the device of `rows`. Unit u lies in block blocks[u],
as that block's unit subs[u]; both are int64 [units]. first: numbers of the first layer, unit and head."""


def unit_digests_reference(rows: Tensor, blocks: Tensor, subs: Tensor, first: tuple[int, int, int]) -> Tensor:
    words = rows[:, blocks, subs].flatten(3).to(torch.int64)
    layer, unit, head = (
        torch.arange(start, start + count, device=rows.device)
        for start, count in zip(first, words.shape[:3], strict=True)
    )
    seeds = _mix((layer[:, None, None] << 48) ^ (head << 32) ^ unit[:, None])
    keys = seeds[..., None] + torch.arange(words.shape[-1], device=rows.device) * _signed(GAMMA)
    return _mix(seeds ^ _mix(words ^ keys).sum(-1))


def _mix(x: Tensor) -> Tensor:
    for factor in MIX:
        x = (x ^ _shifted(x)) * _signed(factor)
    return x ^ _shifted(x)


def _shifted(x: Tensor) -> Tensor:
    """x >> SHIFT of the unsigned number, of which torch has no arithmetic."""
    return (x >> SHIFT) & ((1 << (64 - SHIFT)) - 1)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number
