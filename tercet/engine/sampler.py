"""Draw the next token of each sequence from its logits.

The random number of a draw is a function of (seed, output position) alone, so the sampler state that travels with a
request is its seed and its tokens: whichever worker draws, and however often a request is retried, it is the same.

Shapes: logits [R, vocab] float32, one row a sequence.
Order, as in vLLM: penalties, temperature, top-k, top-p, min-p. Logprobs are those of the raw logits.
"""

from __future__ import annotations

import random
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from tercet.core import SamplingParams, TokenEvent
from tercet.engine.sequence import Sequence


def sample(logits: Tensor, sequences: Rows[Sequence]) -> list[TokenEvent]:
    """One token a row."""
    greedy = logits.argmax(dim=-1).tolist()
    events = []
    for row, sequence in enumerate(sequences):
        params = sequence.params
        plain = params.temperature == 0 and not _penalised(params)
        token = greedy[row] if plain else _draw(logits[row], sequence)
        events.append(TokenEvent(token) if params.logprobs is None else _with_logprobs(logits[row], token, params))
    return events


def _penalised(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def _draw(row: Tensor, sequence: Sequence) -> int:
    params = sequence.params
    if _penalised(params):
        row = penalise(row, sequence.token_ids, sequence.num_prompt, params)
    if params.temperature == 0:
        return int(row.argmax())
    probabilities = truncated(row.double() / params.temperature, params)
    cumulative = probabilities.cumsum(0)
    point = uniform(params.seed or 0, sequence.num_output) * cumulative[-1]
    return min(int(torch.searchsorted(cumulative, point, right=True)), len(row) - 1)


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of output `position` of a request."""
    return random.Random(f"{seed}/{position}").random()  # noqa: S311  # sampling, not secrets


def penalise(row: Tensor, token_ids: Rows[int], num_prompt: int, params: SamplingParams) -> Tensor:
    """Repetition penalty over all tokens (CTRL, arXiv:1909.05858, section 4.1); presence and frequency over output."""
    row = row.clone()
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(token_ids)), device=row.device)
        scores = row[seen]
        row[seen] = torch.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
    output = torch.tensor(token_ids[num_prompt:], dtype=torch.int64, device=row.device)
    if len(output):
        ids, counts = torch.unique(output, return_counts=True)
        row[ids] -= params.presence_penalty + params.frequency_penalty * counts
    return row


def truncated(scores: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities after top-k, top-p and min-p; zeros elsewhere, not renormalised. [vocab] -> [vocab]"""
    if 0 < params.top_k < len(scores):
        kth = scores.topk(params.top_k).values[-1]
        scores = scores.masked_fill(scores < kth, -torch.inf)
    probabilities = scores.softmax(dim=-1)
    if params.top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(0) - ordered
        probabilities = probabilities.scatter(0, order, ordered.masked_fill(before >= params.top_p, 0.0))
    if params.min_p > 0:
        probabilities = probabilities.masked_fill(probabilities < params.min_p * probabilities.max(), 0.0)
    return probabilities


def _with_logprobs(row: Tensor, token: int, params: SamplingParams) -> TokenEvent:
    logprobs = row.log_softmax(dim=-1)
    top = logprobs.topk(params.logprobs or 0)
    pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return TokenEvent(token, float(logprobs[token]), pairs)
