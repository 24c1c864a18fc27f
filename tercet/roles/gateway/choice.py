"""Output of one choice: detokenising, stop strings, times of its tokens.

PromptLogprobs --prompt-->                  kept for the answer's beginning
TokenEvent     --push--> Delta              first_at, last_at, tokens counted
Progress       --account-->                 kept for the timings, in case a stop string ends it
Done           --finish--> Delta(finish_reason)
"""

from __future__ import annotations

import time

from tercet.core import (
    STAGES,
    UNTIL_FIRST_TOKEN,
    Done,
    FinishReason,
    GenerateRequest,
    Progress,
    PromptLogprobs,
    TokenEvent,
)
from tercet.metrics import Metrics
from tercet.roles.gateway.ask import Delta, GatewayTokenizer, Timings
from tercet.roles.gateway.stop import StopMatcher


class Choice:
    """The state of one choice. Not shared between tasks."""

    def __init__(
        self,
        index: int,
        request: GenerateRequest,
        tokenizer: GatewayTokenizer,
        stop: tuple[str, ...],
        arrived: float,
        echo: str = "",
        prompt_only: bool = False,
    ) -> None:
        """`echo`: the prompt's text, if the answer is to begin with it; `prompt_only`: it has nothing else."""
        self.index = index
        self.request = request
        self.echo = echo
        self.num_tokens = 0
        self.prompt: PromptLogprobs | None = None
        self.owes_prompt = request.params.prompt_logprobs is not None  # prompt logprobs must come before any token
        self.account: Progress | Done | None = None  # the last one
        self.finish_reason: FinishReason | None = None  # once it is over
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer(request.token_ids)
        self._stop = StopMatcher(stop)
        self._prompt_only = prompt_only
        self._chars = 0  # of the text so far
        self._arrived = arrived
        self._first_at = self._last_at = arrived

    def push(self, event: TokenEvent, metrics: Metrics) -> Delta:
        """The next token. The delta has a finish_reason if it completes a stop string. A token that ends the answer is
        not part of its text, special or not."""
        self._tick(event.at, metrics)
        if self._prompt_only:
            return Delta(self.index, "", (), event.at)
        silent = event.finish is FinishReason.STOP or event.token_id in self.request.params.stop_set
        piece = "" if silent else self._detokenizer.push(event.token_id)
        offset = self._chars + self._held(piece, event)
        self._chars += len(piece)
        text = self._stop.push(piece)
        return Delta(self.index, text, (event,), event.at, FinishReason.STOP if self._stop.found else None, offset)

    def finish(self, done: Done) -> Delta:
        """The end, with the text that was held back."""
        self.account = done
        if self._prompt_only:
            return Delta(self.index, "", (), time.monotonic(), FinishReason.LENGTH)
        text = self._stop.push(self._detokenizer.flush()) + self._stop.flush()
        reason = FinishReason.STOP if self._stop.found else done.finish_reason
        return Delta(self.index, text, (), time.monotonic(), reason)

    def _held(self, piece: str, event: TokenEvent) -> int:
        """Characters of the piece that belong to earlier tokens and were held back until this one."""
        if event.logprob is None:  # no offsets are asked for
            return 0
        own = self._tokenizer.token_text(event.token_id)
        return len(piece) - len(own) if piece.endswith(own) else 0

    def _tick(self, now: float, metrics: Metrics) -> None:
        """Count a token that arrived `now`."""
        if self.num_tokens:
            metrics.itl.observe(now - self._last_at)
        else:
            self._first_at = now
            metrics.ttft.observe(now - self._arrived)
        self._last_at = now
        self.num_tokens += 1

    def spend(self, metrics: Metrics, client: str) -> None:
        """Count what was computed for it, however it has ended. client: its name in labels."""
        if self.num_tokens:
            metrics.spent(client, len(self.request.token_ids), self.num_tokens)

    def book(self, reason: FinishReason, metrics: Metrics) -> None:
        """Count a finished choice."""
        self.finish_reason = reason
        metrics.finished(reason)
        metrics.e2e.observe(time.monotonic() - self._arrived)
        metrics.decode.observe(self._last_at - self._first_at)
        metrics.prompt_sizes.observe(len(self.request.token_ids))
        metrics.generation_sizes.observe(self.num_tokens)
        if self.num_tokens > 1:
            metrics.tpot.observe(self.tpot_s)
        if self.account is not None:
            metrics.stages(self.account)

    @property
    def completion_tokens(self) -> int:
        """Tokens that the client gets."""
        return 0 if self._prompt_only else self.num_tokens

    @property
    def ttft_s(self) -> float:
        return self._first_at - self._arrived

    @property
    def tpot_s(self) -> float:
        return (self._last_at - self._first_at) / max(1, self.num_tokens - 1)

    @property
    def timings(self) -> Timings:
        ttft_s = self.ttft_s
        if self.account is None:
            return Timings(ttft_s, self.tpot_s)
        t = self.account.times
        return Timings(
            ttft_s,
            self.tpot_s,
            gateway_s=max(0.0, ttft_s - sum(t.of(stage) for stage in UNTIL_FIRST_TOKEN)),
            stages={stage: t.of(stage) for stage in STAGES},
            kv_bytes=t.kv_bytes,
            transport=t.transport,
            workers=dict(self.account.workers),
            attempts=self.account.attempts,
        )
