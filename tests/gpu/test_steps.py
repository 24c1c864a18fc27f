"""The launch of a step never waits for the device: else the host could not prepare the next one meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from tercet.core import SamplingParams, Ticket
from tercet.engine.graphs import CudaRecorder
from tercet.engine.plan import Draw, Piece, StepPlan
from tercet.engine.runner import Runner
from tercet.kernels.kinds import Kernels
from tercet.models.sources import load_model
from tercet.spec import ModelSpec
from tercet.transfer.memory.region import Region
from tests.gpu.small import ON_GPU, small_model
from tests.triton_interpreter import DEVICE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="a CPU has nothing to wait for")]
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=4, temperature=0.8, top_p=0.9, top_k=20, seed=3, ignore_eos=True)
PENALISED = SamplingParams(max_tokens=4, temperature=0.8, seed=3, frequency_penalty=0.3, ignore_eos=True)
SIZE = 16


def piece(number: int, start: int, length: int, params: SamplingParams) -> Piece:
    """In four blocks of its own."""
    output = [3, 4] if params.penalises else []
    draw = Draw(params, 0, [1, 2] if params.penalises else [], output)
    needed = -(-(start + length) // SIZE)
    return Piece(Ticket(str(number), 0, 1), [7] * length, start, tuple(range(4 * number, 4 * number + needed)), draw)


STEPS = {
    "decodes": StepPlan(decodes=tuple(piece(n, 20 + n, 1, GREEDY) for n in range(3))),
    "a chunk": StepPlan(chunks=(piece(0, 0, 40, GREEDY),)),
    "decodes and chunks": StepPlan(
        decodes=(piece(0, 30, 1, DRAWN),), chunks=(piece(1, 0, 20, GREEDY), piece(2, 5, 9, DRAWN))
    ),
    "draws of all kinds": StepPlan(decodes=tuple(piece(n, 9, 1, p) for n, p in enumerate((GREEDY, DRAWN, PENALISED)))),
}


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module", params=["launched", "captured"])
def runner(request) -> Runner:
    spec = ModelSpec(source=small_model(), dtype="float32", max_context=1024)
    model = load_model(spec, Kernels("triton", DEVICE)).model
    runner = Runner(model, Region(model.kv_layout(64, SIZE)))
    if request.param == "captured":
        runner.capture([4, 1], 1024, CudaRecorder(DEVICE))
    return runner


def test_waiting_would_be_seen(runner):
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchronizing"):
        runner.kv_cache[0, 0, 0, 0, 0, 0].item()


@pytest.mark.parametrize("name", STEPS)
def test_a_launch_does_not_wait(name, runner):
    plan = STEPS[name]
    then = plan._replace(decodes=tuple(each._replace(drawn=number) for number, each in enumerate(plan.decodes)))
    first = runner.launch(plan)
    expected = [first.result(), runner.launch(then, first.tokens).result()]  # compiles
    with waiting_is_an_error():
        first = runner.launch(plan)
        second = runner.launch(then, first.tokens)
    assert [first.result(), second.result()] == expected
    assert all(len(each.tokens) == 1 for each in expected[0])
