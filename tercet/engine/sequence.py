"""One request inside an engine: its tokens, its blocks, and how far its KV is computed.

reserved (decode worker waits for KV) ──join──┐
                                              v
waiting ──scheduled──> running ──last token──> done
   ^                      │
   └──────preempted───────┘
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from tercet.core import FinishReason, SamplingParams
from tercet.engine.blocks import chain_hash
from tercet.transfer.messages import Ticket


class Handoff(Protocol):
    """Where a prefill-only sequence's KV goes. Called on the engine thread, layer by layer, while it computes."""

    def push(self, ticket: Ticket, layer: int, first: int, blocks: list[int]) -> None:
        """Prompt blocks from index `first` on stand complete in `blocks` of `layer`."""


@dataclass(eq=False)
class Sequence:
    ticket: Ticket
    token_ids: list[int]  # prompt, then output
    num_prompt: int
    params: SamplingParams
    handoff: Handoff | None = None  # set: compute the prompt, hand its KV over, sample one token, be done

    blocks: list[int] = field(default_factory=list)
    computed: int = 0  # tokens whose KV stands in `blocks`
    cached_tokens: int = 0  # of the prompt, served by the prefix cache
    pushed_blocks: int = 0  # handed over already
    hashes: list[bytes] = field(default_factory=list)  # chained, of the full blocks
    published: int = 0  # blocks offered to the prefix cache
    in_step: bool = False  # a forward pass is reading and writing its blocks right now
    over: bool = False  # finished or aborted; the engine computes it no further
    sending: bool = False  # a transfer reads its blocks: they stay until OpDone
    arrived: float = 0.0  # time.monotonic()
    first_scheduled: float | None = None

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def pending(self) -> int:
        """Tokens whose KV is still to be computed; one means: decoding."""
        return len(self.token_ids) - self.computed

    def extend_hashes(self, block_size: int) -> list[bytes]:
        """Chained hashes of every full block of the tokens so far."""
        while (len(self.hashes) + 1) * block_size <= len(self.token_ids):
            start = len(self.hashes) * block_size
            parent = self.hashes[-1] if self.hashes else b""
            self.hashes.append(chain_hash(parent, self.token_ids[start : start + block_size]))
        return self.hashes

    def finish_reason(self, eos_token_ids: tuple[int, ...], max_context: int) -> tuple[FinishReason, int | None] | None:
        """Why the sequence is over after its newest token, with the token that stopped it; None: it goes on."""
        last = self.token_ids[-1]
        if last in self.params.stop_token_ids or (last in eos_token_ids and not self.params.ignore_eos):
            return FinishReason.STOP, last
        if self.num_output >= self.params.max_tokens or len(self.token_ids) >= max_context:
            return FinishReason.LENGTH, None
        return None
