"""The core that HTTP and gRPC share: what comes in is checked, admitted, tokenised and sent to the router.

async with frontend.session(ask) as session:      raises UserError, Overloaded before anything is sent
    async for delta in session.deltas(): ...      raises what the router raises, DeadlineExceeded
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

from tercet.core import GenerateRequest
from tercet.errors import ContextTooLong, DeadlineExceeded, InvalidRequest, ModelNotFound, NoWorkers, Overloaded
from tercet.metrics import Metrics
from tercet.roles.gateway.ask import Ask, Backend, Chat, Prompt, ServedModel
from tercet.roles.gateway.choice import Choice
from tercet.roles.gateway.session import Session
from tercet.spec import LimitsSpec

MAX_STOPS = 4  # as in the OpenAI API
MAX_STOP_CHARS = 256  # bounds the work per token
THREAD_CHARS = 8192  # more text than this is tokenised in a thread, so that streams go on meanwhile


class Frontend:
    """Admission and translation. One per gateway, used from one event loop."""

    def __init__(self, limits: LimitsSpec, backend: Backend, model: ServedModel, metrics: Metrics) -> None:
        self.limits = limits
        self.model = model
        self.metrics = metrics
        self._backend = backend
        self._inflight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._live: dict[str, asyncio.Timeout] = {}  # request id -> its deadline
        self._draining = False
        self._stopping = False

    @property
    def inflight(self) -> int:
        """Choices that are being generated."""
        return self._inflight

    @asynccontextmanager
    async def session(self, ask: Ask) -> AsyncGenerator[Session, None]:
        """Run the body under the request's deadline, counted against limits.max_inflight_requests."""
        self._check(ask)
        self._admit(ask)
        try:
            async with asyncio.timeout(ask.arrived + ask.timeout_s - time.monotonic()) as deadline:
                self._live[ask.request_id] = deadline
                yield Session(ask, await self._choices(ask), self._backend, self.metrics)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            if self._stopping:
                raise NoWorkers("the gateway is stopping; send the request again") from error
            raise DeadlineExceeded(f"no full answer within {ask.timeout_s:g} s") from error
        finally:
            self._live.pop(ask.request_id, None)
            self._count(-ask.num_choices)

    async def drain(self, timeout_s: float) -> None:
        """Refuse what is new, let what runs finish, and end by force what still runs after `timeout_s`."""
        self._draining = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        self._stopping = True
        for deadline in self._live.values():
            if not deadline.expired():
                deadline.reschedule(0)

    def _check(self, ask: Ask) -> None:
        ask.params.validate()
        if not 1 <= ask.n <= self.limits.max_n:
            raise InvalidRequest(f"n must be from 1 to {self.limits.max_n}, got {ask.n}")
        if not ask.prompts:
            raise InvalidRequest("prompt must not be empty")
        if ask.num_choices > self.limits.max_inflight_requests:
            raise InvalidRequest(
                f"prompt: {len(ask.prompts)} prompts times n {ask.n} is more than the gateway takes "
                f"({self.limits.max_inflight_requests})"
            )
        if len(ask.stop) > MAX_STOPS:
            raise InvalidRequest(f"stop takes at most {MAX_STOPS} strings, got {len(ask.stop)}")
        for stop in ask.stop:
            if not 1 <= len(stop) <= MAX_STOP_CHARS:
                raise InvalidRequest(f"stop strings must have 1 to {MAX_STOP_CHARS} characters, got {len(stop)}")
        self._check_ids("stop_token_ids", ask.params.stop_token_ids)
        if ask.params.seed is not None and not -(2**63) <= ask.params.seed < 2**63:
            raise InvalidRequest(f"seed must fit 64 bits, got {ask.params.seed}")

    def check_model(self, name: str | None) -> None:
        """Raises ModelNotFound; nothing named means the served model."""
        if name and name != self.model.name:
            raise ModelNotFound(f"model {name!r} is not served here; this gateway serves {self.model.name!r}")

    def _check_ids(self, name: str, ids: tuple[int, ...]) -> None:
        last = self.model.vocab_size - 1
        if ids and not 0 <= min(ids) <= max(ids) <= last:
            wrong = next(i for i in ids if not 0 <= i <= last)
            raise InvalidRequest(f"{name}: token id {wrong} is outside the vocabulary (0 to {last})")

    def _admit(self, ask: Ask) -> None:
        if self._draining:
            raise Overloaded("the gateway is draining and takes no new requests")
        if ask.request_id in self._live:
            raise InvalidRequest(f"request_id {ask.request_id!r} is in flight already")
        if self._inflight + ask.num_choices > self.limits.max_inflight_requests:
            raise Overloaded(f"{self._inflight} requests are in flight, limit {self.limits.max_inflight_requests}")
        self._count(ask.num_choices)

    def _count(self, change: int) -> None:
        self._inflight += change
        self.metrics.inflight.set(self._inflight)
        (self._idle.clear if self._inflight else self._idle.set)()

    async def _choices(self, ask: Ask) -> list[Choice]:
        """One per prompt and sample, in that order."""
        seed = secrets.randbits(63) if ask.params.seed is None else ask.params.seed
        choices: list[Choice] = []
        in_thread = sum(map(_num_chars, ask.prompts)) > THREAD_CHARS
        for prompt in ask.prompts:
            ids = await self._tokenise(prompt, in_thread)
            max_tokens = self._room(ids, ask)
            for sample in range(ask.n):
                index = len(choices)
                # Wraps inside 64 bits, so that every sample has a seed of its own and the first one the user's.
                own_seed = (seed + sample + 2**63) % 2**64 - 2**63
                params = dataclasses.replace(
                    ask.params,
                    max_tokens=max_tokens,
                    seed=own_seed,
                    top_k=min(ask.params.top_k, self.model.vocab_size),
                )
                name = ask.request_id if ask.num_choices == 1 else f"{ask.request_id}-{index}"
                request = GenerateRequest(name, ids, params, ask.arrived + ask.timeout_s)
                choices.append(Choice(index, request, self.model.tokenizer.detokenizer(), ask.stop, ask.arrived))
        return choices

    async def _tokenise(self, prompt: Prompt, in_thread: bool) -> tuple[int, ...]:
        if isinstance(prompt, tuple):
            ids = prompt
            self._check_ids("prompt", ids)
        elif in_thread:
            ids = await asyncio.to_thread(self._encode, prompt)
        else:
            ids = self._encode(prompt)
        if not ids:
            raise InvalidRequest("prompt must not be empty")
        return ids

    def _encode(self, prompt: str | Chat) -> tuple[int, ...]:
        tokenizer = self.model.tokenizer
        if isinstance(prompt, Chat):
            text = tokenizer.apply_chat_template([dict(m) for m in prompt.messages], prompt.add_generation_prompt)
            return tuple(tokenizer.encode(text, add_special=False))
        if not prompt:
            raise InvalidRequest("prompt must not be empty")
        return tuple(tokenizer.encode(prompt))

    def _room(self, ids: tuple[int, ...], ask: Ask) -> int:
        """max_tokens of a prompt: what was asked for, or the rest of the context."""
        context = self.model.max_context
        room = context - len(ids)
        if room < 1:
            raise ContextTooLong(
                f"prompt has {len(ids)} tokens, the context of {self.model.name} holds {context}, the answer included"
            )
        if not ask.max_tokens_given:
            return room
        if ask.params.max_tokens > room:
            raise ContextTooLong(
                f"max_tokens {ask.params.max_tokens} and a prompt of {len(ids)} tokens exceed "
                f"the context of {self.model.name}, {context} tokens"
            )
        return ask.params.max_tokens


def _num_chars(prompt: Prompt) -> int:
    if isinstance(prompt, Chat):
        return sum(len(message["content"]) for message in prompt.messages)
    return len(prompt) if isinstance(prompt, str) else 0
