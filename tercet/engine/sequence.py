"""One request inside an engine: its tokens, its blocks, and how far its KV is computed.

QUARANTINED ──proof that nobody writes──> OVER
   ^
   │ handover failed
RESERVED (a decode worker waits for KV) ──join────────┐
                                                      v
WAITING ──scheduled──> PREFILLING ──last chunk──> DECODING ──last token──> OVER
   ^                       │                          │
   └───────preempted───────┴──────────────────────────┘

A sequence that is handed over is OVER with its last chunk: it is decoded elsewhere. WAITING, PREFILLING and DECODING
end in OVER by an abort or a fault, too.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tercet.core import FinishReason, PromptImage, PromptScore, Role, SamplingParams, Ticket
from tercet.engine.images import computable, told_apart
from tercet.engine.prefix import chain_hash

if TYPE_CHECKING:
    from tercet.engine.state import EngineState


class Phase(enum.Enum):
    WAITING = enum.auto()
    PREFILLING = enum.auto()  # runs; its tokens are computed in chunks
    DECODING = enum.auto()  # runs; only its newest token is still to be computed
    RESERVED = enum.auto()  # its KV is on its way from another worker
    QUARANTINED = enum.auto()  # failed, but the other worker may still write into its blocks
    OVER = enum.auto()  # finished, failed or aborted; the engine computes it no further


@dataclass(eq=False)
class Sequence:
    ticket: Ticket
    token_ids: list[int]  # prompt, then output
    num_prompt: int
    params: SamplingParams
    kind: Role | None = None  # of its leg: which handler gets its part of a step's report
    hand_over: bool = False  # compute the prompt, hand its KV over, sample one token, be done
    images: tuple[PromptImage, ...] = ()
    joined: bool = False  # the KV of its prompt came from another worker
    state: EngineState | None = None  # of a group with several data replicas: that of its own

    phase: Phase = Phase.WAITING
    blocks: list[int] = field(default_factory=list)
    computed: int = 0  # tokens whose KV stands in `blocks`
    planned: int = 0  # the same, with what the steps in flight compute
    drawing: int = 0  # steps in flight that draw its next token
    cached_tokens: int = 0  # tokens of the prompt that the prefix cache served
    scores: list[PromptScore] = field(default_factory=list)  # one per prompt token but the first, if wanted
    pushed_blocks: int = 0  # prompt blocks that the receiver has, or that are handed over already
    hashes: list[bytes] = field(default_factory=list)  # chained, of the full blocks
    published: int = 0  # blocks offered to the prefix cache
    arrived: float = 0.0  # time.monotonic()
    first_scheduled: float | None = None
    chunks: int = 0  # of its prompt that were planned
    here: set[int] = field(default_factory=set)  # images whose embeddings are here

    @property
    def over(self) -> bool:
        return self.phase is Phase.OVER

    @property
    def wants_scores(self) -> bool:
        """Whether the prompt's logprobs are still to be computed; once there is an output they have been."""
        return self.params.prompt_logprobs is not None and not self.num_output

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def pending(self) -> int:
        """Tokens whose KV no step computes yet, those that are being drawn included."""
        return len(self.token_ids) + self.drawing - self.planned

    @property
    def computable(self) -> int:
        """Tokens that can be computed: up to the first image whose embeddings are not here yet."""
        return computable(self.images, self.here, self.planned, len(self.token_ids) + self.drawing)

    @property
    def can_start_again(self) -> bool:
        """Whether its prompt can be computed here; a worker that only decodes gets no embeddings of images."""
        return not (self.joined and self.images)

    @property
    def decodes(self) -> bool:
        """Whether what it needs next is one more token."""
        return self.phase is Phase.DECODING or (self.drawing > 0 and not self.hand_over)

    def start_at(self, computed: int) -> None:
        """The KV of its first `computed` tokens stands in `blocks`; no step in flight computes more."""
        self.computed = self.planned = computed

    def extend_hashes(self, block_size: int) -> list[bytes]:
        """Chained hashes of every full block of the tokens so far."""
        while (len(self.hashes) + 1) * block_size <= len(self.token_ids):
            start = len(self.hashes) * block_size
            parent = self.hashes[-1] if self.hashes else b""
            images = told_apart(self.images, start, start + block_size)
            self.hashes.append(chain_hash(parent, self.token_ids[start : start + block_size], images))
        return self.hashes

    def finish_reason(self, eos_token_ids: tuple[int, ...], max_context: int) -> tuple[FinishReason, int | None] | None:
        """Why the sequence is over after its newest token, with the token that stopped it; None: it goes on."""
        return self.finish_reason_of(self.token_ids[-1], self.num_output, eos_token_ids, max_context)

    def finish_reason_of(
        self, token: int, num_output: int, eos_token_ids: tuple[int, ...], max_context: int
    ) -> tuple[FinishReason, int | None] | None:
        """Why the sequence is over with `token` as its output number `num_output`, which may not be appended yet."""
        if token in self.params.stop_set or (token in eos_token_ids and not self.params.ignore_eos):
            return FinishReason.STOP, token
        if num_output >= self.params.max_tokens or self.num_prompt + num_output >= max_context:
            return FinishReason.LENGTH, None
        return None
