"""An admitted request while it runs: one router call per choice, their deltas in one stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from tercet.core import Done
from tercet.errors import ProtocolViolation
from tercet.metrics import Metrics
from tercet.roles.gateway.ask import Ask, Backend, Delta, Timings, Usage
from tercet.roles.gateway.choice import Choice


class Session:
    """Made by Frontend.session, which bounds it by the deadline and takes it off the books at the end."""

    def __init__(self, ask: Ask, choices: Sequence[Choice], backend: Backend, metrics: Metrics) -> None:
        self.ask = ask
        self.choices = choices
        self._backend = backend
        self._metrics = metrics

    def deltas(self) -> AsyncGenerator[Delta, None]:
        """Every choice's deltas as they come; each choice ends with one that has a finish_reason.

        Raises what the router raises. aclose() aborts every choice on every worker.
        """
        self._metrics.gateway_request.observe(time.monotonic() - self.ask.arrived)
        streams = [self._run(choice) for choice in self.choices]
        return streams[0] if len(streams) == 1 else _merge(streams)

    async def _run(self, choice: Choice) -> AsyncGenerator[Delta, None]:
        async with aclosing(self._backend.generate(choice.request)) as events:
            async for event in events:
                delta = choice.finish(event) if isinstance(event, Done) else choice.push(event, self._metrics)
                if delta.finish_reason:
                    break
                yield delta
            else:
                raise ProtocolViolation(f"request {choice.request.request_id}: the router's stream has no end")
        choice.book(delta.finish_reason, self._metrics)
        yield delta

    @property
    def usage(self) -> Usage:
        """Of all choices together; a prompt counts once however many samples it has."""
        firsts = self.choices[:: self.ask.n]
        cached = [c.done.cached_tokens for c in firsts if c.done is not None]
        return Usage(
            prompt_tokens=sum(len(c.request.token_ids) for c in firsts),
            completion_tokens=sum(c.num_tokens for c in self.choices),
            cached_tokens=sum(cached) if len(cached) == len(firsts) else None,
        )

    @property
    def timings(self) -> Timings:
        return self.choices[0].timings


async def _merge(streams: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """Deltas in order of arrival. The first failure ends all; a finished task in the queue is its stream's end."""
    queue: asyncio.Queue[Delta | asyncio.Task[None]] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[Delta, None]) -> None:
        async with aclosing(stream):
            async for delta in stream:
                queue.put_nowait(delta)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    for task in tasks:
        task.add_done_callback(queue.put_nowait)
    try:
        running = len(tasks)
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
