"""Tokens drawn from scores by the native kernels, all rows of a batch at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tercet.kernels.native.library import Draw, library


class RowDraw(NamedTuple):
    """How one row's token is drawn; the words name its random numbers (engine/sampler.py)."""

    temperature: float
    min_p: float
    top_p: float
    top_k: int  # 0: no bound
    first: int  # 32 bits, as the second
    second: int
    greedy: bool


def draw_tokens(scores: Tensor, draws: Sequence[RowDraw]) -> list[int]:
    """scores [R, vocab] float32, contiguous -> R token ids; -1 for a row whose scores are not finite."""
    tokens = torch.empty(len(draws), dtype=torch.int64)
    structures = (Draw * len(draws))(*(Draw(*draw) for draw in draws))
    library().draw_tokens_forward(scores.data_ptr(), *scores.shape, structures, tokens.data_ptr())
    return tokens.tolist()
