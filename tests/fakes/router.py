"""A router that answers from a script, and remembers what it was asked and what was aborted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, MutableSequence, Sequence

from tercet.core import (
    STAGES,
    Done,
    FinishReason,
    GenerateRequest,
    Load,
    PromptLogprobs,
    StageTimes,
    TokenEvent,
    TopLogprobs,
    WorkerInfo,
)
from tercet.errors import DeadlineExceeded, TercetError
from tercet.roles.router.effects import Watcher
from tests.fakes.tokenizer import EOS

SECONDS = tuple((stage, 0.001 * number) for number, stage in enumerate(STAGES, 1))
TIMES = StageTimes(SECONDS, kv_bytes=4096, transport="shm")
WORKERS = (("prefill", "prefill-0"), ("decode", "decode-1"))


class FakeRouter:
    """Says `text` byte by byte and stops, or is cut by max_tokens; with ignore_eos it begins again and again.

    `gate`: an event that must be set before each token (None: no waiting); `error`, raised after `error_after` tokens.
    """

    def __init__(self, text: str = "The capital of France is Paris.", delay_s: float = 0.0) -> None:
        self.text = text
        self.delay_s = delay_s
        self.gate: asyncio.Event | None = None
        self.error: TercetError | None = None
        self.error_after = 0
        self.requests: MutableSequence[GenerateRequest] = []
        self.running = 0
        self.aborted: list[str] = []
        self.ended: list[str] = []
        self.proven = True
        self.missing: list[str] = []
        self.workers: tuple[WorkerInfo, ...] = ()
        self.closed = False
        self.script: Callable[[GenerateRequest], bytes] = lambda _: self.text.encode()

    def slow_pair(self) -> str:
        return ""

    def queued(self) -> int:
        return 0

    def watch(self, watcher: Watcher) -> None:
        self.watcher = watcher

    async def set_workers(self, workers: Sequence[WorkerInfo]) -> None:
        self.workers = tuple(workers)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[PromptLogprobs | TokenEvent | Done, None]:
        self.requests.append(request)
        self.running += 1
        finished = False
        says = [*self.script(request), EOS]
        if request.params.ignore_eos:
            says = says[:-1] * request.params.max_tokens
        try:
            if (k := request.params.prompt_logprobs) is not None:
                await self._pace(0, request.deadline)
                yield PromptLogprobs(tuple(self._logprobs(token_id, k) for token_id in request.token_ids[1:]))
            for i, token_id in enumerate(says[: request.params.max_tokens]):
                await self._pace(i, request.deadline)
                yield self._token(token_id, request)
                if stopped := token_id in (EOS, *request.params.stop_token_ids):
                    break
            if self.error is not None:
                raise self.error
            finished = self.proven = True
            yield Done(
                FinishReason.STOP if stopped else FinishReason.LENGTH,
                stop_token_id=token_id if stopped else None,
                cached_tokens=16,
                times=TIMES,
                workers=WORKERS,
            )
        finally:
            self.running -= 1
            (self.ended if finished else self.aborted).append(request.request_id)

    async def _pace(self, i: int, deadline: float) -> None:
        if self.error is not None and i >= self.error_after:
            raise self.error
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                if self.gate is not None:
                    await self.gate.wait()
                await asyncio.sleep(self.delay_s)
        except TimeoutError as error:
            raise DeadlineExceeded("the fake router's deadline has passed") from error

    def _token(self, token_id: int, request: GenerateRequest) -> TokenEvent:
        k = request.params.logprobs
        if k is None:
            return TokenEvent(token_id)
        return TokenEvent(token_id, *self._logprobs(token_id, k))

    def _logprobs(self, token_id: int, k: int) -> tuple[float, TopLogprobs]:
        likely = (token_id, *range(65, 64 + k))[:k]
        return -0.5, tuple((b, -0.5 - i) for i, b in enumerate(likely))

    def loads(self) -> dict[str, Load]:
        return {"decode-1": Load(running=self.running, blocks_total=10, blocks_free=4, blocks_owned=6)}

    def missing_roles(self) -> list[str]:
        return self.missing

    def is_ready(self) -> bool:
        return self.proven and not self.missing

    async def close(self) -> None:
        self.closed = True
