"""The engine's thread: plan, launch, commit, report; and its lock, behind which roles reach the state.

Where the executor may run ahead, the next step is planned and launched before the result of the one that runs is
awaited, so that a device never waits for the host (overlap scheduling). The lock is a leaf (nothing else is locked
under it), and it is not held while a step runs.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from tercet.core import FinishReason, Load
from tercet.engine.executor import Executor, Launched
from tercet.engine.plan import StepPlan
from tercet.engine.replicas import Replicas
from tercet.engine.report import StepReport
from tercet.engine.sequence import Sequence
from tercet.engine.state import EngineState
from tercet.errors import InvalidRequest
from tercet.spec import RoleSpec


class Engine:
    def __init__(
        self,
        executor: Executor,
        spec: RoleSpec,
        max_context: int,
        eos_token_ids: tuple[int, ...],
        quarantine_blocks: int,
        on_step: Callable[[StepReport], None],
        *,
        mrope: bool = False,
        replicas: int = 1,
    ) -> None:
        """on_step: takes the report of each step; called on the engine's thread. mrope: the model has M-RoPE. replicas:
        data replicas that the executor computes together, each with as many blocks as the spec says."""
        self._executor = executor
        self._on_step = on_step
        self._work = threading.Condition()

        def state() -> EngineState:
            return EngineState(spec, max_context, eos_token_ids, quarantine_blocks, self._work.notify, mrope=mrope)

        self._state = state() if replicas == 1 else Replicas(replicas, state)
        self._stopping = False
        self.step_started: float | None = None  # time.monotonic() since which one step is awaited; health looks at it
        self.failure: BaseException | None = None  # what ended the loop, if it died

    # ---- verbs of EngineState, from any thread

    def add(self, sequence: Sequence) -> None:
        with self._work:
            self._state.add(sequence, time.monotonic())

    def reserve(self, sequence: Sequence) -> tuple[int, list[int]]:
        with self._work:
            return self._state.reserve(sequence)

    def join(self, sequence: Sequence, first_token: int) -> None:
        with self._work:
            self._state.join(sequence, first_token)

    def quarantine(self, sequence: Sequence) -> None:
        with self._work:
            self._state.quarantine(sequence)

    def release(self, sequence: Sequence, verified: int = 0) -> None:
        with self._work:
            self._state.release(sequence, verified)

    def abort(self, sequence: Sequence) -> None:
        with self._work:
            self._state.abort(sequence)
            self._forget()

    def see(self, sequence: Sequence, image: int, embeddings: Any) -> None:
        """An image's embeddings, [levels, tokens, hidden size], are here; too late is as good as never."""
        with self._work:
            if self._state.see(sequence, image):
                self._executor.see((sequence.ticket, image), embeddings)

    def op_done(self, sequence: Sequence) -> None:
        with self._work:
            self._state.op_done(sequence)

    def lose(self, replica: int) -> None:
        """Nothing more goes to this data replica, and what it has ends."""
        assert isinstance(self._state, Replicas)
        with self._work:
            self._state.lose(replica)

    def restore(self, replica: int) -> None:
        """It is there again, with empty memory."""
        assert isinstance(self._state, Replicas)
        with self._work:
            self._state.restore(replica)

    def load(self) -> Load:
        with self._work:
            return self._state.load()

    def check_integrity(self) -> None:
        with self._work:
            self._state.check_integrity()

    # ---- what needs no lock

    def finish_after(self, sequence: Sequence, token_id: int) -> tuple[FinishReason, int | None] | None:
        return self._state.finish_after(sequence, token_id)

    def check_ids(self, token_ids: Iterable[int]) -> None:
        """Raises InvalidRequest for an id that the embedding has no row for."""
        size = self._executor.vocab_size
        wrong = next((token for token in token_ids if not 0 <= token < size), None)
        if wrong is not None:
            raise InvalidRequest(f"token id {wrong} is outside the model's vocabulary (0 to {size - 1})")

    @property
    def computed(self) -> int:
        """Layers computed so far, over all steps: it grows as long as the engine makes progress. Any thread."""
        return self._executor.layers_done

    # ---- the thread

    def run(self) -> None:
        """Run steps until `stop`. An exception ends the loop and is kept in `failure`: the worker is then unhealthy and
        is replaced."""
        try:
            self._run()
        except BaseException as error:
            self.failure = error
            raise

    def stop(self) -> None:
        with self._work:
            self._stopping = True
            self._work.notify()

    def _run(self) -> None:
        launched: deque[Launched] = deque()
        while True:
            plan, evicted = self._next_plan(wait=not launched)
            if evicted:
                self._on_step(evicted)
            elif plan is None and not launched:
                return
            if plan is None and not launched:
                continue
            self.step_started = self.step_started or time.monotonic()
            if plan is not None:
                launched.append(self._executor.launch(plan))
            if plan is None or len(launched) > self._executor.ahead:
                self._settle(launched.popleft())

    def _next_plan(self, *, wait: bool) -> tuple[StepPlan | None, StepReport]:
        """wait: for work. None: the engine stops, or there is nothing to do before a step in flight has ended. And who
        had to leave for the plan."""
        with self._work:
            while not self._stopping:
                plan, evicted = self._state.plan(time.monotonic()), self._state.evicted()
                if plan.pieces or evicted:
                    return plan if plan.pieces else None, evicted
                if not wait:
                    break
                self._work.wait()
            return None, []

    def _forget(self) -> None:
        for key in self._state.forgotten():
            self._executor.forget(key)

    def _settle(self, step: Launched) -> None:
        result = step.result()
        with self._work:
            report = self._state.commit(result)
            self._forget()
        self.step_started = None
        self._on_step(report)
