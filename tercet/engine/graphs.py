"""Decode steps captured as graphs: for a batch of a captured size the device gets all of a step's kernels by one call.

A step of fewer sequences runs in the next larger size; the rows that are left have no context and write no KV. What a
graph reads and writes has one place for all of its runs, which follow each other on the device.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tercet.engine.inputs import Arrays, BatchInputs
from tercet.engine.plan import StepPlan
from tercet.models.batch import StepBatch

WARM_UPS = 2  # runs before a capture, which may neither compile a kernel nor allocate a workspace


class Recorder(Protocol):
    def __call__(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """-> what runs the step again, on the same memory. Its tensor is overwritten by the next run of any step."""


class CudaRecorder:
    """Records CUDA graphs. They share their memory, since they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch's own
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads of the worker may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = step()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


class DecodeGraphs:
    def __init__(
        self, forward: Callable[[StepBatch], Tensor], device: torch.device, block_size: int, max_context: int
    ) -> None:
        """forward: computes the logits of a batch."""
        self._forward, self._device, self._block_size = forward, device, block_size
        self._width = -(-max_context // block_size)  # of the block tables
        self._sizes: list[int] = []
        self._steps: dict[int, tuple[Tensor, Callable[[], Tensor]]] = {}  # size -> its input's place, what runs it

    def capture(self, sizes: Iterable[int], recorder: Recorder) -> None:
        """The largest first, in whose memory the others find room, so that is the best order of `sizes`."""
        for size in sizes:
            arrays, inputs = self.inputs(StepPlan(), size)
            place = arrays.packed().to(self._device)
            batch = inputs.batch(arrays.views(place))
            self._steps[size] = place, recorder(lambda batch=batch: self._forward(batch))  # type: ignore[misc]  # bound early
            self._sizes = sorted(self._steps)

    def size_for(self, plan: StepPlan) -> int | None:
        """The captured size that computes a plan; None: none does."""
        at = bisect_left(self._sizes, len(plan.decodes))
        return None if plan.chunks or at == len(self._sizes) else self._sizes[at]

    def inputs(self, plan: StepPlan, size: int) -> tuple[Arrays, BatchInputs]:
        arrays = Arrays()
        return arrays, BatchInputs(arrays, plan, self._block_size, size, self._width)

    def run(self, size: int, packed: Tensor) -> Tensor:
        """packed: begins with the arrays of `inputs`, packed, on the device. -> logits [size, vocab] float32, until the
        next run."""
        place, replay = self._steps[size]
        place.copy_(packed[: len(place)])
        return replay()


def default_sizes(max_running: int) -> Sequence[int]:
    """1, 2, 4, 8, then by 8, up to max_running."""
    return sorted({*(n for n in (1, 2, 4) if n < max_running), *range(8, max_running, 8), max_running})
