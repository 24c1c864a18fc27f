"""An admitted request while it runs: one router call per choice, their deltas in one stream.

The first choice has the place that the request came with; the others begin as places become free.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

from tercet.core import Done, Progress, PromptLogprobs, TokenEvent
from tercet.errors import ProtocolViolation
from tercet.metrics import Metrics
from tercet.roles.gateway.admission import Places
from tercet.roles.gateway.ask import Ask, Backend, Delta, Timings, Usage
from tercet.roles.gateway.choice import Choice


class Session:
    """Made by Frontend.session, which enforces the deadline and unregisters it at the end."""

    def __init__(
        self,
        ask: Ask,
        choices: Sequence[Choice],
        backend: Backend,
        metrics: Metrics,
        places: Places,
        spend: Callable[[int], None],
    ) -> None:
        """spend: told of tokens as they are generated."""
        self.ask = ask
        self.choices = choices
        self._backend = backend
        self._metrics = metrics
        self._places = places
        self._spend = spend

    def deltas(self) -> AsyncGenerator[Delta, None]:
        """Every choice's deltas as they come; each choice ends with one that has a finish_reason.

        Raises what the router raises. aclose() aborts every choice on every worker.
        """
        self._metrics.gateway_request.observe(time.monotonic() - self.ask.arrived)
        return self._run(self.choices[0]) if len(self.choices) == 1 else self._merged()

    async def _run(self, choice: Choice) -> AsyncGenerator[Delta, None]:
        try:
            async with aclosing(self._backend.generate(choice.request)) as events:
                async for event in events:
                    delta = self._delta(choice, event)
                    if delta is None:
                        continue
                    if delta.finish_reason:
                        break
                    yield delta
                else:
                    raise ProtocolViolation(f"request {choice.request.request_id}: the router's stream has no end")
        finally:
            choice.spend(self._metrics, self.ask.label)
        assert delta is not None
        assert delta.finish_reason is not None
        choice.book(delta.finish_reason, self._metrics)
        yield delta

    def _delta(self, choice: Choice, event: PromptLogprobs | TokenEvent | Progress | Done) -> Delta | None:
        """None: the event adds nothing to the answer by itself."""
        if isinstance(event, PromptLogprobs):
            choice.prompt, choice.owes_prompt = event, False
            return None
        if isinstance(event, Progress):
            choice.account = event
            return None
        if choice.owes_prompt:
            raise ProtocolViolation(f"request {choice.request.request_id}: the prompt's logprobs are missing")
        if isinstance(event, Done):
            return choice.finish(event)
        self._spend(1)
        return choice.push(event, self._metrics)

    def book(self) -> None:
        """Count the request, whose choices have all ended well."""
        timings, first = self.timings, self.choices[0]
        self._metrics.answered(self.ask.operation, timings.ttft_s, timings.tpot_s if first.num_tokens > 1 else None)

    @property
    def _firsts(self) -> Sequence[Choice]:
        """One of each prompt."""
        return self.choices[:: self.ask.n]

    @property
    def prompt_tokens(self) -> int:
        return sum(len(c.request.token_ids) for c in self._firsts)

    @property
    def usage(self) -> Usage:
        """Of all choices together; a prompt counts once however many samples it has."""
        firsts = self._firsts
        cached = [c.account.cached_tokens for c in firsts if c.account is not None]
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=sum(c.completion_tokens for c in self.choices),
            cached_tokens=sum(cached) if len(cached) == len(firsts) else None,
        )

    @property
    def timings(self) -> Timings:
        return self.choices[0].timings

    async def _merged(self) -> AsyncGenerator[Delta, None]:
        """Deltas in order of arrival. The first failure ends all; a finished task in the queue is an end."""
        queue: asyncio.Queue[Delta | asyncio.Task[None]] = asyncio.Queue()
        tasks: list[asyncio.Task[None]] = []

        def begin(work: Coroutine[Any, Any, None]) -> None:
            tasks.append(asyncio.create_task(work))
            tasks[-1].add_done_callback(queue.put_nowait)

        async def begin_all() -> None:
            for choice in self.choices:
                if choice is not self.choices[0]:
                    await self._places.take()
                begin(self._pump(choice, queue))

        begin(begin_all())
        try:
            running = len(self.choices) + 1
            while running:
                item = await queue.get()
                if isinstance(item, Delta):
                    yield item
                else:
                    item.result()
                    running -= 1
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, choice: Choice, queue: asyncio.Queue[Delta | asyncio.Task[None]]) -> None:
        try:
            async with aclosing(self._run(choice)) as deltas:
                async for delta in deltas:
                    queue.put_nowait(delta)
        finally:
            self._places.give()
