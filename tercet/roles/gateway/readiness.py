"""The gateway is ready once a real request has passed through a live pair; if none has, this sends a small probe."""

from __future__ import annotations

import asyncio
import io
import logging
import secrets
import time
import uuid
from contextlib import aclosing
from dataclasses import replace

from PIL import Image

from tercet.core import GenerateRequest, SamplingParams
from tercet.errors import TercetError
from tercet.roles.gateway.ask import Backend, ServedModel

POLL_S = 0.2  # how late a change of the pairs may be seen
RETRY_S = 1.0  # after a probe that failed
PROBE_TEXT = "Hello"
PROBE_SIDE = 32  # pixels of an image's
PROBE_TOKENS = 2  # the second one comes from the decode worker, over the KV that it was sent

log = logging.getLogger(__name__)


class Readiness:
    """`run` until cancelled; `ready` and `reason` are always current."""

    def __init__(self, backend: Backend, model: ServedModel, timeout_s: float, *, shows: bool = False) -> None:
        """shows: there are encode workers, which only an image passes through."""
        self._backend = backend
        self._model = model
        self._shows = shows
        self._timeout_s = timeout_s
        self._failure = ""
        self.closed = ""  # why new requests are refused

    @property
    def ready(self) -> bool:
        return not self.closed and self._backend.is_ready()

    @property
    def reason(self) -> str:
        """Why it is not ready; empty if it is."""
        if self.closed:
            return self.closed
        missing = self._backend.missing_roles()
        if missing:
            return f"no live worker of role {', '.join(missing)}"
        if self.ready:
            return ""
        return self._backend.slow_pair() or self._failure or "no request has passed through a live pair yet"

    async def run(self) -> None:
        while True:
            if self._backend.missing_roles() or self._backend.slow_pair() or self._backend.is_ready():
                await asyncio.sleep(POLL_S)
            else:
                await asyncio.sleep(POLL_S if await self._probe() else RETRY_S)

    async def _probe(self) -> bool:
        params = SamplingParams(max_tokens=PROBE_TOKENS, temperature=0.0, seed=0, ignore_eos=True)
        deadline = time.monotonic() + self._timeout_s
        request = GenerateRequest(f"probe-{uuid.uuid4().hex}", self._text(), params, deadline)
        if self._shows and self._model.images is not None:
            ids, images = self._model.images.lone(_picture(), (PROBE_SIDE, PROBE_SIDE))
            if len(ids) + PROBE_TOKENS > self._model.max_context:
                self._failure = f"an image takes {len(ids)} tokens, and model.max_context is {self._model.max_context}"
                return False
            request = replace(request, token_ids=ids, images=images)
        try:
            async with aclosing(self._backend.generate(request)) as events:
                async for _ in events:
                    pass
        except TercetError as error:
            self._failure = f"the probe request failed: {error.code()}: {error}"
            log.warning(self._failure)
            return False
        self._failure = ""
        return True

    def _text(self) -> tuple[int, ...]:
        return tuple(self._model.tokenizer.encode(PROBE_TEXT))


def _picture() -> bytes:
    """Another one each time, so that no cache has it."""
    file = io.BytesIO()
    Image.frombytes("RGB", (PROBE_SIDE, PROBE_SIDE), secrets.token_bytes(3 * PROBE_SIDE**2)).save(file, "PNG")
    return file.getvalue()
