"""Whole steps of a model with random weights, through the runner that a worker has, against the roofline: the weights
and the KV are read once, or the products take longer. As in an engine a step is launched before the result of the one
before it is asked for, and takes its tokens; decode steps are captured where the device can."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.gpu_sizes import BLOCK, Sizes
from benchmarks.gpu_timing import Least, NotRun, Row, Timer
from benchmarks.machine import Cost
from tercet.core import SamplingParams, Ticket
from tercet.devices import device_of
from tercet.engine.graphs import CudaRecorder
from tercet.engine.plan import Draw, Piece, StepPlan
from tercet.engine.runner import Runner
from tercet.kernels.kinds import Kernels, choose_kernels
from tercet.kernels.norm import RmsNorm
from tercet.kernels.packing import LinearPacker, activation_dtype
from tercet.models.config import ModelConfig
from tercet.models.layer import DenseMlp, GroupedQuery, Layer
from tercet.models.transformer import Transformer, Weights
from tercet.transfer.memory.region import Region

GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
GOALS = {1: 0.85, 64: 0.75}  # batch of a decode -> of the roofline
SPREAD = 0.02  # of the weights
PREFILLS = 2  # in a row


def random_model(config: ModelConfig, dtype: torch.dtype, kernels: Kernels) -> Transformer:
    """Its weights are drawn on the device: to write and read them as files would take minutes."""
    hidden, middle = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    packer = LinearPacker(dtype, max(hidden, middle, queries), kernels)

    def matrix(out: int, fan_in: int) -> Tensor:
        return torch.empty(out, fan_in, dtype=dtype, device=kernels.device).normal_(std=SPREAD)

    def norm() -> RmsNorm:
        ones = torch.ones(hidden, dtype=activation_dtype(dtype, kernels), device=kernels.device)
        return RmsNorm(ones, config.rms_norm_eps)

    def layer() -> Layer:
        return Layer(
            attention_norm=norm(),
            attention=GroupedQuery(
                qkv=packer.pack(matrix(queries + 2 * keys, hidden)),
                qk_norm=None,
                output=packer.pack(matrix(hidden, queries)),
            ),
            mlp_norm=norm(),
            mlp=DenseMlp(packer.pack(matrix(2 * middle, hidden)), packer.pack(matrix(hidden, middle))),
        )

    with torch.inference_mode():
        layers = tuple(layer() for _ in range(config.num_layers))
        head = packer.pack(matrix(config.vocab_size, hidden))
        weights = Weights(matrix(config.vocab_size, hidden), layers, norm(), head)
    return Transformer(config, weights, kernels, dtype)


def decode_least(sizes: Sizes, batch: int, context: int) -> Least:
    """A token for each of `batch` sequences, each with `context` tokens in the cache, the new one included."""
    config = sizes.config
    cost = Cost.of(config, sizes.dtype.itemsize, 1)
    kv = 2 * config.num_layers * config.num_kv_heads * config.head_dim * sizes.dtype.itemsize
    weights = cost.decode_bytes / sizes.dtype.itemsize
    scores = 4 * config.num_layers * config.num_heads * config.head_dim * context
    return Least(cost.decode_bytes + batch * context * kv, batch * (2 * weights + scores))


def prefill_least(sizes: Sizes, tokens: int) -> Least:
    """A whole prompt, and the first token."""
    cost = Cost.of(sizes.config, sizes.dtype.itemsize, tokens)
    return Least(cost.decode_bytes, tokens * cost.prefill_flops)


@dataclass(frozen=True)
class StepCase:
    name: str
    model: Model
    plan: StepPlan
    then: StepPlan  # the later steps, which may take the tokens of the one before
    in_a_row: int
    tokens: int  # that the cache must hold
    holds: int  # that it can
    least: Least
    goal: float | None = None

    def run(self, timer: Timer, rates: dict[str, float]) -> Row:
        if self.tokens > self.holds:
            raise NotRun(f"KV of {self.tokens} tokens, and the cache was made for {self.holds}")
        seconds = timer.wall_seconds(self._steps) / self.in_a_row
        fraction = self.least.seconds(rates) / seconds
        return Row(self.name, seconds, self.least, fraction, self.least.bound(rates), {}, self.goal)

    def _steps(self) -> None:
        runner = self.model.runner
        running = runner.launch(self.plan)
        for _ in range(self.in_a_row - 1):
            following = runner.launch(self.then, running.tokens)
            running.result()
            running = following
        running.result()


def piece(number: int, start: int, length: int) -> Piece:
    """`length` tokens behind `start` others, in blocks of its own."""
    per = -(-(start + length) // BLOCK)
    blocks = range(number * per, (number + 1) * per)
    return Piece(Ticket(str(number), 0, 1), [7] * length, start, tuple(blocks), Draw(GREEDY, 0))


class Model:
    """Made when its first row is measured, and given back behind its last."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self._sizes, self._device = sizes, device

    @cached_property
    def runner(self) -> Runner:
        sizes, kernels = self._sizes, choose_kernels("triton", self._device)
        model = random_model(sizes.config, sizes.dtype, kernels)
        with closing(Region(model.kv_layout(sizes.kv_tokens // BLOCK, BLOCK))) as region:  # it stays mapped
            runner = Runner(model, region)
        runner.kv_cache.normal_()
        if device_of(self._device).captures:
            batches = sorted({batch for batch, _ in sizes.decodes}, reverse=True)
            runner.capture(batches, sizes.config.max_context, CudaRecorder(self._device))
        return runner


def cases(sizes: Sizes, device: torch.device) -> Iterator[StepCase]:
    model, holds = Model(sizes, device), sizes.kv_tokens
    for batch, context in sizes.decodes:
        plan = StepPlan(decodes=tuple(piece(number, context - 1, 1) for number in range(batch)))
        then = StepPlan(decodes=tuple(each._replace(drawn=number) for number, each in enumerate(plan.decodes)))
        least, goal = decode_least(sizes, batch, context), GOALS.get(batch)
        name = f"decode, {batch} x {context}"
        yield StepCase(name, model, plan, then, sizes.in_a_row, batch * context, holds, least, goal)
    for tokens in sizes.prefills:
        plan, least = StepPlan(chunks=(piece(0, 0, tokens),)), prefill_least(sizes, tokens)
        yield StepCase(f"prefill of {tokens}", model, plan, plan, PREFILLS, tokens, holds, least)
