"""Drawing next tokens, as engine/sampler.py does on the host and in its order: penalties, temperature, min-p, top-k,
top-p, and an exponential race whose variates depend on two hash words of the row and on the token id alone.

R rows, one draw each   logits [R, vocab] float32

Nothing is sorted. The cost of a token is how far its score lies below the row's largest, which costs 0; its weight is
the exponential of minus its cost over the temperature. What top-k and top-p keep are the tokens up to some cost: the
largest one such that the tokens below it are fewer than k, or have less than top_p of the weight. It is searched by
bisection over the bits of a float32, which are in the order of costs, and each step leaps to costs that tokens have: so
it ends at exactly one of them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tercet.kernels.triton.tiles import LOG2_E

TILE = 4096  # tokens
AHEAD = tl.constexpr(5)  # tiles on their way: one program has a row to itself, and the whole of its SM
NO_COST = tl.constexpr(0x7F800000)  # bits of infinity
NO_TOKEN = tl.constexpr(0x7FFFFFFF)


@dataclass(frozen=True)
class SamplingRows:
    """What each of R rows asks for. A neutral value leaves its step out."""

    temperature: Tensor  # [R] float32; 0, which every greedy row must have: the likeliest token
    min_p: Tensor  # [R] float32; 0 neutral
    top_k: Tensor  # [R] int32; 0 neutral, and so is vocab or more
    top_p: Tensor  # [R] float32; 1 neutral
    words: Tensor  # [R, 2] int64, of `race_words`


@dataclass(frozen=True)
class Penalties:
    repetition: Tensor  # [R] float32, over all tokens; 1 neutral
    presence: Tensor  # [R] float32, over the output's; 0 neutral, as frequency
    frequency: Tensor  # [R] float32
    in_prompt: Tensor  # [R, vocab] bool
    in_output: Tensor  # [R, vocab] int32, how often


def race_words(seed: int, position: int) -> tuple[int, int]:
    """The hash words of output `position`."""
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4]), int.from_bytes(digest[4:])


@triton.jit
def _penalise(
    logits,
    row_stride,
    repetition,
    presence,
    frequency,
    in_prompt,
    in_output,
    penalty_stride,
    output_stride,
    out,
    vocab,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TILE + tl.arange(0, TILE)
    here = token < vocab
    score = tl.load(logits + row * row_stride + token, mask=here, other=0.0)
    prompt = tl.load(in_prompt + row * penalty_stride + token, mask=here, other=0)
    times = tl.load(in_output + row * output_stride + token, mask=here, other=0)
    factor = tl.load(repetition + row)
    repeated = tl.where(score > 0, tl.div_rn(score, factor), score * factor)
    score = tl.where((prompt != 0) | (times > 0), repeated, score)
    debt = tl.load(presence + row) + tl.load(frequency + row) * times.to(tl.float32)
    tl.store(out + row * vocab + token, tl.where(times > 0, score - debt, score), mask=here)


@triton.jit
def _costs(scores, token, vocab, largest):
    """Infinite past the end, and for tokens whose score is minus infinity. Never minus zero."""
    score = tl.load(scores + token, mask=token < vocab, other=float("-inf"))
    return tl.abs(largest - score)


@triton.jit
def _mass_below(scores, vocab, largest, rate, limit, bound, BY_COUNT: tl.constexpr, TILE: tl.constexpr):
    """Of tokens that cost at most `limit`: how many cost less than `bound`, or else their weight; the
    largest cost below it and the smallest from it on, as bits, and how many cost exactly it."""
    mass = tl.zeros([TILE], tl.float32)
    below = tl.zeros([TILE], tl.int32)
    above = tl.full([TILE], NO_COST, tl.int32)
    equal = tl.zeros([TILE], tl.int32)
    for at in tl.range(0, vocab, TILE, num_stages=AHEAD):
        cost = _costs(scores, at + tl.arange(0, TILE), vocab, largest)
        bits = cost.to(tl.int32, bitcast=True)
        allowed = (cost <= limit) & (bits < NO_COST)
        less = allowed & (bits < bound)
        weight = 1.0 if BY_COUNT else tl.exp2(-cost * rate)
        mass += tl.where(less, weight, 0.0)
        below = tl.maximum(below, tl.where(less, bits, 0))
        above = tl.minimum(above, tl.where(allowed & (bits >= bound), bits, NO_COST))
        equal += (allowed & (bits == bound)).to(tl.int32)
    return tl.sum(mass, 0), tl.max(below, 0), tl.min(above, 0), tl.sum(equal, 0)


@triton.jit
def _largest_kept(scores, vocab, largest, rate, limit, share, BY_COUNT: tl.constexpr, TILE: tl.constexpr):
    """-> the largest cost, as bits, such that fewer than `share` tokens are below it, or else less than `share` of the
    weight; and that number or weight."""
    whole, high, _, _ = _mass_below(scores, vocab, largest, rate, limit, NO_COST, BY_COUNT, TILE)
    target = share if BY_COUNT else share * whole
    low = high * 0
    while low < high:
        middle = low + (high - low + 1) // 2
        mass, below, above, _ = _mass_below(scores, vocab, largest, rate, limit, middle, BY_COUNT, TILE)
        if mass < target:
            low = above
        else:
            high = below
    return low, target


@triton.jit
def _tie_end(scores, vocab, largest, bound, kept, TILE: tl.constexpr):
    """The id after that of the `kept`th token whose cost has the bits `bound`."""
    before = kept * 0
    end = kept * 0
    for at in tl.range(0, vocab, TILE, num_stages=AHEAD):
        token = at + tl.arange(0, TILE)
        cost = _costs(scores, token, vocab, largest)
        equal = ((cost.to(tl.int32, bitcast=True) == bound) & (token < vocab)).to(tl.int32)
        rank = before + tl.cumsum(equal, 0)
        end = tl.maximum(end, tl.max(tl.where((equal > 0) & (rank <= kept), token + 1, 0), 0))
        before += tl.sum(equal, 0)
    return end


@triton.jit
def _mix(x):
    """A bijection of 32 bits (`lowbias32`, C. Wellons)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _log_exponential(token, first, second):
    """The logarithm of each token's exponential variate. log1p(-u) is log(1 - u), corrected for what 1 - u rounds
    away."""
    bits = _mix((token + 1).to(tl.uint32) * 0x9E3779B9 ^ first)
    bits = _mix(bits + second) & 0x7FFFFFFF
    uniform = (bits.to(tl.int32).to(tl.float32) + 0.5) * ((1 - 2.0**-22) * 2.0**-31)
    rest = 1.0 - uniform
    lost = 1.0 - rest
    exponential = tl.where(lost == 0.0, uniform, -tl.log(rest) * (uniform / tl.where(lost == 0.0, 1.0, lost)))
    return tl.log(exponential)


