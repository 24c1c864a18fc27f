"""The core shared by HTTP and gRPC: requests are checked, admitted, tokenised and sent to the router.

async with frontend.session(ask) as session:      raises UserError, Overloaded before anything is sent
    async for delta in session.deltas(): ...      raises what the router raises, DeadlineExceeded
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress

from tercet.core import GenerateRequest, SamplingParams
from tercet.errors import ContextTooLong, DeadlineExceeded, InvalidRequest, ModelNotFound, NoWorkers, Overloaded
from tercet.metrics import Metrics
from tercet.roles.gateway.admission import Admission, Places
from tercet.roles.gateway.ask import Ask, Backend, Chat, Prompt, ServedModel
from tercet.roles.gateway.bounds import MOST_CHOICES, STOP_CHARS, STOPS_CHARS, bound
from tercet.roles.gateway.choice import Choice
from tercet.roles.gateway.image_files import Held, ImageFiles
from tercet.roles.gateway.offloop import OffLoop
from tercet.roles.gateway.quotas import Quotas
from tercet.roles.gateway.records import Record, Records
from tercet.roles.gateway.session import Session
from tercet.roles.gateway.tokenising import Encoded, Tokenising
from tercet.spec import LimitsSpec


class Frontend:
    """Admission and translation. One per gateway, used from one event loop."""

    def __init__(
        self, limits: LimitsSpec, backend: Backend, model: ServedModel, metrics: Metrics, images: ImageFiles
    ) -> None:
        self.limits = limits
        self.model = model
        self.metrics = metrics
        self.offloop = OffLoop()
        self.records = Records()
        self._backend = backend
        self._images = images
        self._tokenising = Tokenising(model, limits.max_chars_per_token, self.offloop)
        self._admission = Admission(limits.max_inflight_requests, metrics.inflight.set)
        self._live: dict[tuple[str, str], asyncio.Timeout] = {}  # client, its request id -> the deadline
        self._quotas = Quotas()
        self._draining = False
        self._stopping = False

    @property
    def inflight(self) -> int:
        """Choices that are being generated."""
        return self._admission.in_use

    @asynccontextmanager
    async def session(self, ask: Ask) -> AsyncGenerator[Session, None]:
        """Run the body under the request's deadline, counted against its key's limits and
        limits.max_inflight_requests."""
        self._check(ask)
        with self._quotas.request(ask.key) as spend:
            async with self._admitted(ask, spend) as session:
                yield session

    @asynccontextmanager
    async def _admitted(self, ask: Ask, spend: Callable[[int], None]) -> AsyncGenerator[Session, None]:
        places = self._admit(ask)
        with self.records.of(ask, self.model.name) as record:
            async with self._running(ask, places, record, spend) as session:
                yield session

    @asynccontextmanager
    async def _running(
        self, ask: Ask, places: Places, record: Record, spend: Callable[[int], None]
    ) -> AsyncGenerator[Session, None]:
        try:
            async with asyncio.timeout(ask.arrived + ask.timeout_s - time.monotonic()) as deadline:
                self._live[ask.client, ask.request_id] = deadline
                with self._images.held() as held:
                    choices = await self._choices(ask, held)
                    self.records.begin(record, choices)
                    session = Session(ask, choices, self._backend, self.metrics, places, spend)
                    spend(session.prompt_tokens)
                    yield session
                    session.book()
        except TimeoutError as error:
            if not deadline.expired():
                raise
            if self._stopping:
                raise NoWorkers("the gateway is stopping; send the request again") from error
            raise DeadlineExceeded(f"no full answer within {ask.timeout_s:g} s") from error
        finally:
            self._live.pop((ask.client, ask.request_id), None)
            places.close()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, let running ones finish, and cancel those still running after `timeout_s`."""
        self._draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._admission.idle.wait()
        self._stopping = True
        for deadline in self._live.values():
            if not deadline.expired():
                deadline.reschedule(0)

    def check_model(self, name: str | None) -> None:
        """Raises ModelNotFound; nothing named means the served model."""
        if name and name != self.model.name:
            raise ModelNotFound(f"model {name!r} is not served here; this gateway serves {self.model.name!r}")

    def _check(self, ask: Ask) -> None:
        """Checks that need no tokens. Raises InvalidRequest."""
        bound("prompt", ask.prompts)
        bound("stop", ask.stop)
        bound("stop_token_ids", ask.params.stop_token_ids)
        ask.params.validate()
        if not 1 <= ask.n <= self.limits.max_n:
            raise InvalidRequest(f"n must be from 1 to {self.limits.max_n}, got {ask.n}")
        if not ask.prompts:
            raise InvalidRequest("prompt must not be empty")
        if ask.num_choices > MOST_CHOICES:
            raise InvalidRequest(
                f"prompt: {len(ask.prompts)} prompts times n {ask.n} is more than one request may ask ({MOST_CHOICES})"
            )
        lengths = [len(stop) for stop in ask.stop]
        if max(lengths, default=0) > STOP_CHARS or sum(lengths) > STOPS_CHARS:
            raise InvalidRequest(
                f"stop strings may have {STOP_CHARS} characters each and {STOPS_CHARS} in all, got {max(lengths)} "
                f"and {sum(lengths)}"
            )
        if ask.images and self.model.images is None:
            raise InvalidRequest(f"{ask.images[0].where}: the model {self.model.name} takes no images")
        self._tokenising.check_ids("stop_token_ids", ask.params.stop_token_ids)
        if ask.params.seed is not None and not -(2**63) <= ask.params.seed < 2**63:
            raise InvalidRequest(f"seed must be from {-(2**63)} to {2**63 - 1}, got {ask.params.seed}")

    def _admit(self, ask: Ask) -> Places:
        if self._draining:
            raise Overloaded("the gateway is draining and takes no new requests")
        if (ask.client, ask.request_id) in self._live:
            raise InvalidRequest(f"request_id {ask.request_id!r} is in flight already")
        return self._admission.enter(ask.client)

    async def _choices(self, ask: Ask, held: Held) -> list[Choice]:
        """One per prompt and sample, in that order."""
        named = await self._images.gather(ask.images, ask.client, held)
        seed = secrets.randbits(63) if ask.params.seed is None else ask.params.seed
        choices: list[Choice] = []
        tokenised = await self._tokenising.encoded(ask.prompts, ask.client, ask.add_special)
        self._images.keep(named, ask.client)
        held.settle(sum(len(image.content) for encoded in tokenised for image in encoded.images))
        for prompt, encoded in zip(ask.prompts, tokenised, strict=True):
            ids = encoded.ids
            params = dataclasses.replace(
                ask.params, max_tokens=self._room(prompt, ids, ask), top_k=min(ask.params.top_k, self.model.vocab_size)
            )
            echo = await self._tokenising.text(prompt, ids, ask.client) if ask.echo else ""
            for _ in range(ask.n):
                index = len(choices)
                request = self._request(ask, index, encoded, dataclasses.replace(params, seed=_own_seed(seed, index)))
                own = (ask.stop_strings, ask.arrived, echo, ask.prompt_only)
                choices.append(Choice(index, request, self.model.tokenizer, *own))
        return choices

    def _request(self, ask: Ask, index: int, encoded: Encoded, params: SamplingParams) -> GenerateRequest:
        name = ask.request_id if ask.num_choices == 1 else f"{ask.request_id}-{index}"
        deadline = ask.arrived + ask.timeout_s
        return GenerateRequest(name, encoded.ids, params, deadline, ask.client, encoded.images, ask.trace)

    def _room(self, prompt: Prompt, ids: tuple[int, ...], ask: Ask) -> int:
        """max_tokens of a prompt: what was asked for, or the rest of the context.

        Raises ContextTooLong. A chat that asks for more than is left gets what is left, since editors always ask for
        the maximum; a completion is refused, as in vLLM.
        """
        context = self.model.max_context
        room = context - len(ids)
        if room < 1:
            raise self._tokenising.too_long(f"{len(ids)} tokens,")
        if not ask.max_tokens_given:
            return room
        if ask.params.max_tokens > room and not isinstance(prompt, Chat):
            raise ContextTooLong(
                f"max_tokens {ask.params.max_tokens} and a prompt of {len(ids)} tokens exceed "
                f"the context of {self.model.name}, {context} tokens"
            )
        return min(ask.params.max_tokens, room)


def _own_seed(seed: int, index: int) -> int:
    """Every choice has a seed of its own, the first one the user's; wraps inside 64 bits."""
    return (seed + index + 2**63) % 2**64 - 2**63
