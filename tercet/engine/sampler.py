"""Draw next tokens from logits.

A draw is an exponential race: token t gets the time E(t) / p(t), where E(t) is an exponential variate that depends on
(seed, output position, t) alone, and the token with the smallest time is drawn, which is t with probability p(t) (the
Gumbel-max trick). So the sampler state that travels with a request is its seed and its tokens: whichever worker draws,
and however often a request is retried, the draw is the same. And since each token has a random number of its own, a
logit that differs by rounding changes the draw only where two tokens all but tie, whereas in inverse-CDF sampling it
would move the bounds of all later tokens (decision 005).

Shapes: logits [R, vocab] float32, one row per draw.
Order, as in vLLM V1: penalties, temperature, min-p, top-k, top-p. Logprobs are those of the raw logits.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence as Rows

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tercet.core import PromptScore, SamplingParams, TokenEvent
from tercet.engine.plan import Draw
from tercet.errors import EngineFault
from tercet.kernels.native.sampling import RowDraw, draw_tokens

Bits = npt.NDArray[np.uint32]

NOT_FINITE = EngineFault("the model's logits are not finite numbers: no token can be drawn")


def sample(logits: Tensor, draws: Rows[Draw], *, native: bool = False) -> list[TokenEvent | EngineFault]:
    """One token per row of logits on the CPU, or why there is none; native: by the native kernels. What draws on a
    device is device_sampler.py."""
    if native:
        tokens = _draw_natively(penalised(logits, draws), draws)
    else:
        tokens = [_draw(row, draw) for row, draw in zip(penalised(logits, draws), draws, strict=True)]
    events: list[TokenEvent | EngineFault] = []
    for row, (token, draw) in enumerate(zip(tokens, draws, strict=True)):
        if token is None:
            events.append(NOT_FINITE)
        elif draw.params.logprobs is None:
            events.append(TokenEvent(token))
        else:
            found = logprobs_of(logits[row : row + 1], torch.tensor([token]), draw.params.logprobs)
            events.append(TokenEvent(token, *top_logprobs(*found)[0]))
    return events


def logprobs_of(logits: Tensor, token_ids: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The logprob that each row gives its token, [R]; its `count` most likely ids and their logprobs, [R, count]. On
    the device of the logits."""
    logprobs = logits.log_softmax(dim=-1)
    top = logprobs.topk(min(count, logprobs.shape[-1]), dim=-1)
    return logprobs.gather(1, token_ids.unsqueeze(1)).squeeze(1), top.indices, top.values


def top_logprobs(given: Tensor, ids: Tensor, values: Tensor) -> list[PromptScore]:
    """What `logprobs_of` has found, on the host."""
    likeliest = zip(ids.tolist(), values.tolist(), strict=True)
    return [(p, tuple(zip(row, ps, strict=True))) for p, (row, ps) in zip(given.tolist(), likeliest, strict=True)]


def _argmax(x: Tensor) -> npt.NDArray[np.int64]:
    """Over the last dimension, the first of equals. By numpy, since torch's takes 25 times as long on a CPU."""
    return np.asarray(x.numpy().argmax(axis=-1))


def penalised(logits: Tensor, draws: Rows[Draw]) -> Tensor:
    """The logits, or a copy if a row has a penalty."""
    wanted = [row for row, draw in enumerate(draws) if draw.params.penalises]
    if not wanted:
        return logits
    scores = logits.clone()
    for row in wanted:
        scores[row] = penalise(logits[row], draws[row])
    return scores


def _draw_natively(scores: Tensor, draws: Rows[Draw]) -> list[int | None]:
    rows = []
    for params, position, *_ in draws:
        bounds = (params.temperature, params.min_p, params.top_p, params.top_k)
        words = (0, 0) if params.greedy else random_words(params.seed or 0, position)
        rows.append(RowDraw(*bounds, *words, params.greedy))
    return [None if token < 0 else token for token in draw_tokens(scores.contiguous(), rows)]


def _draw(scores: Tensor, draw: Draw) -> int | None:
    """None: the model's logits are not finite, or a penalty has made a score larger than float32 holds."""
    params = draw.params
    if not scores.amax().isfinite():  # NaN if the row holds one
        return None
    if not params.greedy:
        scores = truncated((scores - scores.amax()) / params.temperature, params)
        scores = scores - exponentials(params.seed or 0, draw.position, len(scores)).log_()
    return int(_argmax(scores))


def penalise(row: Tensor, draw: Draw) -> Tensor:
    """Repetition penalty over all tokens (CTRL, arXiv:1909.05858, section 4.1); presence and frequency over output."""
    params = draw.params
    if not params.penalises:
        return row
    row = row.clone()
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted({*draw.prompt, *draw.output}), dtype=torch.int64, device=row.device)
        scores = row[seen]
        row[seen] = torch.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
    if draw.output:
        output = torch.tensor(draw.output, dtype=torch.int64, device=row.device)
        ids, counts = torch.unique(output, return_counts=True)
        row[ids] -= params.presence_penalty + params.frequency_penalty * counts
    return row


def truncated(scores: Tensor, params: SamplingParams) -> Tensor:
    """Scores with minus infinity for what min-p, top-k and top-p leave out, in that order. [vocab] -> [vocab]"""
    if params.min_p > 0:
        scores = scores.masked_fill(scores < scores.max() + torch.tensor(params.min_p).log(), -torch.inf)
    if 0 < params.top_k < len(scores):
        kth = scores.topk(params.top_k).values[-1]
        scores = scores.masked_fill(scores < kth, -torch.inf)
    if params.top_p < 1:
        ordered, order = scores.softmax(dim=-1).sort(descending=True, stable=True)
        left_out = ordered.cumsum(0) - ordered >= params.top_p
        left_out[0] = False  # even if top_p rounds to 0 in float32
        scores = scores.masked_fill(left_out.scatter(0, order, left_out), -torch.inf)
    return scores


def random_words(seed: int, position: int) -> tuple[int, int]:
    """Two words of 32 bits."""
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4]), int.from_bytes(digest[4:])


def exponentials(seed: int, position: int, count: int) -> Tensor:
    """[count] float32: the exponential variates of output `position`, one a token id, the same on every machine."""
    first, second = random_words(seed, position)
    bits = _weyl(count) ^ np.uint32(first)
    _mix(bits)
    bits += np.uint32(second)
    _mix(bits)
    bits &= np.uint32(0x7FFFFFFF)
    # 31 bits, never 0 or 1. The small values decide the race, and float32 holds those without rounding.
    uniform = torch.from_numpy(bits.view(np.int32)).float().add_(0.5).mul_((1 - 2.0**-22) * 2.0**-31)
    return uniform.neg_().log1p_().neg_()


@functools.lru_cache(maxsize=4)
def _weyl(count: int) -> Bits:
    """A Weyl sequence: multiples of 2**32 divided by the golden ratio, modulo 2**32."""
    return np.arange(1, count + 1, dtype=np.uint32) * np.uint32(0x9E3779B9)


def _mix(x: Bits) -> None:
    """A bijection of 32 bits, in place; every input bit reaches every output bit (`lowbias32`, C. Wellons)."""
    shifted = np.empty_like(x)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= np.right_shift(x, shift, out=shifted)
        x *= np.uint32(factor)
    x ^= np.right_shift(x, 16, out=shifted)