@triton.jit
def _race(
    scores, vocab, largest, temperature, limit, bound, tie_end, first, second, DRAWS: tl.constexpr, TILE: tl.constexpr
):
    """The token with the largest score, less the logarithm of its variate if DRAWS; the first of equals. Those that
    cost more than `limit` or `bound` stay out, and of those that cost `bound` the ids from tie_end on."""
    best = tl.full([TILE], float("-inf"), tl.float32)
    winner = tl.full([TILE], NO_TOKEN, tl.int32)
    for at in tl.range(0, vocab, TILE, num_stages=AHEAD):
        token = at + tl.arange(0, TILE)
        cost = _costs(scores, token, vocab, largest)
        bits = cost.to(tl.int32, bitcast=True)
        runs = (cost <= limit) & (bits < NO_COST) & ((bits < bound) | ((bits == bound) & (token < tie_end)))
        time = -tl.div_rn(cost, temperature)
        if DRAWS:
            time -= _log_exponential(token, first, second)
        time = tl.where(runs, time, float("-inf"))
        winner = tl.where(time > best, token, winner)
        best = tl.maximum(best, time)
    return tl.min(tl.where(best == tl.max(best, 0), winner, NO_TOKEN), 0)


@triton.jit
def _sample(logits, row_stride, temperatures, min_ps, top_ks, top_ps, words, tokens, vocab, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scores = logits + row * row_stride
    largest = tl.full([TILE], float("-inf"), tl.float32)
    for at in tl.range(0, vocab, TILE, num_stages=AHEAD):
        token = at + tl.arange(0, TILE)
        score = tl.load(scores + token, mask=token < vocab, other=float("-inf"))
        number = score == score  # noqa: PLR0124 # NaN alone does not equal itself: it counts as infinite
        largest = tl.maximum(largest, tl.where(number, score, float("inf")))
    top = tl.max(largest, 0)
    chosen = tl.full([], -1, tl.int32)
    if tl.abs(top) < float("inf"):
        temperature = tl.load(temperatures + row)
        no_bound = tl.full([], NO_COST, tl.int32)
        if temperature > 0:
            rate = LOG2_E / temperature
            limit = tl.full([], float("inf"), tl.float32)
            min_p = tl.load(min_ps + row)
            if min_p > 0:
                limit = -tl.log(min_p) * temperature
            top_k = tl.load(top_ks + row)
            if (top_k > 0) & (top_k < vocab):
                kth, _ = _largest_kept(scores, vocab, top, rate, limit, top_k.to(tl.float32), True, TILE)
                limit = kth.to(tl.float32, bitcast=True)
            top_p = tl.load(top_ps + row)
            bound = no_bound
            tie_end = vocab + no_bound * 0
            if top_p < 1:
                bound, target = _largest_kept(scores, vocab, top, rate, limit, top_p, False, TILE)
                mass, _, _, ties = _mass_below(scores, vocab, top, rate, limit, bound, False, TILE)
                each = tl.exp2(-bound.to(tl.float32, bitcast=True) * rate)
                kept = tl.ceil((target - mass) / each)
                if kept < ties.to(tl.float32):
                    tie_end = _tie_end(scores, vocab, top, bound, tl.maximum(kept, 1.0).to(tl.int32), TILE)
            first = tl.load(words + row * 2).to(tl.uint32)
            second = tl.load(words + row * 2 + 1).to(tl.uint32)
            chosen = _race(scores, vocab, top, temperature, limit, bound, tie_end, first, second, True, TILE)
        else:
            chosen = _race(scores, vocab, top, 1.0, float("inf"), no_bound, vocab, 0, 0, False, TILE)
    tl.store(tokens + row, chosen.to(tl.int64))


def penalise(logits: Tensor, penalties: Penalties) -> Tensor:
    """-> scores [R, vocab]. Repetition penalty over all tokens (CTRL, arXiv:1909.05858); the others over the output."""
    rows, vocab = logits.shape
    out = torch.empty(rows, vocab, dtype=torch.float32, device=logits.device)
    if rows:
        p = penalties
        _penalise[(rows, triton.cdiv(vocab, TILE))](
            logits, logits.stride(0), p.repetition, p.presence, p.frequency, p.in_prompt, p.in_output,
            p.in_prompt.stride(0), p.in_output.stride(0), out, vocab, TILE=TILE,
        )  # fmt: skip
    return out


def sample(logits: Tensor, rows: SamplingRows, penalties: Penalties | None = None) -> Tensor:
    """-> [R] int64, a token each; -1 where the largest score is no finite number, and where any is NaN."""
    scores = logits if penalties is None else penalise(logits, penalties)
    count, vocab = scores.shape
    tokens = torch.empty(count, dtype=torch.int64, device=scores.device)
    if count:
        _sample[(count,)](
            scores, scores.stride(0), rows.temperature, rows.min_p, rows.top_k, rows.top_p, rows.words, tokens, vocab,
            TILE=min(TILE, triton.next_power_of_2(vocab)), num_warps=16,
        )  # fmt: skip
    return tokens
