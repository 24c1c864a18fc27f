"""Captured decode steps: a batch that is filled up to a captured size, in memory that all runs share, gives the tokens
that a step of its own gives. What replays a step here runs it again; on a GPU it is a CUDA graph (tests/gpu)."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tercet.core import Role, SamplingParams
from tercet.engine.graphs import default_sizes
from tercet.engine.inputs import FLOAT32, INT32, INT64, Arrays
from tercet.engine.plan import StepPlan
from tercet.kernels.kinds import Kernels
from tercet.models.sources import load_model
from tercet.roles import computing
from tercet.roles.part import Identity
from tercet.spec import ClusterSpec, ModelSpec, RoleSpec, SchedulerSpec
from tests.engines import Running, load_tiny
from tests.few import few
from tests.tiny import CONTEXT, VOCAB, tiny_model
from tests.triton_interpreter import DEVICE

rng = random.Random(11)
PROMPTS = [[rng.randrange(VOCAB) for _ in range(n)] for n in (14, 1, 17, 15, 30)]
PARAMS = [
    SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=5, temperature=0.9, top_p=0.9, seed=4, logprobs=2, ignore_eos=True),
    SamplingParams(max_tokens=3, temperature=0.7, seed=9, repetition_penalty=1.2, ignore_eos=True),
]


def tokens_of(kind: str, sizes: list[int] | None) -> tuple[list[list[int]], list[int]]:
    """-> the tokens of each prompt, and the sizes that were run."""
    model = load_model(ModelSpec(source=tiny_model(), dtype="float32"), Kernels(kind, DEVICE))
    running = Running(model, budget=24, blocks=40, max_running=3, prefix=True)
    ran: list[int] = []
    if sizes is not None:
        running.runner.capture(sizes, CONTEXT, lambda step: step)
        run = running.runner._graphs.run
        running.runner._graphs.run = lambda size, packed: ran.append(size) or run(size, packed)
    added = [running.add(n, prompt, PARAMS[n % len(PARAMS)]) for n, prompt in enumerate(PROMPTS)]
    done = dict(running.done.get(timeout=120) for _ in PROMPTS)
    running.stop()
    return [done[sequence] for sequence in added], ran


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return tokens_of("torch", None)[0]


@pytest.mark.parametrize("sizes", few([[3, 1], [2]], 1))
def test_captured_steps_give_the_same_tokens(sizes, expected):
    tokens, ran = tokens_of("triton", sizes)
    assert tokens == expected
    assert {*ran} <= {*sizes}
    assert max(sizes) in ran


@pytest.mark.slow  # minutes in Triton's interpreter
def test_steps_run_ahead_and_give_the_same_tokens(expected):
    assert tokens_of("triton", None)[0] == expected


def test_a_preempted_sequence_goes_on_behind_steps_in_flight():
    """The pool is so small that some are preempted; they are computed again from tokens that the device drew."""
    model = load_model(ModelSpec(source=tiny_model(), dtype="float32"), Kernels("triton", DEVICE))
    running = Running(model, budget=64, blocks=4, max_running=3)
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    prompts = [prompt[:14] for prompt in PROMPTS if len(prompt) >= 14][:3]
    added = [running.add(n, prompt, params) for n, prompt in enumerate(prompts)]
    done = dict(running.done.get(timeout=120) for _ in prompts)
    assert running.engine.load().preemptions > 0
    running.stop()
    alone = Running(load_tiny(), blocks=40)
    for sequence, prompt in zip(added, prompts, strict=True):
        again = alone.add(0, prompt, params)
        assert (again, done[sequence]) == alone.done.get(timeout=60)
    alone.stop()


def test_chunks_and_larger_batches_run_uncaptured():
    model = load_model(ModelSpec(source=tiny_model(), dtype="float32"), Kernels("torch", DEVICE))
    running = Running(model)
    running.runner.capture([2], CONTEXT, lambda step: step)
    graphs, piece = running.runner._graphs, None
    assert graphs.size_for(StepPlan(decodes=(piece,))) == 2
    assert graphs.size_for(StepPlan(decodes=(piece,) * 2)) == 2
    assert graphs.size_for(StepPlan(decodes=(piece,) * 3)) is None
    assert graphs.size_for(StepPlan(decodes=(piece,), chunks=(piece,))) is None
    running.stop()


@given(st.lists(st.tuples(st.sampled_from([INT64, INT32, FLOAT32]), st.integers(0, 40))))
def test_arrays_come_out_of_the_copy_as_they_went_in(kinds):
    generator, arrays = np.random.default_rng(5), Arrays()
    given_ = [generator.integers(-(2**31), 2**31, size).astype(dtype) for dtype, size in kinds]
    numbers = [arrays.add(values, dtype) for values, (dtype, _) in zip(given_, kinds, strict=True)]
    views = arrays.views(arrays.packed().clone())
    for number, values in zip(numbers, given_, strict=True):
        assert torch.equal(views[number], torch.from_numpy(values))


@pytest.mark.parametrize(
    ("max_running", "sizes"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (20, [1, 2, 4, 8, 16, 20]), (24, [1, 2, 4, 8, 16, 24])],
)
def test_default_sizes(max_running, sizes):
    assert default_sizes(max_running) == sizes


def test_a_size_above_the_largest_batch_is_refused():
    wanted = r"cuda_graphs: no batch has 17 sequences, since scheduler.max_running is 16; leave"
    with pytest.raises(ValueError, match=wanted):
        RoleSpec(cuda_graphs=[1, 17], scheduler=SchedulerSpec(max_running=16))
    assert RoleSpec(cuda_graphs=[16]).cuda_graphs == [16]


@pytest.mark.parametrize(
    ("role", "can", "sizes"), [(Role.DECODE, True, [4, 2, 1]), (Role.DECODE, False, []), (Role.PREFILL, True, [])]
)
def test_only_who_decodes_captures(role, can, sizes, monkeypatch):
    """And not every model can, as those whose attention waits for the device."""
    monkeypatch.setattr(computing, "CudaRecorder", lambda device: None)
    captured: list[int] = []
    runner = SimpleNamespace(captures=can, capture=lambda wanted, max_context, recorder: captured.extend(wanted))
    spec = ClusterSpec(
        roles={each: RoleSpec(scheduler=SchedulerSpec(max_running=4)) for each in (Role.PREFILL, Role.DECODE)}
    )
    who = Identity("worker-0", role, 1, spec, "127.0.0.1", "secret", (role,), ())
    made = computing.Computing(who, None, SimpleNamespace(fingerprint=""), Kernels("triton", torch.device("cuda", 0)))
    made._capture(runner, CONTEXT)
    assert captured == sizes
