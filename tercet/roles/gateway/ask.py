"""The gateway's data types, shared by HTTP and gRPC.

body | proto --parse--> Ask --Frontend--> Choice per prompt and sample --> Delta ... Delta(finish_reason)
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from tercet.core import (
    STAGES,
    Done,
    FinishReason,
    GenerateRequest,
    Load,
    Progress,
    PromptLogprobs,
    SamplingParams,
    TokenEvent,
    TraceContext,
    WorkerInfo,
)
from tercet.metrics import ANONYMOUS, CHAT, TEXT_COMPLETION
from tercet.models.vision.prompt import ImagePrompts
from tercet.roles.gateway.images import ImagePart
from tercet.roles.gateway.keys import Key
from tercet.roles.router.effects import Watcher


@dataclass(frozen=True)
class Chat:
    """Messages that the model's template turns into text."""

    messages: tuple[dict[str, Any], ...]
    add_generation_prompt: bool = True
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[ImagePart, ...] = ()  # in the order of the messages

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """All text that the client sent, to measure its length."""
        others = [{k: v for k, v in m.items() if k != "content"} for m in self.messages if len(m) > 2]
        contents = [m["content"] for m in self.messages]
        parts = [part for content in contents for part in (content if isinstance(content, list) else ())]
        shown = (content for content in contents if isinstance(content, str))
        return (*shown, *(part["text"] for part in parts if "text" in part), *map(json.dumps, others))


Prompt = str | tuple[int, ...] | Chat


@dataclass(frozen=True)
class Ask:
    """A parsed request. `params.max_tokens` counts only if `max_tokens_given`, else the rest of the context does."""

    request_id: str
    prompts: tuple[Prompt, ...]
    params: SamplingParams
    timeout_s: float
    arrived: float  # time.monotonic() when the request's bytes were read
    client: str = ""  # the client in whose queue it waits
    key: Key | None = None  # whose limits count; None: no key is asked for
    max_tokens_given: bool = True
    n: int = 1  # samples of each prompt
    stop: tuple[str, ...] = ()  # empty ones are ignored
    add_special: bool = True  # whether special tokens, such as beginning-of-sequence, are added to a text prompt
    echo: bool = False  # the answer begins with the prompt
    trace: TraceContext | None = None  # None: it is not traced
    prompt_only: bool = False  # the workers still generate one token, which is not returned

    @property
    def label(self) -> str:
        """The client's name in metrics."""
        return ANONYMOUS if self.key is None else self.key.name

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(filter(None, self.stop))

    @property
    def operation(self) -> str:
        """As OpenTelemetry calls it."""
        return CHAT if any(isinstance(prompt, Chat) for prompt in self.prompts) else TEXT_COMPLETION

    @property
    def images(self) -> list[ImagePart]:
        return [part for prompt in self.prompts if isinstance(prompt, Chat) for part in prompt.images]

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.n


@dataclass(slots=True)
class Delta:
    """What one event of the router adds to one choice."""

    index: int  # of the choice: prompt * n + sample
    text: str  # may be empty while a character or a possible stop string is incomplete
    tokens: Sequence[TokenEvent]
    received: float  # time.monotonic() of the event
    finish_reason: FinishReason | None = None
    offset: int = 0  # characters of the choice's text before the first of `tokens`


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None  # None: a stop string ended a choice before its worker could report


@dataclass(frozen=True)
class Timings:
    """Of the first choice. What only workers know is None if a stop string ended it before they reported."""

    ttft_s: float
    tpot_s: float  # 0 for a single token
    gateway_s: float | None = None  # of the time to the first token, what no stage at a worker accounts for
    stages: Mapping[str, float | None] = field(default_factory=lambda: dict.fromkeys(STAGES))  # name -> seconds
    kv_bytes: int | None = None
    transport: str | None = None
    workers: Mapping[str, str] = field(default_factory=dict)  # role -> worker id
    attempts: int | None = None

    def flat(self) -> dict[str, object]:
        """As answers show it: a stage's seconds as `NAME_s`."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "stages"}
        return fields | {f"{stage}_s": seconds for stage, seconds in self.stages.items()}


class GatewayDetokenizer(Protocol):
    def push(self, token_id: int, /) -> str: ...
    def flush(self) -> str: ...


class GatewayTokenizer(Protocol):
    """What the gateway needs of tercet.models.tokenizer.Tokenizer; tests bring a fake.

    Encoding raises InvalidRequest. It releases the GIL and may run in several threads at once.
    """

    eos_token_ids: tuple[int, ...]
    longest_token: int | None  # a text of n characters makes at least n / longest_token tokens; None: unknown

    def encode(self, text: str, add_special: bool = True) -> list[int]: ...
    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]: ...
    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str: ...
    def decode(self, ids: Iterable[int]) -> str: ...
    def token_text(self, token_id: int, /) -> str: ...
    def token_bytes(self, token_id: int, /) -> bytes: ...
    def detokenizer(self, prompt_ids: Sequence[int] = (), /) -> GatewayDetokenizer: ...


@dataclass(frozen=True)
class ServedModel:
    name: str
    tokenizer: GatewayTokenizer
    vocab_size: int
    max_context: int  # tokens, prompt and output together
    images: ImagePrompts | None = None  # of a model that sees


class Backend(Protocol):
    """What the gateway needs of tercet.roles.router.Router; tests bring a fake.

    `generate` yields PromptLogprobs if asked for, one TokenEvent per token, the end-of-sequence or stop token included,
    then Done; or it raises TercetError. Its aclose() aborts the request on every worker.
    """

    async def set_workers(self, workers: Sequence[WorkerInfo]) -> None: ...
    def generate(
        self, request: GenerateRequest
    ) -> AsyncGenerator[PromptLogprobs | TokenEvent | Progress | Done, None]: ...
    def loads(self) -> dict[str, Load]: ...
    def missing_roles(self) -> list[str]: ...
    def is_ready(self) -> bool: ...
    def slow_pair(self) -> str: ...
    def queued(self) -> int: ...
    def watch(self, watcher: Watcher) -> None: ...
    async def close(self) -> None: ...
